"""Dealing the samples of one optimizer step into packs: pure functions."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
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
        parts: into how many consecutive parts a step is cut before packs are balanced: one for each rank, where a rank
            reads files of its own.
    """

    max_tokens: int | None = None
    max_samples: int | None = None
    in_order: bool = False
    negatives: Negatives | None = None
    parts: int = 1

    def deal(self, lengths: np.ndarray, packs: int) -> np.ndarray:
        """int64[n], the pack of each sample, from its tokens int64[n]; alike on every rank."""
        if self.in_order:
            assert self.max_samples is not None
            return np.arange(len(lengths)) // self.max_samples
        assert packs % self.parts == 0
        dealt = np.empty(len(lengths), dtype=np.int64)
        for part in range(self.parts):
            own = slice(*self._part(part, len(lengths)))
            balanced = balance_packs(lengths[own], packs // self.parts, most=self.max_samples)
            dealt[own] = part + self.parts * balanced
        return dealt

    def share(self, num: int, *, world: int, rank: int) -> np.ndarray:
        """int64[], the places in a step of `num` samples that a rank measures for all ranks; its own where possible."""
        if self.in_order:
            assert self.max_samples is not None
            places = np.arange(num)
            return places[places // self.max_samples % world == rank]
        if self.parts > 1:
            return np.arange(*self._part(rank, num))
        return np.arange(rank, num, world)

    def _part(self, part: int, num: int) -> tuple[int, int]:
        return num * part // self.parts, num * (part + 1) // self.parts

    def fits(self, lengths: np.ndarray, packs: int) -> bool:
        """Whether no pack of the step is over `max_tokens`."""
        return self.max_tokens is None or bool(
            np.bincount(self.deal(lengths, packs), weights=lengths).max(initial=0) <= self.max_tokens
        )


def balance_packs(lengths: np.ndarray, packs: int, *, most: int | None = None) -> np.ndarray:
    """Balanced packs: the longest sample first, each to the pack that is the lightest so far.

    The heaviest and the lightest pack differ by at most the longest sample (with `most`, as far as it allows), and no
    pack is empty when there are at least as many samples as packs. Ties go to the pack with fewer samples, then to the
    first: the result depends on `lengths` alone, so all ranks deal alike without talking.

    The next samples go to the lightest packs in their order for as long as none of the packs that have just got one is
    as light as the next: so many are dealt at once, most often one to each pack.

    Args:
        lengths: int64[n], true token count per sample.
        most: samples of a pack.

    Returns:
        int64[n], the pack of each sample.
    """
    assert most is None or len(lengths) <= packs * most
    order = np.argsort(-lengths, kind="stable")
    loads, counts = np.zeros(packs, dtype=np.int64), np.zeros(packs, dtype=np.int64)
    dealt = np.empty(len(lengths), dtype=np.int64)
    while len(order):
        lightest = np.lexsort((counts, loads))  # stable: of equal ones the first
        if most is not None:
            lightest = lightest[counts[lightest] < most]
        lightest = lightest[: len(order)]
        filled = loads[lightest] + lengths[order[: len(lightest)]]
        passed = loads[lightest][1:] >= np.minimum.accumulate(filled)[:-1]
        num = int(passed.argmax()) + 1 if passed.any() else len(lightest)
        here, order = order[:num], order[num:]
        dealt[here] = lightest[:num]
        loads[lightest[:num]] = filled[:num]
        counts[lightest[:num]] += 1
    return dealt


class Seat(NamedTuple):
    """A place in a pack.

    Attributes:
        draw: whose sequences stand there.
        filler: a copy of them that trains nothing.
    """

    draw: int
    filler: bool = False


def deal_seats(
    draws: Sequence[int],
    tokens: np.ndarray,
    packing: Packing,
    *,
    world: int,
    rank: int,
    accumulate: int,
    training: bool,
) -> tuple[dict[int, list[Seat]], np.ndarray]:
    """{pack: what is in it} of a rank, of packs that are dealt alike on every rank; and who gets each sample.

    Where samples of a pack are compared there are equally many in each, and one that cannot be read must not move
    others: a filler takes its seat. Elsewhere a step can have fewer samples than there are packs (the last one of an
    epoch); a device without a pack would leave the others waiting in their collectives, so it computes a filler too.

    Args:
        draws: of the step.
        tokens: int64[n], of each draw; -1 for one that cannot be trained on. One can.

    Returns:
        The seats, and int64[n], the rank that each draw is dealt to; -1: none.

    Raises:
        UserError: a pack is over `max_tokens`.
    """
    packs = world * accumulate
    good = np.flatnonzero(tokens >= 0)
    shortest = int(good[tokens[good].argmin()])  # the filler that costs least
    places = good
    if packing.in_order and training:
        assert packing.max_samples is not None
        places = np.full(packs * packing.max_samples, -1)
        places[good] = good
    lengths = tokens[np.where(places < 0, shortest, places)]
    check_packs(lengths, packing, world=world, accumulate=accumulate, training=training)
    dealt = packing.deal(lengths, packs)
    filler = Seat(draws[shortest], filler=True)
    seats = {
        pack: [filler if at < 0 else Seat(draws[at]) for at in places[dealt == pack].tolist()] or [filler]
        for pack in range(rank, packs, world)
    }
    ranks = np.full(len(draws), -1)
    ranks[places[places >= 0]] = dealt[places >= 0] % world
    return seats, ranks


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


def check_packs(lengths: np.ndarray, packing: Packing, *, world: int, accumulate: int, training: bool) -> None:
    """Raises `UserError` when a pack of the step is over `max_tokens`; the message names what would do.

    Args:
        lengths: int64[n], tokens of each sample of the step.
    """
    limit = packing.max_tokens
    if limit is None or packing.fits(lengths, world * accumulate):
        return
    dealt = packing.deal(lengths, world * accumulate)
    heaviest = lengths[dealt == np.bincount(dealt, weights=lengths).argmax()]
    found = f"a pack of {len(heaviest)} samples has {heaviest.sum():,} tokens"
    if lengths.max() > limit:
        raise UserError(
            f"a single sample has {lengths.max():,} tokens, over data.max_tokens={limit:,} of a pack; raise it"
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
