"""`config.json` of LLaVA, written for the official code or for Hugging Face's tools."""

import json
from pathlib import Path
from typing import Any

from vlm.checkpoints.published.llava_config import CLIP, NORM_EPS, LlavaConfig
from vlm.checkpoints.tables.llava import Layout
from vlm.errors import UserError

_OFFICIAL_KINDS = ("llama", "mistral")


def write_config(folder: Path, config: LlavaConfig, layout: Layout, *, dtype: str) -> None:
    """Writes `config.json` of an official or Hugging Face folder: the one that was read, where there was one."""
    kind = "hf" if layout.is_hf else layout.name
    content = config.originals.get(kind) or (_hf if layout.is_hf else _official)(config, dtype)
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def _hf(config: LlavaConfig, dtype: str) -> dict[str, Any]:
    assert config.vision is not None
    side = config.vision["image_size"] // config.vision["patch_size"]
    padded = -(-(config.vocab_rows + 2) // 64) * 64
    image_id, pad_id = config.marks or (config.vocab_rows, config.vocab_rows + 1)
    kind: dict[str, Any] = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    if config.pinpoints is not None:
        kind = {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "image_grid_pinpoints": [[height, width] for width, height in config.pinpoints],
            "model_type": "llava_next",
            "use_image_newline_parameter": True,
        }
    return {
        **kind,
        "image_seq_length": side * side + config.class_token,
        "image_token_index": image_id,
        "multimodal_projector_bias": True,
        "pad_token_id": pad_id,
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "llama", **config.language, "vocab_size": padded, "torch_dtype": dtype},
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype,
        "vision_config": config.vision,
        "vision_feature_layer": config.vision_layer,
        "vision_feature_select_strategy": "full" if config.class_token else "default",
    }


def _official(config: LlavaConfig, dtype: str) -> dict[str, Any]:
    kind = config.language.get("model_type", "llama")
    if kind not in _OFFICIAL_KINDS:
        raise UserError(
            f"the official code has no LLaVA over a language model of the kind {kind!r}, only over "
            f"{' and '.join(_OFFICIAL_KINDS)}; use --to hf or --to ours"
        )
    vision = config.vision or CLIP
    if (vision["hidden_act"], vision["layer_norm_eps"]) != (CLIP["hidden_act"], NORM_EPS):
        raise UserError(
            f"the official layout says nothing about a tower's hidden_act {vision['hidden_act']!r} and layer_norm_eps "
            f"{vision['layer_norm_eps']}, and its code takes them from OpenAI's CLIP; use --to hf or --to ours"
        )
    return {
        **config.language,
        "architectures": [f"Llava{kind.capitalize()}ForCausalLM"],
        "image_aspect_ratio": _aspect_ratio(config),
        **_tiles(config),
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": config.connector,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "cls_patch" if config.class_token else "patch",
        "mm_vision_select_layer": config.vision_layer,
        "mm_vision_tower": config.tower,
        "model_type": f"llava_{kind}",
        "torch_dtype": dtype,
        "use_mm_proj": True,
    }


def _aspect_ratio(config: LlavaConfig) -> str:
    known = {"pad": "pad", "crop": "square", None: "square" if config.connector == "linear" else "pad"}
    if config.image not in known:
        raise UserError(
            f"the official LLaVA pads its images or crops them; a model that is shown them otherwise ({config.image}) "
            "cannot be written for it; use --to hf or --to ours"
        )
    return known[config.image]


def _tiles(config: LlavaConfig) -> dict[str, Any]:
    if config.pinpoints is None:
        return {}
    return {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": config.pinpoints,
        "mm_patch_merge_type": "spatial_unpad",
        "unfreeze_mm_vision_tower": True,
    }
