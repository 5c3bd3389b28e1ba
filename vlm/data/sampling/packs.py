"""Dealing the samples of one optimizer step into packs: pure functions."""

import dataclasses
import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vlm.batch import IGNORE, Negatives, TokenSequence
from vlm.codec import Encoded
from vlm.errors import UserError


@dataclass(frozen=True)
class Packing:
    """What a pack may hold, and which samples share one.

    Attributes:
        max_tokens: limit per pack; None for no limit.
        max_samples: limit per pack; None for no limit.
        in_order: samples stay in the order of the step, `max_samples` to a pack; else packs are balanced by tokens.
        negatives: what an in-batch objective compares (`Batch.negatives`).
    """

    max_tokens: int | None = None
    max_samples: int | None = None
    in_order: bool = False
    negatives: Negatives | None = None

    def deal(self, lengths: Sequence[int], packs: int) -> list[list[int]]:
        """Positions in `lengths` (tokens of each sample) per pack, ascending; alike on every rank."""
        if not self.in_order:
            return balance_packs(lengths, packs, most=self.max_samples)
        assert self.max_samples is not None
        starts = range(0, packs * self.max_samples, self.max_samples)
        return [list(range(start, min(start + self.max_samples, len(lengths)))) for start in starts]

    def fits(self, lengths: Sequence[int], packs: int) -> bool:
        """Whether no pack of the step is over `max_tokens`."""
        if self.max_tokens is None:
            return True
        return all(sum(lengths[i] for i in pack) <= self.max_tokens for pack in self.deal(lengths, packs))


def balance_packs(lengths: Sequence[int], packs: int, *, most: int | None = None) -> list[list[int]]:
    """Balanced packs: the longest sample first, each to the pack that is the lightest so far.

    The heaviest and the lightest pack differ by at most the longest sample (with `most`, as far as it allows), and no
    pack is empty when there are at least as many samples as packs. Ties go to the pack with fewer samples, then to the
    first: the result depends on `lengths` alone, so all ranks deal alike without talking.

    Args:
        lengths: true token count per sample.
        most: samples of a pack.

    Returns:
        Positions in `lengths` per pack, ascending.
    """
    assert most is None or len(lengths) <= packs * most
    heap = [(0, 0, pack) for pack in range(packs)]
    dealt: list[list[int]] = [[] for _ in range(packs)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, size, pack = heap[0]
        dealt[pack].append(index)
        if size + 1 == most:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (load + lengths[index], size + 1, pack))
    return [sorted(pack) for pack in dealt]


class Seat(NamedTuple):
    """A place in a pack.

    Attributes:
        draw: whose sequences stand there.
        filler: a copy of them that trains nothing.
    """

    draw: int
    filler: bool = False


def deal_seats(
    draws: Sequence[int], tokens: Mapping[int, int], packing: Packing, *, world: int, accumulate: int, training: bool
) -> list[list[Seat]]:
    """The packs of a step, alike on every rank.

    Where samples of a pack are compared there are equally many in each, and one that cannot be read must not move
    others: a filler takes its seat. Elsewhere a step can have fewer samples than there are packs (the last one of an
    epoch); a device without a pack would leave the others waiting in their collectives, so it computes a filler too.

    Args:
        draws: of the step.
        tokens: {draw: number}, in the order of the step, without those that cannot be trained on.

    Raises:
        UserError: a pack is over `max_tokens`.
    """
    packs = world * accumulate
    filler = Seat(min(tokens, key=lambda draw: tokens[draw]), filler=True)  # the shortest costs least
    seats = [Seat(draw) for draw in tokens]
    if packing.in_order and training:
        assert packing.max_samples is not None
        seats = [Seat(draw) if draw in tokens else filler for draw in draws]
        seats += [filler] * (packs * packing.max_samples - len(seats))
    lengths = [tokens[seat.draw] for seat in seats]
    check_packs(lengths, packing, world=world, accumulate=accumulate, training=training)
    return [[seats[i] for i in pack] or [filler] for pack in packing.deal(lengths, packs)]


def as_filler(item: Encoded) -> Encoded:
    """The same sequences and images, with no label and nothing added to the step's counts."""

    def unlabelled(sequences: Sequence[TokenSequence]) -> tuple[TokenSequence, ...]:
        return tuple(dataclasses.replace(s, targets=torch.full_like(s.targets, IGNORE)) for s in sequences)

    return dataclasses.replace(
        item,
        text=unlabelled(item.text),
        rows={name: unlabelled(sequences) for name, sequences in item.rows.items()},
        counts={},
        filler=True,
    )


def check_packs(lengths: Sequence[int], packing: Packing, *, world: int, accumulate: int, training: bool) -> None:
    """Raises `UserError` when a pack of the step is over `max_tokens`; the message names what would do.

    Args:
        lengths: tokens of each sample of the step.
    """
    limit = packing.max_tokens
    if limit is None or packing.fits(lengths, world * accumulate):
        return
    heaviest = max(packing.deal(lengths, world * accumulate), key=lambda pack: sum(lengths[i] for i in pack))
    found = f"a pack of {len(heaviest)} samples has {sum(lengths[i] for i in heaviest):,} tokens"
    if max(lengths) > limit:
        raise UserError(
            f"a single sample has {max(lengths):,} tokens, over data.max_tokens={limit:,} of a pack; raise it"
        )
    if not training:
        remedy = "lower data.val_batch_size"
    elif packing.in_order:
        remedy = "use more devices, so that each has fewer samples of the step"
    else:
        more = itertools.count(accumulate + 1)
        enough = next(number for number in more if packing.fits(lengths, world * number))
        remedy = f"set trainer.accumulate_grad_batches to {enough}"
    raise UserError(f"{found}, over data.max_tokens={limit:,}; {remedy}")
