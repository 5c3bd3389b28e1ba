"""A published folder just written, held against the system it was written from: files may say less than settings do."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm.building.instantiate import instantiate, model_of
from vlm.building.network import empty_weights
from vlm.checkpoints.resume.opened import read_trained
from vlm.commands.merged import probes
from vlm.errors import UserError
from vlm.stages import matches

if TYPE_CHECKING:
    from vlm.batch import Batch
    from vlm.checkpoints.published.family import Family

_NOT_ANSWERS = frozenset(
    {
        "name_or_path",
        "p",
        "attention_dropout",
        "grad_checkpointing",
        "gradient_checkpointing",
        "vocab_size",
        "padding_idx",
    }
)
"""What modules hold and what changes no number of an answer."""
_TABLES = ("embed_tokens", "shared", "lm_head")
"""Layers that layouts give rows of their own, which the writer's table checks."""


def check_written(folder: Path, family: "Family", path: str | Path) -> list[str]:
    """Compares what a folder's files describe with the artefact it was written from; returns notes about it.

    Both are built without weights, which the writer's table checks.

    Raises:
        UserError: the folder describes another network, or other pixels.
    """
    try:
        ours = instantiate(model_of(read_trained(path)))
        theirs = instantiate(family.describe(family.open_complete(str(folder))))
    except UserError as error:
        return [f"what is written was not opened again to compare: {str(error).replace(str(folder), 'the folder')}"]
    for what, mine, other in _differences(ours, theirs):
        raise UserError(
            f"{path}: {what} is {mine} here, and the files of this layout say {other}: they have no place for what "
            "was trained; write another layout (--to hf, or vlm export), or keep the artefact"
        )
    mine, other = _batch(ours), _batch(theirs)
    if any(not _equal(mine.views[name].pixels, other.views[name].pixels) for name in mine.views):
        raise UserError(
            f"{path}: images were shown as image: {ours.arguments.get('image')}, and the files of this layout say "
            f"{theirs.arguments.get('image')}; write another layout (--to hf, or vlm export), or keep the artefact"
        )
    if not (torch.equal(mine.text.ids, other.text.ids) and torch.equal(mine.text.targets, other.text.targets)):
        if not hasattr(ours.codec, "template"):
            return [
                "texts were made or cut otherwise in training (max_tokens, max_words), which this layout does not say"
            ]
        return [
            f"trained with template {ours.codec.template.name} and {ours.codec.tokenizer}, which this layout does not "
            f"say: opened here it is talked to with {theirs.codec.template.name} and {theirs.codec.tokenizer}, which "
            "makes other tokens; `vlm convert --to ours --template` says the template"
        ]
    return []


def _differences(ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """(what, ours, theirs) of everything that two systems would compute differently."""
    with empty_weights():
        mine, other = (nn.ModuleDict(module.build_parts()) for module in (ours, theirs))
    facts, others = dict(_facts(mine)), dict(_facts(other))
    for what in sorted(facts.keys() & others.keys()):  # classes of one layer may hold more than others
        if facts.get(what) != others.get(what):
            yield what, facts.get(what, "not there"), others.get(what, "not there")
    tables, their_tables = dict(mine.named_buffers()), dict(other.named_buffers())
    for name in sorted(tables.keys() & their_tables.keys()):
        if any(matches(pattern, name) for pattern in ours.moving):  # a queue: filled by training, not a setting
            continue
        if not _equal(tables[name], their_tables[name]):
            yield name, "a table of other numbers", "another"


def _facts(network: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in network.named_modules():
        if name.endswith(_TABLES):
            continue
        if not type(module).__module__.startswith("transformers.models"):  # Mistral's layers may be opened as LLaMA's
            yield f"{name} (its class)", type(module).__name__
        for key, value in vars(module).items():
            if key not in _NOT_ANSWERS and not key.startswith("_") and isinstance(value, (bool, int, float, str)):
                yield f"{name}.{key}", value
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if not name.removesuffix(".weight").endswith(_TABLES):
            yield f"{name} (its shape)", tuple(tensor.shape)


def _batch(module: Any) -> "Batch":
    items = [module.codec.encode(sample) for sample in probes(module.codec)]
    return module.codec.collate(items, counts={})


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
