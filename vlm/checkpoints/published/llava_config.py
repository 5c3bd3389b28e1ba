"""`config.json` of LLaVA: what the official and the Hugging Face files say, as one neutral description, and back."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm.checkpoints.tables.llava import Connector, Layout
from vlm.checkpoints.tables.mini_gemini import LANGUAGE_DEFAULTS
from vlm.errors import UserError

_LLAMA = {  # values a config.json leaves out when they are these (hub files do)
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_CLIP = {
    "hidden_act": "quick_gelu",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-5,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
_CLIP_HEAD_DIM = 64
"""Width of a head in every CLIP of OpenAI; used only when no config states the number of heads."""
_TOWERS = {(1024, 336): "openai/clip-vit-large-patch14-336", (1024, 224): "openai/clip-vit-large-patch14"}
_TIMM = "vit_large_patch14_clip_quickgelu_336"
"""The timm architecture; sizes other than its own go into its options."""


@dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA as its published files describe it.

    Attributes:
        connector: kind of projector.
        language: fields of the Llama config; `vocab_size` is our vocabulary.
        vision: fields of the CLIP vision config; None when neither tower nor config is there.
        vision_layer: hidden state the features are taken from, counted from the end: -2 is before the last block.
        tower: hub id or folder of the tower, where the source names one.
        layout: name of the layout it was read from.
        originals: the `config.json` of each layout that was read on the way, so that it is written back unchanged.
    """

    connector: Connector
    language: dict[str, Any]
    vision: dict[str, Any] | None
    vision_layer: int
    tower: str | None
    layout: str
    originals: dict[str, dict] = field(default_factory=dict)
    marks: tuple[int, int] | None = None
    """Ids of `<image>` and `<pad>` in Hugging Face files; None: the first two rows above the vocabulary."""
    pinpoints: list[list[int]] | None = None
    """(width, height) in pixels of the canvases of LLaVA-NeXT's tiles; None: one view per picture."""
    high: dict[str, Any] | None = None
    """`init_args` of the second tower of Mini-Gemini."""
    grid: int = 1
    """Parts per side of its low-resolution view; with more than 1, `whole` says if the whole is seen too."""
    whole: bool = False

    @property
    def vocab_rows(self) -> int:
        return self.language["vocab_size"]

    @property
    def tied(self) -> bool:
        return bool(self.language.get("tie_word_embeddings"))

    @property
    def num_blocks(self) -> int:
        """Tower blocks that are computed."""
        return self.vision["num_hidden_layers"] + 1 + self.vision_layer if self.vision else 0

    @property
    def num_experts(self) -> int:
        """In each layer of a Mixtral; 0 in other language models."""
        return self.language.get("num_local_experts", 0)

    def model_parts(self, *, has_tower: bool) -> dict[str, Any]:
        """`init_args` of the system's class, but for its template.

        Args:
            has_tower: the checkpoint holds the tower's tensors; else they are read from where its config says.
        """
        tower: dict[str, Any] = {
            "name": _TIMM,
            "layer": self.vision_layer,
            "weights": None if has_tower else self.tower,
        }
        if self.vision is not None:
            tower["options"] = {
                "img_size": self.vision["image_size"],
                "patch_size": self.vision["patch_size"],
                "embed_dim": self.vision["hidden_size"],
                "depth": self.vision["num_hidden_layers"],
                "num_heads": self.vision["num_attention_heads"],
                "mlp_ratio": self.vision["intermediate_size"] / self.vision["hidden_size"],
            }
        connector = {"linear": "Linear", "mlp2x_gelu": "MLP", "mlp_downsample": "Downsample"}[self.connector]
        layers = {"depth": 2, "norm": True} if self.connector == "mlp_downsample" else {}
        tiles: dict[str, Any] = {}
        if self.pinpoints is not None:
            side = self.vision["image_size"] if self.vision else 336
            tiles["grids"] = [[width // side, height // side] for width, height in self.pinpoints]
        if self.high is not None:
            tiles["vision_high"] = {"class_path": "vlm.vision.ConvNeXtPyramid", "init_args": dict(self.high)}
            tiles |= {"grid": self.grid, "whole": self.whole}
            tiles["scale_features"] = self.language.get("model_type") == "gemma"
        return {
            "vision": {"class_path": "vlm.vision.TimmTower", "init_args": tower},
            "connector": {"class_path": f"vlm.connectors.{connector}", "init_args": layers},
            "language": {
                "class_path": "vlm.language.CausalLM",
                "init_args": {"config": {"model_type": "llama", **self.language}},
            },
            "tokenizer": {"class_path": "vlm.prompts.LlamaTokenizer", "init_args": {"path": "."}},
            "max_tokens": self.language["max_position_embeddings"],
            **tiles,
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_config(folder: Path, layout: Layout, *, connector: Connector) -> LlavaConfig:
    """The description in a folder's `config.json`.

    Raises:
        UserError: the file is missing or of something else.
    """
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing; it says the number of heads, which the tensors do not") from error
    except ValueError as error:
        raise UserError(f"{file}: is not readable JSON ({error})") from error
    text = content.get("text_config") or {} if layout.is_hf else content
    defaults = _LLAMA | LANGUAGE_DEFAULTS.get(text.get("model_type", "").rpartition("_")[2], {})
    known = (*defaults, "vocab_size", "num_key_value_heads")
    language = {**defaults, **{key: text[key] for key in known if key in text and key != "model_type"}}
    if text.get("hidden_activation"):  # of Gemma: it came later and counts
        language["hidden_act"] = text["hidden_activation"]
    language.setdefault("num_key_value_heads", language["num_attention_heads"])
    language |= _rope(text.get("rope_parameters"))
    if text.get("sliding_window") and "mistral" in text.get("model_type", ""):  # without a window it computes as Llama
        language |= {"model_type": "mistral", "sliding_window": text["sliding_window"]}
    if layout.is_hf:
        language["tie_word_embeddings"] |= bool(content.get("tie_word_embeddings"))
        language["vocab_size"] = content.get("image_token_index", content.get("image_token_id", 32000))
        if not isinstance(content.get("vision_config"), dict):
            raise UserError(f"{file}: has no vision_config; is it the config.json of these weights?")
        vision = {**_CLIP, **{key: content["vision_config"][key] for key in _CLIP if key in content["vision_config"]}}
        layer = content.get("vision_feature_layer", -2)
        if not isinstance(layer, int):
            raise UserError(f"{file}: vision_feature_layer {layer}: features of several layers are no LLaVA of ours")
        tower = _TOWERS.get((vision["hidden_size"], vision["image_size"]))
        # Hugging Face counts height first
        pinpoints = [[width, height] for height, width in content.get("image_grid_pinpoints", [])] or None
        return LlavaConfig(connector, language, vision, layer, tower, layout.name, {"hf": content}, pinpoints=pinpoints)
    if "vocab_size" not in language:
        raise UserError(f"{file}: has no vocab_size; is it the config.json of these weights?")
    layer = content.get("mm_vision_select_layer", -2)
    tower = content.get("mm_vision_tower")
    pinpoints = None
    if content.get("image_aspect_ratio") == "anyres":
        pinpoints = content.get("image_grid_pinpoints")
        if content.get("mm_patch_merge_type") != "spatial_unpad" or not pinpoints or isinstance(pinpoints, str):
            raise UserError(
                f"{file}: image_aspect_ratio is anyres, so mm_patch_merge_type must be spatial_unpad and "
                "image_grid_pinpoints a list of [width, height]"
            )
    found = LlavaConfig(
        connector, language, None, layer, tower, layout.name, {"official": content}, pinpoints=pinpoints
    )
    if "mm_vision_tower_aux" not in content:
        return found
    grid = content.get("image_grid", 1)
    return replace(found, grid=grid, whole=grid > 1 and bool(content.get("image_global")))


def with_tower(config: LlavaConfig, shapes: Mapping[str, tuple[int, ...]], tower_folder: Path | None) -> LlavaConfig:
    """Adds what the tower's tensors (published names after `embeddings`, `encoder`) and its own config.json say."""
    stated = json.loads((tower_folder / "config.json").read_text()) if tower_folder else {}
    stated = stated.get("vision_config", stated)
    width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
    num_patches = shapes["embeddings.position_embedding.weight"][0] - 1
    vision = {
        **_CLIP,
        "num_attention_heads": max(1, width // _CLIP_HEAD_DIM),
        **{key: stated[key] for key in _CLIP if key in stated},
        "hidden_size": width,
        "image_size": patch * round(num_patches**0.5),
        "patch_size": patch,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.layers.")),
    }
    return replace(config, vision=vision, tower=config.tower or _TOWERS.get((width, vision["image_size"])))


def check_config(config: LlavaConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compares the description with the tensors (our names).

    Raises:
        UserError: they belong to different models.
    """
    layers = {int(name.split(".")[3]) for name in shapes if name.startswith("language.model.layers.")}
    found = {
        "vocab_size": shapes["language.model.embed_tokens.weight"][0],
        "hidden_size": shapes["language.model.embed_tokens.weight"][1],
        "intermediate_size": _mlp_width(shapes),
        "num_hidden_layers": len(layers),
    }
    for key, value in found.items():
        if config.language[key] != value:
            raise UserError(f"{where}: config.json says {key} {config.language[key]}, the tensors say {value}")


def _mlp_width(shapes: Mapping[str, tuple[int, ...]]) -> int:
    dense, sparse = (f"language.model.layers.0.mlp.{name}" for name in ("gate_proj.weight", "experts.down_proj"))
    return shapes[dense][0] if dense in shapes else shapes[sparse][2]


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
        "image_seq_length": side * side,
        "image_token_index": image_id,
        "multimodal_projector_bias": True,
        "pad_token_id": pad_id,
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "llama", **config.language, "vocab_size": padded, "torch_dtype": dtype},
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype,
        "vision_config": config.vision,
        "vision_feature_layer": config.vision_layer,
        "vision_feature_select_strategy": "default",
    }


def _official(config: LlavaConfig, dtype: str) -> dict[str, Any]:
    return {
        **config.language,
        "architectures": ["LlavaLlamaForCausalLM"],
        "image_aspect_ratio": "square" if config.connector == "linear" else "pad",
        **_tiles(config),
        "mm_hidden_size": config.vision["hidden_size"] if config.vision else _CLIP["hidden_size"],
        "mm_projector_type": config.connector,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.vision_layer,
        "mm_vision_tower": config.tower,
        "model_type": "llava_llama",
        "torch_dtype": dtype,
        "use_mm_proj": True,
    }


def _tiles(config: LlavaConfig) -> dict[str, Any]:
    if config.pinpoints is None:
        return {}
    return {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": config.pinpoints,
        "mm_patch_merge_type": "spatial_unpad",
        "unfreeze_mm_vision_tower": True,
    }


def _rope(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields of transformers 4 for the `rope_parameters` of transformers 5, which official code does not know."""
    if parameters is None:
        return {}
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": None if plain else scaling}
