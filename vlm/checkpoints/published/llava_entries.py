"""What is known of the entries of LLaVA's `config.json` and of those of its kin, in each layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.checkpoints.published.entries import Entries, refusal
from vlm.checkpoints.published.language_entries import language_entries
from vlm.errors import UserError

_TRAINED = frozenset(
    {
        # what was trained, at which rate and from where: the tensors are what came of it
        *("freeze_backbone", "freeze_mm_mlp_adapter", "tune_mm_mlp_adapter", "tune_mm_vision_resampler"),
        *("freeze_mm_vision_resampler", "unfreeze_mm_vision_tower", "tune_mm_vision_tower", "mm_tunable_parts"),
        *("mm_projector_lr", "mm_vision_tower_lr", "pretrain_mm_mlp_adapter", "optimize_vision_tower"),
        *("optimize_vision_tower_aux", "tune_language_model", "tune_mm_projector", "tune_vision_tower"),
        *("resume_path", "model_dtype", "drop_path", "fp16", "bf16"),
    }
)
_OFFICIAL_HARMLESS = _TRAINED | {
    *("use_mm_proj", "with_projector"),  # there is a projector, as the tensors say
    *("mm_hidden_size", "mm_hidden_size_aux"),  # widths, as the tensors say
    "mm_use_im_patch_token",  # adds a token to the vocabulary that no code looks for; the tokenizer's files have it
    *("image_crop_resolution", "image_split_resolution"),  # left over: nothing in the published code reads them
    *("tokenizer_padding_side", "image_token_len"),
    "num_video_frames",  # of films; an image is one
    *("s2_scales", "s2_max_split_size", "s2_resize_output_to_scale_idx", "interpolate_mode"),  # only with `s2`, below
    *("llm_cfg", "mm_projector_cfg", "vision_tower_cfg"),  # copies of the files in the folders
}
_OFFICIAL_READ = frozenset(
    {
        *("mm_vision_tower", "mm_vision_select_layer", "mm_vision_select_feature", "mm_projector_type"),
        *("mm_use_im_start_end", "mm_patch_merge_type", "image_aspect_ratio", "image_grid_pinpoints"),
        *("mm_vision_tower_aux", "image_size_aux", "image_grid", "image_global", "tokenizer_model_max_length"),
    }
)
_OFFICIAL_ONLY: dict[str, tuple[Any, ...]] = {
    "mm_resampler_type": (False,),
    "sep_image_conv_front": (False,),
    "s2": (False,),
    "drop_path_rate": (0.0,),
    "vision_resolution": (-1,),
    "quantization_config": ({},),
}
_HF_READ = frozenset(
    {
        *("text_config", "vision_config", "image_token_index", "image_token_id", "vision_feature_layer"),
        *("vision_feature_select_strategy", "image_grid_pinpoints", "tie_word_embeddings"),
    }
)
_HF_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("llava", "llava_next"),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "quantization_config": ({},),
}
_HF_HARMLESS = frozenset({"image_seq_length", "vocab_size", "use_image_newline_parameter"})  # sizes say the same
_CLIP_READ = frozenset(
    {
        *("hidden_act", "hidden_size", "image_size", "intermediate_size", "layer_norm_eps", "num_attention_heads"),
        *("num_hidden_layers", "patch_size"),
    }
)
_CLIP_ONLY: dict[str, tuple[Any, ...]] = {
    "num_channels": (3,),
    "attention_dropout": (0.0,),
    "dropout": (0.0,),
    "model_type": ("clip_vision_model", "clip"),
    "quantization_config": ({},),
}
_CLIP_HARMLESS = frozenset({"projection_dim", "vocab_size"})  # of the text side
_OWN_KINDS = {"mistral": "mistral", "mixtral": "mixtral", "gemma": "gemma"}
_STRATEGIES = {"default": False, "full": True}
_FEATURES = {"patch": False, "cls_patch": True}
_VIEWS = {"pad": "pad", "square": "crop", "resize": "squash"}
OPENAI_CLIP = ("clip-vit-base-patch16", "clip-vit-base-patch32", "clip-vit-large-patch14", "clip-vit-large-patch14-336")
"""Towers whose activation and number of heads are known without their files, by the last part of their name."""


def check_official(content: Mapping[str, Any], file: Path, *, kind: str) -> None:
    """Refuses what an official `config.json` says and the system would not do.

    Args:
        kind: of the language model.
    """
    read = _OFFICIAL_READ | language_entries(kind)
    Entries(read, _OFFICIAL_ONLY, _OFFICIAL_HARMLESS).check(content, file)


def check_hub(content: Mapping[str, Any], file: Path) -> None:
    """The same for one of transformers' LLaVA classes."""
    from transformers import LlavaConfig, LlavaNextConfig

    known = {*LlavaConfig.__dataclass_fields__, *LlavaNextConfig.__dataclass_fields__} | _HF_ONLY.keys()
    Entries(_HF_READ, _HF_ONLY, _HF_HARMLESS, of=known).check(content, file)


def check_clip(content: Mapping[str, Any], file: str | Path) -> None:
    """The same for a CLIP vision tower."""
    from transformers import CLIPVisionConfig

    known = {*CLIPVisionConfig.__dataclass_fields__} | _CLIP_ONLY.keys()
    Entries(_CLIP_READ, _CLIP_ONLY, _CLIP_HARMLESS, of=known).check(content, file)


def kind_of_official(content: Mapping[str, Any], file: Path) -> str:
    """`model_type` of the language model in an official file, whose own one names the whole."""
    stated = str(content.get("model_type", "llava"))
    family, _, suffix = stated.rpartition("_")
    if family and suffix in _OWN_KINDS:
        return suffix
    if stated in ("llava", "llava_llama", "llama", "mgm", "mini_gemini"):
        return "llama"
    expected = ("llava", *(f"llava_{kind}" for kind in ("llama", *_OWN_KINDS)), "mgm")
    raise refusal(file, "model_type", stated, expected=expected)


def has_class_token(content: Mapping[str, Any], file: Path) -> bool:
    """Whether the tower's class token is a feature too, by either layout's entry."""
    for key, meanings in (("vision_feature_select_strategy", _STRATEGIES), ("mm_vision_select_feature", _FEATURES)):
        value = content.get(key)
        if value is not None:
            if value not in meanings:
                raise refusal(file, key, value, expected=list(meanings))
            return meanings[value]
    return False


def official_view(content: Mapping[str, Any], file: Path) -> str:
    """How an image becomes a square view: the word of `image_aspect_ratio` in ours; without one, CLIP's processor."""
    word = content.get("image_aspect_ratio") or "square"
    if word == "anyres":
        return "pad"  # of the square that boxes are counted from; the views are the tiles
    if word not in _VIEWS:
        raise refusal(file, "image_aspect_ratio", word, expected=[*_VIEWS, "anyres"])
    return _VIEWS[word]


def check_known_tower(name: str | None, file: Path) -> None:
    """Refuses a tower whose tensors are at hand, but not the file that says its activation and number of heads.

    Raises:
        UserError: it is none of OpenAI's.
    """
    if name is None or Path(name).name in OPENAI_CLIP:
        return
    raise UserError(
        f"{file}: mm_vision_tower is {name!r}, whose config.json is not at hand and says what the tensors do not "
        f"(activation, heads); put that folder there, or name it with --vision"
    )


def refuse_class_token(system: str, file: Path) -> None:
    """Refuses a class token among features that have to be a square map."""
    raise UserError(
        f"{file}: the class token is a feature too (cls_patch, full), and the features of {system} are a square "
        "map here; such weights cannot be opened"
    )
