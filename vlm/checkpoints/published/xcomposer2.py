"""InternLM-XComposer2: the published files, in which partial LoRA lies beside the weights of an InternLM2."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from vlm.checkpoints.published.entries import Entries, refusal
from vlm.checkpoints.published.family import PublishedFolder
from vlm.checkpoints.published.one_folder import OneFolderFamily
from vlm.checkpoints.published.xcomposer import describe_tokenizer
from vlm.checkpoints.tables.clip import clip_rules, clip_unused
from vlm.checkpoints.tables.internlm2 import language_rules
from vlm.checkpoints.tables.rules import Rule, rename
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError
from vlm.language import PartialLoRA
from vlm.language.llama_settings import llama_settings
from vlm.prompts.xcomposer2 import END, START

_LANGUAGE = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
    }
)
_LANGUAGE_ONLY: dict[str, tuple[Any, ...]] = {
    "bias": (False,),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
}
_READ = _LANGUAGE | {"img_size", "max_length", "vision", "partial_lora"}  # the last two are ours
# what no config.json says: constants of the published code
_VISION = {"patch_size": 14, "embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4.0}
_PARTIAL = {"rank": 256, "scale": 1.0, "dropout": 0.05}
_WIDE = 490
"""Side of the views of the models that talk about images; the one that composes articles has 224."""
PLORA = "model.layers.0.attention.wqkv.Plora_A.weight"
SEPARATOR = "plora_glb_GN"
"""A tensor that -4KHD has besides."""


class XComposer2Family(OneFolderFamily):
    system = "xcomposer2"
    marks: ClassVar = {"official": PLORA}
    files = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    own_entries: ClassVar[frozenset[str]] = frozenset()
    """Of `config.json`, that this family reads besides."""

    def claims(self, folder: PublishedFolder) -> bool:
        return super().claims(folder) and SEPARATOR not in folder.keys

    def is_own(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type", "internlm2") in ("internlm2", "internlmxcomposer2")

    def table(self, layout: str, config: Mapping[str, Any]) -> Table:
        heads = config["num_attention_heads"]
        groups = config.get("num_key_value_heads") or heads
        return Table(
            layout="InternLM-XComposer2",
            rules=(
                *(_sparing_norm(rule) for rule in clip_rules(theirs="vit.vision_tower.vision_model.")),
                *self.connector_rules(),
                *language_rules(heads=heads, groups=groups, ours="language.", partial=True),
            ),
            unused=clip_unused(num_blocks=_vision(config)["depth"]),
        )

    def connector_rules(self) -> tuple[Any, ...]:
        """Of what lies between tower and language model."""
        return (rename("vision_proj.0.{p}", "connector.0.{p}"), rename("vision_proj.2.{p}", "connector.2.{p}"))

    def surgery_of(self, config: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"class_path": "vlm.language.PartialLoRA", "init_args": _partial(config)}]

    def describe_folder(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        _check(config, folder / "config.json", read=_READ | self.own_entries)
        tower = {
            "name": "vit_large_patch14_clip_quickgelu_336",
            "layer": -1,
            "weights": None,
            "options": _vision(config) | {"img_size": config["img_size"]},
        }
        return {
            "class_path": self.class_path,
            "init_args": {
                "vision": {"class_path": "vlm.vision.TimmTower", "init_args": tower},
                "connector": {"class_path": "vlm.connectors.MLP", "init_args": {"depth": 2}},
                "language": {
                    "class_path": "vlm.language.CausalLM",
                    "init_args": {"config": llama_settings(config)},
                },
                "partial_lora": {"class_path": "vlm.language.PartialLoRA", "init_args": _partial(config)},
                "tokenizer": describe_tokenizer(folder, marks=(START, END)),
                "template": "xcomposer2" if config["img_size"] == _WIDE else "xcomposer2_plain",
                "image": "squash",
                "max_tokens": config.get("max_length", 4096),
            },
        }

    def config(self, module: Any, layout: str) -> dict[str, Any]:
        language, trunk, facts = module.language.config, module.vision.trunk, module.tower
        vision = {
            "patch_size": trunk.patch_embed.patch_size[0],
            "embed_dim": facts.dim,
            "depth": facts.num_blocks,
            "num_heads": trunk.blocks[0].attn.num_heads,
            "mlp_ratio": trunk.blocks[0].mlp.fc1.out_features / facts.dim,
        }
        if facts.depth != facts.num_blocks:
            raise UserError("vision.layer: the published code has features of the last block alone; use the artefact")
        partial = _settings(module)
        own = {} if vision == _VISION else {"vision": vision}
        own |= {} if partial == _PARTIAL else {"partial_lora": partial}
        return {
            "architectures": ["InternLMXComposer2ForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_internlm_xcomposer2.InternLMXcomposer2Config",
                "AutoModel": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM",
                "AutoModelForCausalLM": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM",
            },
            "bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": language.hidden_size,
            "img_size": facts.image_size,
            "intermediate_size": language.intermediate_size,
            "max_length": module.codec.max_tokens,
            "max_position_embeddings": language.max_position_embeddings,
            "model_type": "internlm2",
            "num_attention_heads": language.num_attention_heads,
            "num_hidden_layers": language.num_hidden_layers,
            "num_key_value_heads": language.num_key_value_heads,
            "pad_token_id": 2,
            "rms_norm_eps": language.rms_norm_eps,
            "rope_scaling": {"factor": 1.0, "type": "dynamic"},
            "rope_theta": language.rope_parameters["rope_theta"],
            "tie_word_embeddings": False,
            "vocab_size": language.vocab_size,
            **own,
        }


def check_internlm2(config: Mapping[str, Any], file: Path) -> None:
    """Refuses a `config.json` of InternLM2's code that says what `llama_settings` does not do."""
    _check(config, file, read=_LANGUAGE)


def _check(config: Mapping[str, Any], file: Path, *, read: frozenset[str]) -> None:
    Entries(read, _LANGUAGE_ONLY, frozenset({"rope_scaling"})).check(config, file)
    scaling = config.get("rope_scaling") or {}
    # by length: it begins behind `max_position_embeddings`, and no sample is longer
    if scaling.get("type", scaling.get("rope_type", "dynamic")) != "dynamic":
        raise refusal(file, "rope_scaling", scaling, expected=({"type": "dynamic"},))


def _sparing_norm(rule: Rule) -> Rule:
    """The norm behind the tower is never computed: the authors' fine-tuning takes it out, trained stages lack it."""
    return replace(rule, optional=True) if rule.ours == ("vision.trunk.norm.{p}",) else rule


def _vision(config: Mapping[str, Any]) -> dict[str, Any]:
    return _VISION | (config.get("vision") or {})


def _partial(config: Mapping[str, Any]) -> dict[str, Any]:
    return _PARTIAL | (config.get("partial_lora") or {})


def _settings(module: Any) -> dict[str, Any]:
    """Of the partial LoRA of a system of ours.

    Raises:
        UserError: it has none, or another than the published code can have.
    """
    found = [operation for operation in module.surgery if isinstance(operation, PartialLoRA)]
    if len(found) != 1 or found[0].targets != PartialLoRA(1).targets:
        raise UserError(
            "the published code has partial LoRA on all linear layers of the language model's blocks; use the artefact "
            "itself"
        )
    return {"rank": found[0].rank, "scale": found[0].scale, "dropout": found[0].dropout}
