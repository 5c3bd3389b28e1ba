"""BERT's own published weights in the networks that are built over it."""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.tables.base import BaseWeights

_LAYER = {
    "attention.self.query": ("attention.query", "decoder_attention.query"),
    "attention.self.key": ("attention.key", "decoder_attention.key"),
    "attention.self.value": ("attention.value", "decoder_attention.value"),
    "attention.output.dense": ("attention.dense", "decoder_attention.dense"),
    "attention.output.LayerNorm": ("attention.norm", "decoder_attention.norm"),
    "intermediate.dense": ("mlp.fc1", "query_mlp.fc1"),
    "output.dense": ("mlp.fc2", "query_mlp.fc2"),
    "output.LayerNorm": ("mlp.norm", "query_mlp.norm"),
}
_TEXT = {
    "embeddings.word_embeddings": "embeddings.words",
    "embeddings.position_embeddings": "embeddings.positions",
    "embeddings.LayerNorm": "embeddings.norm",
    "cls.predictions": "head",
    "cls.predictions.transform.dense": "head.dense",
    "cls.predictions.transform.LayerNorm": "head.norm",
}
_DROPPED = re.compile(
    r"embeddings\.(token_type_embeddings|position_ids)|pooler\.|cls\.(seq_relationship|predictions\.decoder)\."
)
_FRESH = ("queries", "feature_norm", "layers.*.cross_attention.*")


def read_bert(network: Any, files: WeightFiles) -> BaseWeights:
    """BERT as BLIP and BLIP-2 start from it.

    Its feed-forward networks and self-attentions come into every role they have here: text and queries, reading and
    writing. Kinds of sentences and the pooler are dropped, and what the network has no words for. Queries and
    cross-attention start new, and so does the head where the files have none.
    """
    known, keys = network.state_dict(), files.keys()
    places = {key: _places(key) for key in keys}
    taken = {key: [name for name in names if name in known] for key, names in places.items()}
    has_head = any("cls.predictions." in key for key in keys)

    def items() -> Iterator[tuple[str, Tensor]]:
        for key, tensor in files.items():
            yield from ((name, tensor) for name in taken[key] or places[key])

    dropped = [key for key in keys if _is_dropped(key, places[key], known) and not taken[key]]
    names = (name for key in keys if key not in dropped for name in taken[key] or places[key] or [key])
    fresh = _FRESH if has_head else (*_FRESH, "head")
    return BaseWeights(frozenset(names), items, tuple(dropped), fresh)


def _places(key: str) -> list[str]:
    """Where a tensor of BERT may lie in networks over it."""
    key = key.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
    module, _, kind = key.replace("LayerNorm.beta", "LayerNorm.bias").rpartition(".")
    if found := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", module):
        return [f"layers.{found[1]}.{name}.{kind}" for name in _LAYER.get(found[2], ())]
    return [f"{_TEXT[module]}.{kind}"] if module in _TEXT else []


def _is_dropped(key: str, places: list[str], known: Any) -> bool:
    if _DROPPED.search(key):
        return True
    is_layer = bool(places) and places[0].startswith("layers.")
    # a layer that is not there at all is another size of BERT, which is an error
    return bool(places) and (not is_layer or f"{places[0].rsplit('.', 3)[0]}.attention.query.weight" in known)
