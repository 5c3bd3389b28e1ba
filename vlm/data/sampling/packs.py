"""Dealing the samples of one optimizer step into packs: pure functions."""

import dataclasses
import heapq
from collections.abc import Sequence

import torch

from vlm.batch import IGNORE, TokenSequence
from vlm.codec import Encoded
from vlm.errors import UserError


def balance_packs(lengths: Sequence[int], packs: int) -> list[list[int]]:
    """Balanced packs: the longest sample first, each to the pack that is the lightest so far.

    The heaviest and the lightest pack differ by at most the longest sample, and no pack is empty when there are at
    least as many samples as packs. Ties go to the pack with fewer samples, then to the first: the result depends on
    `lengths` alone, so all ranks deal alike without talking.

    Args:
        lengths: true token count per sample.

    Returns:
        Positions in `lengths` per pack, ascending.
    """
    heap = [(0, 0, pack) for pack in range(packs)]
    dealt: list[list[int]] = [[] for _ in range(packs)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, size, pack = heap[0]
        dealt[pack].append(index)
        heapq.heapreplace(heap, (load + lengths[index], size + 1, pack))
    return [sorted(pack) for pack in dealt]


def add_fillers(items: Sequence[Encoded], packs: int) -> list[Encoded]:
    """`items`, with fillers added until every pack can have one.

    A step can have fewer samples than there are packs (the last one of an epoch). A device without a pack would leave
    the others waiting in their collectives, so it computes a copy of the step's shortest sample that trains nothing.
    """
    missing = packs - len(items)
    if missing <= 0:
        return list(items)
    shortest = min(range(len(items)), key=lambda i: (items[i].num_tokens, i))
    return [*items, *[as_filler(items[shortest])] * missing]


def as_filler(item: Encoded) -> Encoded:
    """The same sequences and pictures, with no label and nothing added to the step's counts."""

    def unlabelled(sequences: Sequence[TokenSequence]) -> tuple[TokenSequence, ...]:
        return tuple(dataclasses.replace(s, targets=torch.full_like(s.targets, IGNORE)) for s in sequences)

    return dataclasses.replace(
        item,
        text=unlabelled(item.text),
        rows={name: unlabelled(sequences) for name, sequences in item.rows.items()},
        counts={},
        filler=True,
    )


def check_pack(lengths: Sequence[int], max_tokens: int | None) -> None:
    """Raises `UserError` when the samples of a pack do not fit into `max_tokens` together."""
    tokens = sum(lengths)
    if max_tokens is None or tokens <= max_tokens:
        return
    longest = max(lengths)
    if longest > max_tokens:
        raise UserError(
            f"a single sample has {longest} tokens, over max_tokens={max_tokens}; raise data.max_tokens or shorten it"
        )
    raise UserError(
        f"a pack of {len(lengths)} samples has {tokens} tokens, over max_tokens={max_tokens}; "
        "raise trainer.accumulate_grad_batches so that the step is dealt into more packs"
    )
