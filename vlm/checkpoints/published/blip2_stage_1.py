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
from vlm.checkpoints.published.lavis import (
    BERT_READ,
    describe_tower,
    qformer_config,
    qformer_sizes,
    text_sizes,
    tower_config,
    trained_beside,
)
from vlm.checkpoints.published.one_folder import OpenedFolder
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError

CLASS = "Blip2ForImageTextRetrieval"
MARKS = {"hf_retrieval": "vision_projection.weight", "official_stage_1": "vision_proj.weight"}
"""A tensor of each of its layouts that no other has."""
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
    model = _model(
        vision=trained_beside(vision),
        qformer={**qformer_sizes(shapes), **text_sizes(shapes), "head": True},
        dim=shapes["projections.image.weight"][0],
        vocabulary=str(base),
    )
    return OpenedFolder(
        shapes, lambda: table.stream_to_ours(files.items()), "official_stage_1", {}, model, lambda _: None
    )


def config(module: Any) -> dict[str, Any]:
    """`config.json` of Hugging Face's class for a system of ours."""
    return {
        "architectures": [CLASS],
        "model_type": "blip-2",
        "num_query_tokens": module.arguments["qformer"].num_queries,
        "image_text_hidden_size": module.arguments["dim"],
        "qformer_config": qformer_config(module, BERT_READ, model_type="blip_2_qformer")
        | {"use_qformer_text_input": True},
        "torch_dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
        "vision_config": tower_config(module, model_type="blip_2_vision_model"),
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
