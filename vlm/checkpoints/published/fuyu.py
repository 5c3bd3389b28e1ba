"""Fuyu-8B: the published names, which transformers saves and opens, and those that its class has in memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from vlm.checkpoints.published.entries import BOOKKEEPING, Entries, read_json, refusal
from vlm.checkpoints.published.one_folder import OneFolderFamily
from vlm.checkpoints.tables.rules import rename
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError
from vlm.prompts.fuyu import SPEAKER
from vlm.vision.patches import Patches

_TEXT: dict[str, Any] = {
    "vocab_size": 262144,
    "max_position_embeddings": 16384,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "hidden_act": "relu2",
    "layer_norm_eps": 1e-5,
    "qk_layernorm": True,
    "tie_word_embeddings": False,
}
"""What a config.json leaves out when it is this."""
_ROPE = {"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5}
_READ = frozenset({"text_config", "patch_size", "image_token_id"})
_HARMLESS = frozenset({"image_size", "tie_word_embeddings"})  # neither is looked at: an image has its own size
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("fuyu",),
    "num_channels": (3,),
    "rope_scaling": ({},),
    "quantization_config": ({},),
}
_PIXELS: dict[str, tuple[Any, ...]] = {
    "image_mean": (0.5, [0.5, 0.5, 0.5]),
    "image_std": (0.5, [0.5, 0.5, 0.5]),
    "padding_value": (1.0,),
    "padding_mode": ("constant",),
    "resample": (2,),
    "rescale_factor": (1 / 255,),
    **dict.fromkeys(("do_resize", "do_pad", "do_normalize", "do_rescale"), (True,)),
}
_PIXELS_READ = frozenset({"size", "patch_size"})
_PIXELS_HARMLESS = frozenset(
    {"image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "data_format", "backend"}
)
_PREFIXES = {  # before the decoder's own names, the head's, and the projection's
    "official": ("language_model.model.", "language_model.", ""),
    "hf": ("model.language_model.", "", "model."),
}


class FuyuFamily(OneFolderFamily):
    system = "fuyu"
    marks: ClassVar = {
        "official": "language_model.model.final_layernorm.weight",
        "hf": "model.vision_embed_tokens.weight",
    }
    hub_class = "FuyuForCausalLM"
    files = (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
    )

    def is_own(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type", "fuyu") == "fuyu"

    def table(self, layout: str, config: Mapping[str, Any]) -> Table:
        decoder, head, own = _PREFIXES[layout]
        return Table(
            layout=f"Fuyu {layout}",
            rules=(
                *(rename(f"{own}vision_embed_tokens.{kind}", f"connector.{kind}") for kind in ("weight", "bias")),
                rename(head + "lm_head.weight", "language.lm_head.weight"),
                rename(decoder + "layers.{i}.self_attn.rotary_emb.inv_freq", None),
                rename(decoder + "embed_tokens.weight", "language.model.embed_tokens.weight"),
                rename(decoder + "layers.{i}.{rest}", "language.model.layers.{i}.{rest}"),
                rename(decoder + "final_layernorm.{p}", "language.model.final_layernorm.{p}"),
            ),
        )

    def describe_folder(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        from transformers import FuyuConfig, PersimmonConfig

        file = folder / "config.json"
        persimmon = frozenset(PersimmonConfig.__dataclass_fields__) | {*_ROPE, "rope_scaling"}
        known = frozenset(FuyuConfig.__dataclass_fields__) | persimmon | _ONLY.keys()
        stated = config.get("text_config") or config
        Entries(_READ | persimmon, _ONLY, _HARMLESS, of=known).check(config, file)
        Entries(persimmon, {**_ONLY, "model_type": ("persimmon", "fuyu")}, _HARMLESS | _READ, of=known).check(
            stated, file
        )
        own = (persimmon - BOOKKEEPING).intersection(stated) - {*_ROPE, "rope_scaling", "rope_parameters"}
        text = _TEXT | {key: stated[key] for key in own}
        rope = dict(stated.get("rope_parameters") or {})
        rope |= {key: stated[key] for key in ("rope_theta", "partial_rotary_factor") if key in stated}
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder}: has no tokenizer.json; put the tokenizer's files beside")
        side = config.get("patch_size", 30)
        patches = {"side": side, **_limits(folder, side=side)}
        return {
            "class_path": "vlm.systems.Fuyu",
            "init_args": {
                "patches": {"class_path": "vlm.vision.Patches", "init_args": patches},
                "language": {
                    "class_path": "vlm.language.CausalLM",
                    "init_args": {"config": {"model_type": "persimmon", **text, "rope_parameters": _ROPE | rope}},
                },
                "tokenizer": {"class_path": "vlm.prompts.FuyuTokenizer", "init_args": {"path": str(folder)}},
                "template": "fuyu",
                "max_tokens": text["max_position_embeddings"],
            },
        }

    def config(self, module: Any, layout: str) -> dict[str, Any]:
        language = module.language.config
        text = {key: getattr(language, key) for key in _TEXT}
        return {
            "architectures": ["FuyuForCausalLM"],
            "model_type": "fuyu",
            "image_token_id": module.codec.tokenizer.token_id(SPEAKER),
            "num_channels": 3,
            "patch_size": module.patches.side,
            "text_config": {"model_type": "persimmon", **text, "rope_parameters": dict(language.rope_parameters)},
            "tie_word_embeddings": False,
            "torch_dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
        }

    def memory_table(self, module: Any) -> tuple[Table, Mapping[str, Tensor]]:
        return self.table("hf", self.config(module, "hf")), {}

    def write_files(self, folder: Path, module: Any) -> None:
        super().write_files(folder, module)
        _write_processor(folder, module.patches)


def _limits(folder: Path, *, side: int) -> dict[str, int]:
    """Of an image's size, as the image processor's file says.

    Raises:
        UserError: it makes other pixels than ours.
    """
    file = folder / "preprocessor_config.json"
    content = read_json(file) or {}
    Entries(_PIXELS_READ, _PIXELS, _PIXELS_HARMLESS).check(content, file)
    square = {"height": side, "width": side}
    if content.get("patch_size", square) != square:
        raise refusal(file, "patch_size", content["patch_size"], expected=(square,))
    size = content.get("size") or {}
    return {f"max_{name}": size[name] for name in ("width", "height") if name in size}


def _write_processor(folder: Path, patches: Patches) -> None:
    """What `FuyuProcessor.from_pretrained` reads beside the tokenizer."""
    content = {
        "image_processor_type": "FuyuImageProcessor",
        "processor_class": "FuyuProcessor",
        "patch_size": {"height": patches.side, "width": patches.side},
        "size": {"height": patches.max_height, "width": patches.max_width},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "FuyuProcessor"}, indent=2) + "\n", encoding="utf-8"
    )
