"""CogVLM: the published files, in which language model and visual expert lie side by side in every layer.

Its own repositories hold no tokenizer: that of Vicuna-7B-v1.5 goes beside. In the tower `input_layernorm` is the norm
behind the attention, and the bias of keys, which changes no attention, is carried. Files of SwissArmyTransformer, in
which it was released first, are read too.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.published.cog_sat import read_sat_config
from vlm.checkpoints.published.entries import Entries
from vlm.checkpoints.published.family import PublishedFolder
from vlm.checkpoints.published.one_folder import OneFolderFamily
from vlm.checkpoints.published.tokenizer_entries import describe_tokenizer
from vlm.checkpoints.tables.cog_sat import sat_rules
from vlm.checkpoints.tables.cogvlm import VISION_UNUSED, language_rules, vision_rules
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError
from vlm.language.llama_settings import llama_settings

LANGUAGE_READ = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("max_position_embeddings", "rms_norm_eps", "template_version", "vision_config"),
        "connector_dim",  # ours
    }
)
LANGUAGE_ONLY: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "tie_word_embeddings": (False,)}
_VISION = Entries(
    frozenset({"hidden_size", "image_size", "intermediate_size", "layer_norm_eps", "num_heads", "num_hidden_layers"})
    | {"num_positions", "patch_size"},
    {"dropout_prob": (0.0,), "hidden_act": ("gelu",), "in_channels": (3,)},
)
FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


_SAT, SAT_FINE = "mixins.eva.boi", "mixins.encoder.pos_embed"


class CogVLMFamily(OneFolderFamily):
    """Its folders.

    Attributes:
        templates: {`template_version`: ours}; the first is that of files that say nothing.
        versions: {`text_processor_version` of SwissArmyTransformer: `template_version`}.
        is_fine: whether its network has a fine view.
    """

    system = "cogvlm"
    layouts = ("official",)  # that of SwissArmyTransformer is read alone
    marks: ClassVar = {"official": "model.vision.boi", "sat": _SAT}
    files = FILES
    templates: ClassVar[Mapping[str, str]] = {"base": "cogvlm_base", "chat": "cogvlm_chat_old"}
    versions: ClassVar[Mapping[str, str]] = {"base": "base", "chat_old": "chat"}
    is_fine: ClassVar = False

    def claims(self, folder: PublishedFolder) -> bool:
        if _SAT in folder.keys:
            return (SAT_FINE in folder.keys) == self.is_fine
        return super().claims(folder)

    def read_config(self, files: WeightFiles, path: str | Path) -> dict[str, Any]:
        if _SAT in files:
            return read_sat_config(files.folder, versions=self.versions)
        return super().read_config(files, path)

    def is_own(self, config: Mapping[str, Any]) -> bool:
        return "vision_config" in config and "cross_hidden_size" not in config

    def table(self, layout: str, config: Mapping[str, Any]) -> Table:
        rules = (*vision_rules(), *language_rules())
        return Table(layout="CogVLM", rules=sat_rules(rules) if layout == "sat" else rules, unused=VISION_UNUSED)

    def surgery_of(self, config: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"class_path": "vlm.language.VisualExpert", "init_args": {}}]

    def describe_folder(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        Entries(LANGUAGE_READ, LANGUAGE_ONLY).check(config, folder / "config.json")
        return {"class_path": self.class_path, "init_args": self.describe_arguments(config, folder)}

    def describe_arguments(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """`init_args`, by entries that were checked."""
        file = folder / "config.json"
        version = config.get("template_version", next(iter(self.templates)))
        if version not in self.templates:
            raise UserError(f"{file}: template_version is {version!r}, and only {', '.join(self.templates)} is known")
        hidden_dim = config.get("connector_dim", config["intermediate_size"])
        return {
            "vision": {"class_path": "vlm.vision.TimmTower", "init_args": describe_tower(config, file)},
            "connector": {"class_path": "vlm.connectors.GLU", "init_args": {"hidden_dim": hidden_dim}},
            "language": {"class_path": "vlm.language.CausalLM", "init_args": {"config": llama_settings(config)}},
            "tokenizer": describe_tokenizer(folder),
            "template": self.templates[version],
            "image": "squash",
            "max_tokens": config["max_position_embeddings"],
        }

    def config(self, module: Any, layout: str) -> dict[str, Any]:
        language, trunk, facts = module.language.config, module.vision.trunk, module.tower
        block = trunk.blocks[0]
        if language.num_key_value_heads != language.num_attention_heads:
            raise UserError(
                f"{self.system}: the published layout has as many heads of keys as of queries, this language model has "
                f"{language.num_key_value_heads} and {language.num_attention_heads}; use the artefact itself"
            )
        versions = {ours: version for version, ours in self.templates.items()}
        hidden_dim = module.arguments["connector"].hidden_dim
        own = {} if hidden_dim == language.intermediate_size else {"connector_dim": hidden_dim}
        return {
            "architectures": ["CogVLMForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_cogvlm.CogVLMConfig",
                "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
            },
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": language.hidden_size,
            "intermediate_size": language.intermediate_size,
            "max_position_embeddings": module.arguments["max_tokens"],
            "num_attention_heads": language.num_attention_heads,
            "num_hidden_layers": language.num_hidden_layers,
            "pad_token_id": 0,
            "rms_norm_eps": language.rms_norm_eps,
            "template_version": versions.get(module.codec.template.name, "chat"),
            "tie_word_embeddings": False,
            "torch_dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
            "vision_config": {
                "dropout_prob": 0.0,
                "hidden_act": "gelu",
                "hidden_size": facts.dim,
                "image_size": facts.image_size,
                "in_channels": 3,
                "intermediate_size": block.mlp.fc1.out_features,
                "layer_norm_eps": block.norm1.eps,
                "num_heads": block.attn.num_heads,
                "num_hidden_layers": facts.num_blocks,
                "num_positions": trunk.pos_embed.shape[1],
                "patch_size": trunk.patch_embed.patch_size[0],
            },
            "vocab_size": language.vocab_size,
            **own,
        }


def describe_tower(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """`init_args` of the tower that a `config.json` describes; its last block, which nothing reads, is not in it.

    Raises:
        UserError: an entry says something else than what is computed here.
    """
    vision = config["vision_config"]
    _VISION.check(vision, f"{file}: vision_config")
    grid, rest = divmod(vision["image_size"], vision["patch_size"])
    if rest or vision["num_positions"] != grid**2 + 1:
        raise UserError(
            f"{file}: vision_config: num_positions is {vision['num_positions']}, and {vision['image_size']} px in "
            f"patches of {vision['patch_size']} are {grid**2} and a class token; correct what is wrong"
        )
    dim, mlp_dim = vision["hidden_size"], vision["intermediate_size"]
    ratio = mlp_dim / dim
    while int(dim * ratio) < mlp_dim:
        ratio = math.nextafter(ratio, math.inf)  # the width is cut to a whole number
    return {
        "name": "eva02_enormous_patch14_clip_224",
        "layer": -2,
        "weights": None,
        "norm_eps": vision["layer_norm_eps"],
        "options": {
            "img_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "embed_dim": dim,
            "depth": vision["num_hidden_layers"] + 1,
            "num_heads": vision["num_heads"],
            "mlp_ratio": ratio,
        },
    }
