"""`config.json` of LLaVA: what the official and the Hugging Face files say, as one neutral description."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm.checkpoints.published.entries import read_config_json, refusal
from vlm.checkpoints.published.language_entries import HEAD_OF_HUB, language_entries, read_language
from vlm.checkpoints.published.llava_entries import (
    check_clip,
    check_hub,
    check_official,
    has_class_token,
    kind_of_official,
    official_view,
)
from vlm.checkpoints.published.preprocessor import check_pixels, read_view
from vlm.checkpoints.tables.llava import Connector, Layout, mlp_depth
from vlm.errors import UserError

CLIP: dict[str, Any] = {
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
_TIMM = {"quick_gelu": "vit_large_patch14_clip_quickgelu_336", "gelu": "vit_large_patch14_clip_336"}
"""The timm architectures by activation; sizes other than their own go into their options."""
NORM_EPS = 1e-5  # theirs


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
    """(width, height) in pixels of the canvases of LLaVA-NeXT's tiles; None: one view per image."""
    high: dict[str, Any] | None = None
    """`init_args` of the second tower of Mini-Gemini."""
    grid: int = 1
    """Parts per side of its low-resolution view; with more than 1, `whole` says if the whole is seen too."""
    whole: bool = False
    class_token: bool = False
    """The tower's class token is the first feature."""
    image: str | None = None
    """How an image becomes a square view, where the files say it."""

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
            "name": _TIMM[(self.vision or CLIP)["hidden_act"]],
            "layer": self.vision_layer,
            "weights": None if has_tower else self.tower,
        }
        if self.class_token:
            tower["class_token"] = True
        if self.vision is not None:
            if self.vision["layer_norm_eps"] != NORM_EPS:
                tower["norm_eps"] = self.vision["layer_norm_eps"]
            tower["options"] = {
                "img_size": self.vision["image_size"],
                "patch_size": self.vision["patch_size"],
                "embed_dim": self.vision["hidden_size"],
                "depth": self.vision["num_hidden_layers"],
                "num_heads": self.vision["num_attention_heads"],
                "mlp_ratio": self.vision["intermediate_size"] / self.vision["hidden_size"],
            }
        depth = mlp_depth(self.connector)
        connector = {"linear": "Linear", "mlp_downsample": "Downsample"}.get(self.connector, "MLP")
        layers: dict[str, Any] = {"depth": depth} if depth > 2 else {}
        if connector == "Downsample":
            layers = {"depth": 2, "norm": True}
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
            "max_tokens": min(
                self.language["max_position_embeddings"],
                self.originals.get("official", {}).get("tokenizer_model_max_length") or sys.maxsize,
            ),
            **tiles,
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_config(folder: Path, layout: Layout, *, connector: Connector, is_language_alone: bool = False) -> LlavaConfig:
    """The description in a folder's `config.json`.

    Args:
        is_language_alone: the file is that of the language model, and others say the rest (VILA-1.5).

    Raises:
        UserError: the file is missing, of something else, or says what no system here does.
    """
    content, file = read_config_json(folder), folder / "config.json"
    if is_language_alone:
        language = read_language(content, file, kind=content.get("model_type", "llama"))
        return LlavaConfig(connector, language, None, -2, None, layout.name, {"official": content})
    return (_read_hub if layout.is_hf else _read_official)(content, file, layout, connector)


def _read_hub(content: Mapping[str, Any], file: Path, layout: Layout, connector: Connector) -> LlavaConfig:
    check_hub(content, file)
    text = content.get("text_config") or {}
    kind = text.get("model_type", "llama")
    language = read_language(text, file, kind=kind)
    language |= {key: value for key, value in HEAD_OF_HUB.items() if key in language_entries(kind)}
    language["tie_word_embeddings"] = bool(language.get("tie_word_embeddings") or content.get("tie_word_embeddings"))
    language["vocab_size"] = content.get("image_token_index", content.get("image_token_id", 32000))
    if not isinstance(content.get("vision_config"), dict):
        raise UserError(f"{file}: has no vision_config; is it the config.json of these weights?")
    vision = CLIP | _stated_tower(content["vision_config"], file)
    layer = content.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise UserError(f"{file}: vision_feature_layer {layer}: features of several layers are no LLaVA of ours")
    # Hugging Face counts height first
    pinpoints = [[width, height] for height, width in content.get("image_grid_pinpoints", [])] or None
    return LlavaConfig(
        connector,
        language,
        vision,
        _from_the_end(layer, vision["num_hidden_layers"]),
        _TOWERS.get((vision["hidden_size"], vision["image_size"])),
        layout.name,
        {"hf": dict(content)},
        pinpoints=pinpoints,
        class_token=has_class_token(content, file),
        image=read_view(file.parent, side=vision["image_size"], pinpoints=content.get("image_grid_pinpoints")),
    )


