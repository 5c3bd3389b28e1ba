"""BLIP-2's first stage: Hugging Face's class for retrieval, and LAVIS' file of the tensors that were trained."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlm.checkpoints.files.locate import CARRIED
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.published.entries import Entries
from vlm.checkpoints.published.family import chained
from vlm.checkpoints.published.instructblip import EVA, describe_tower
from vlm.checkpoints.published.one_folder import OpenedFolder
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError

CLASS = "Blip2ForImageTextRetrieval"
MARKS = {"hf_retrieval": "vision_projection.weight", "official_stage_1": "vision_proj.weight"}
"""A tensor of each of its layouts that no other has."""
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
_BERT_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "use_qformer_text_input": (True,),
}
_BERT_HARMLESS = frozenset({"pad_token_id", "encoder_hidden_size", "attention_probs_dropout_prob"})
_READ = frozenset({"vision_config", "qformer_config", "num_query_tokens", "image_text_hidden_size"})
_HARMLESS = frozenset(  # the language model, which this class has none of, and where the other class puts features
    {"text_config", "use_decoder_only_language_model", "initializer_factor", "initializer_range"}
    | {"image_token_index", "image_token_id", "is_composition", "tie_word_embeddings"}
)
_SIZES = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_SIZES |= {"intermediate_size": 3072, "max_position_embeddings": 512, "cross_attention_frequency": 2}
"""What entries of `qformer_config` that are left out mean."""


def is_first(module: Any) -> bool:
    """Whether a system is that of the first stage."""
    return type(module).__name__ == "BLIP2QFormer"


def describe_folder(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`class_path` and `init_args` of the network in a folder of Hugging Face's; it writes no captions, unless the head
    is kept beside.

    Raises:
        UserError: an entry that is not computed, or no vocabulary.
    """
    file, bert = folder / "config.json", config["qformer_config"]
    Entries(_READ, {"model_type": ("blip-2",)}, _HARMLESS).check(config, file)
    Entries(frozenset(BERT_READ), _BERT_ONLY, _BERT_HARMLESS).check(bert, f"{file}: qformer_config")
    if not (folder / "vocab.txt").is_file():
        raise UserError(f"{folder}: has no vocab.txt; put that of bert-base-uncased beside the weights")
    beside = folder / CARRIED
    writes = beside.is_file() and "qformer.head.bias" in WeightFiles(beside)
    sizes = {ours: (_SIZES | dict(bert))[name] for name, ours in BERT_READ.items() if name in (_SIZES | dict(bert))}
    return _model(
        vision=describe_tower(config["vision_config"], file),
        qformer={**sizes, "num_queries": config.get("num_query_tokens", 32), "head": writes},
        dim=config.get("image_text_hidden_size", 256),
        vocabulary=str(folder),
    )


def complete(opened: OpenedFolder) -> OpenedFolder:
    """With a temperature, which Hugging Face's class does not have and no retrieval asks for: that of a start."""
    if "heads.temperature" in opened.shapes:
        return opened
    made = {"heads.temperature": torch.full((1,), 0.07)}
    shapes = {**opened.shapes, "heads.temperature": (1,)}
    return replace(opened, shapes=shapes, stream=chained(opened.stream, lambda: iter(made.items())))


def open_official(
    path: str | Path, files: WeightFiles, table: Table, *, vision: str | Path | None, base: str | Path | None
) -> OpenedFolder:
    """A file of LAVIS': `vision` says where EVA lies, and `base` where BERT's vocabulary does.

    Raises:
        UserError: one of them is not given, or the file holds something else.
    """
    if vision is None or base is None:
        raise UserError(
            f"{path}: holds the tensors that were trained alone; say with --vision where eva_vit_g.pth lies and with "
            "--base where the vocab.txt of bert-base-uncased lies"
        )
    shapes = table.check(files.shapes(), side="theirs")
    _, num_queries, dim = shapes["qformer.queries"]
    words, positions = (shapes[f"qformer.embeddings.{name}.weight"][0] for name in ("words", "positions"))
    qformer = {
        "dim": dim,
        "num_layers": len([name for name in shapes if name.endswith(".query_mlp.fc1.bias")]),
        "num_heads": max(1, dim // 64),
        "mlp_dim": shapes["qformer.layers.0.query_mlp.fc1.bias"][0],
        "vocab_size": words,
        "max_positions": positions,
        "num_queries": num_queries,
        "head": True,
    }
    tower = {"name": EVA, "layer": -2, "class_token": True, "weights": str(vision)}
    model = _model(
        vision={"class_path": "vlm.vision.TimmTower", "init_args": tower},
        qformer=qformer,
        dim=shapes["projections.image.weight"][0],
        vocabulary=str(base),
    )
    return OpenedFolder(
        shapes, lambda: table.stream_to_ours(files.items()), "official_stage_1", {}, model, lambda _: None
    )


def config(module: Any) -> dict[str, Any]:
    """`config.json` of Hugging Face's class for a system of ours."""
    qformer, trunk, facts = module.arguments["qformer"], module.vision.trunk, module.tower
    block = trunk.blocks[0]
    return {
        "architectures": [CLASS],
        "model_type": "blip-2",
        "num_query_tokens": qformer.num_queries,
        "image_text_hidden_size": module.arguments["dim"],
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "encoder_hidden_size": facts.dim,
            "attention_probs_dropout_prob": qformer.dropout,
            "hidden_act": "gelu",
            "use_qformer_text_input": True,
            **{theirs: getattr(qformer, ours) for theirs, ours in BERT_READ.items()},
        },
        "torch_dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_act": "gelu",
            "hidden_size": facts.dim,
            "image_size": facts.image_size,
            "intermediate_size": block.mlp.fc1.out_features,
            "layer_norm_eps": block.norm1.eps,
            "num_attention_heads": block.attn.num_heads,
            "num_hidden_layers": facts.num_blocks,
            "patch_size": trunk.patch_embed.patch_size[0],
            "qkv_bias": True,
        },
    }


def _model(*, vision: Mapping[str, Any], qformer: Mapping[str, Any], dim: int, vocabulary: str) -> dict[str, Any]:
    tokenizer = {"path": vocabulary, "added_tokens": ["[DEC]"]}
    return {
        "class_path": "vlm.systems.BLIP2QFormer",
        "init_args": {
            "vision": dict(vision),
            "qformer": {"class_path": "vlm.connectors.QFormer", "init_args": {**qformer, "text": True}},
            "tokenizer": {"class_path": "vlm.prompts.BertTokenizer", "init_args": tokenizer},
            "dim": dim,
        },
    }
