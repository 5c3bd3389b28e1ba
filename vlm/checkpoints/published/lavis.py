"""What published files of BLIP-2 and its descendants share: EVA-CLIP-g, the Q-Former, files of trained tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.checkpoints.published.entries import Entries
from vlm.checkpoints.published.family import Stream
from vlm.checkpoints.published.lavis_processor import image_id, num_rows
from vlm.checkpoints.published.one_folder import OpenedFolder
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError

EVA = "eva_giant_patch14_clip_224"
LAVIS_T5 = {"dense_act_fn": "gelu"}
"""What LAVIS changes of FlanT5: its own file says `gelu_new`."""
BERT_READ = {
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "max_position_embeddings": "max_positions",
    "hidden_dropout_prob": "dropout",
    "layer_norm_eps": "norm_eps",
    "cross_attention_frequency": "cross_attention_every",
    "vocab_size": "vocab_size",
}
"""Entries of `qformer_config`, and ours."""
_VISION_READ = frozenset(
    {"hidden_size", "image_size", "intermediate_size", "layer_norm_eps", "num_attention_heads", "num_hidden_layers"}
    | {"patch_size"}
)
_VISION_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "qkv_bias": (True,),
    "num_channels": (3,),
    **dict.fromkeys(("attention_dropout", "dropout", "drop_path_rate"), (0.0,)),
}
_VISION_HARMLESS = frozenset({"projection_dim"})


# -- files of trained tensors


def check_parts(
    path: str | Path, *, layout: str, target: str, vision: str | Path | None, base: str | Path | None, language: str
) -> None:
    """Of a file that holds what was trained alone.

    Args:
        language: what lies at `base`, for people.

    Raises:
        UserError: it is asked for as something else, or nobody says where the rest lies.
    """
    if layout not in ("auto", "official"):
        raise UserError(f"{path}: is in the official layout, not in {layout!r}")
    if target == "hf":
        raise UserError(f"{path}: holds no tower and no language model; convert it to ours, then that to hf")
    if vision is None or base is None:
        raise UserError(
            f"{path}: holds the tensors that were trained alone; say with --vision where eva_vit_g.pth lies and "
            f"with --base where {language} lies"
        )


def keep_trained(opened: OpenedFolder, table: Table) -> OpenedFolder:
    """What a table of trained tensors has a place for, and nothing beside it."""
    kept = {name: shape for name, shape in opened.shapes.items() if table.has_place(name)}
    stream = partial(_only, opened.stream, frozenset(kept))
    return replace(opened, shapes=kept, stream=stream, write_files=lambda _: None)


def _only(stream: Stream, names: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in stream() if name in names)


def qformer_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Arguments of a Q-Former as large as its tensors, under our names; LAVIS' heads are 64 wide."""
    _, num_queries, dim = shapes["qformer.queries"]
    return {
        "dim": dim,
        "num_layers": len([name for name in shapes if name.endswith(".query_mlp.fc1.bias")]),
        "num_heads": max(1, dim // 64),
        "mlp_dim": shapes["qformer.layers.0.query_mlp.fc1.bias"][0],
        "num_queries": num_queries,
    }


def text_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Further arguments of one that reads text."""
    words, positions = (shapes[f"qformer.embeddings.{name}.weight"][0] for name in ("words", "positions"))
    return {"vocab_size": words, "max_positions": positions}


def trained_beside(weights: str | Path) -> dict[str, Any]:
    """The tower that a file of trained tensors goes with."""
    arguments = {"name": EVA, "layer": -2, "class_token": True, "weights": str(weights)}
    return {"class_path": "vlm.vision.TimmTower", "init_args": arguments}


# -- Hugging Face's folders


def describe_tower(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """EVA-CLIP-g as the `vision_config` of BLIP-2's descendants has it."""
    Entries(_VISION_READ, _VISION_ONLY, _VISION_HARMLESS).check(config, f"{file}: vision_config")
    size: dict[str, Any] = {
        "hidden_size": 1408,
        "image_size": 224,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
    }
    size |= {"num_hidden_layers": 39, "patch_size": 14, "layer_norm_eps": 1e-6, **config}
    return {
        "class_path": "vlm.vision.TimmTower",
        "init_args": {
            "name": EVA,
            "layer": -2,
            "class_token": True,
            "norm_eps": size["layer_norm_eps"],
            "options": {
                "img_size": size["image_size"],
                "patch_size": size["patch_size"],
                "embed_dim": size["hidden_size"],
                "depth": size["num_hidden_layers"] + 1,  # the last block is not there, and not computed
                "num_heads": size["num_attention_heads"],
                "mlp_ratio": size["intermediate_size"] / size["hidden_size"],
            },
        },
    }


def tower_config(module: Any, *, model_type: str) -> dict[str, Any]:
    """`vision_config` of a system of ours."""
    trunk, facts = module.vision.trunk, module.tower
    block = trunk.blocks[0]
    return {
        "model_type": model_type,
        "hidden_act": "gelu",
        "hidden_size": facts.dim,
        "image_size": facts.image_size,
        "intermediate_size": block.mlp.fc1.out_features,
        "layer_norm_eps": block.norm1.eps,
        "num_attention_heads": block.attn.num_heads,
        "num_hidden_layers": facts.num_blocks,
        "patch_size": trunk.patch_embed.patch_size[0],
        "qkv_bias": True,
    }


def qformer_config(module: Any, entries: Mapping[str, str], *, model_type: str) -> dict[str, Any]:
    """`qformer_config` of a system of ours.

    Args:
        entries: {its entry: ours}.
    """
    qformer = module.arguments["qformer"]
    return {
        "model_type": model_type,
        "encoder_hidden_size": module.tower.dim,
        "attention_probs_dropout_prob": qformer.dropout,
        "hidden_act": "gelu",
        **{theirs: getattr(qformer, ours) for theirs, ours in entries.items()},
    }


def text_config(module: Any) -> dict[str, Any]:
    """`text_config` of a system of ours, whether it is a decoder alone, and which token stands for its images."""
    language = module.language.config
    kind = language.model_type
    text = {**language.to_dict(), "model_type": kind, "vocab_size": num_rows(module)}
    if kind == "t5":
        text["tie_word_embeddings"] = language.scale_decoder_outputs
    return {
        "text_config": text,
        "use_decoder_only_language_model": kind != "t5",
        "image_token_index": image_id(module),
    }