def _read_official(content: Mapping[str, Any], file: Path, layout: Layout, connector: Connector) -> LlavaConfig:
    kind = kind_of_official(content, file)
    check_official(content, file, kind=kind)
    language = read_language(content, file, kind=kind)
    if "vocab_size" not in language:
        raise UserError(f"{file}: has no vocab_size; is it the config.json of these weights?")
    if (stated := content.get("mm_projector_type", connector)) != connector:
        raise refusal(file, "mm_projector_type", stated, expected=(connector,))
    pinpoints = None
    if content.get("image_aspect_ratio") == "anyres":
        pinpoints = content.get("image_grid_pinpoints")
        if content.get("mm_patch_merge_type") != "spatial_unpad" or not pinpoints or isinstance(pinpoints, str):
            raise UserError(
                f"{file}: image_aspect_ratio is anyres, so mm_patch_merge_type must be spatial_unpad and "
                "image_grid_pinpoints a list of [width, height]"
            )
    grid = content.get("image_grid", 1) if "mm_vision_tower_aux" in content else 1
    return LlavaConfig(
        connector,
        language,
        None,
        content.get("mm_vision_select_layer", -2),
        content.get("mm_vision_tower"),
        layout.name,
        {"official": dict(content)},
        pinpoints=pinpoints,
        grid=grid,
        whole=grid > 1 and bool(content.get("image_global")),
        class_token=has_class_token(content, file),
        image=official_view(content, file),
    )


def _stated_tower(stated: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What a CLIP's own settings say about its vision tower."""
    check_clip(stated, file)
    found = {key: stated[key] for key in CLIP if key in stated}
    if found.get("hidden_act", "gelu") not in _TIMM:
        raise refusal(file, "hidden_act (of the vision tower)", found["hidden_act"], expected=list(_TIMM))
    return found


def _from_the_end(layer: int, num_blocks: int) -> int:
    """A hidden state's place counted from the last one, -1; 0 is what goes into the first block."""
    return layer if layer < 0 else layer - num_blocks - 1


def with_tower(config: LlavaConfig, shapes: Mapping[str, tuple[int, ...]], tower_folder: Path | None) -> LlavaConfig:
    """Adds what the tower's tensors (published names after `embeddings`, `encoder`) and its own config.json say."""
    stated: Mapping[str, Any] = {}
    if tower_folder is not None:
        content = read_config_json(tower_folder)
        stated = _stated_tower(content.get("vision_config") or content, tower_folder / "config.json")
        check_pixels(tower_folder)
    width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
    num_patches = shapes["embeddings.position_embedding.weight"][0] - 1
    vision = {
        **CLIP,
        "num_attention_heads": max(1, width // _CLIP_HEAD_DIM),
        **stated,
        "hidden_size": width,
        "image_size": patch * round(num_patches**0.5),
        "patch_size": patch,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.layers.")),
    }
    layer = _from_the_end(config.vision_layer, vision["num_hidden_layers"])
    tower = config.tower or _TOWERS.get((width, vision["image_size"]))
    return replace(config, vision=vision, vision_layer=layer, tower=tower)


def check_config(config: LlavaConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compares the description with the tensors (our names).

    Raises:
        UserError: they belong to different models.
    """
    layers = {int(name.split(".")[3]) for name in shapes if name.startswith("language.model.layers.")}
    found = {
        "vocab_size": shapes["language.model.embed_tokens.weight"][0],
        "hidden_size": shapes["language.model.embed_tokens.weight"][1],
        "num_hidden_layers": len(layers),
        **_mlp_width(shapes),
    }
    for key, value in found.items():
        if config.language[key] != value:
            raise UserError(f"{where}: config.json says {key} {config.language[key]}, the tensors say {value}")


def _mlp_width(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    mlp = "language.model.layers.0.mlp."
    for name, axis, parts in (("gate_proj.weight", 0, 1), ("experts.down_proj", 2, 1), ("gate_up_proj.weight", 0, 2)):
        if mlp + name in shapes:
            return {"intermediate_size": shapes[mlp + name][axis] // parts}
    return {}
