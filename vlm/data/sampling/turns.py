"""In which order kinds of samples take turns, and in which order the samples of one kind come."""

import math
from collections.abc import Sequence
from random import Random

import numpy as np

from vlm.data.sampling.order import Blocks, shuffled, shuffled_blocks
from vlm.errors import UserError
from vlm.seeding import seed_from


def order_kinds(counts: Sequence[int], *, spread_out: bool, seed: int) -> np.ndarray:
    """int64[sum(counts)], kinds 0, 1, ... in exact numbers, evenly or in random order."""
    if spread_out:
        return interleave_evenly(counts)
    kinds = np.repeat(np.arange(len(counts)), counts)
    return kinds[np.asarray(shuffled(len(kinds), seed=seed, epoch=0), dtype=np.int64)]


def interleave_evenly(counts: Sequence[int]) -> np.ndarray:
    """int64[sum(counts)], kinds 0, 1, ..., each evenly over the whole (VILA's sampler).

    The most frequent kind chooses first, at equal distances; the next one chooses among the places that are left.
    """
    kinds = np.empty(sum(counts), dtype=np.int64)
    free = np.arange(len(kinds))
    for kind in sorted(range(len(counts)), key=lambda kind: -counts[kind]):
        if counts[kind]:
            taken = np.arange(counts[kind]) * len(free) // counts[kind]
            kinds[free[taken]] = kind
            free = np.delete(free, taken)
    return kinds


def shuffled_walk(
    size: int, *, start: int, count: int, seed: int, blocks: Blocks | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Stops start .. start + count of an endless walk over `size` samples.

    Args:
        blocks: of samples that are fetched together.

    Returns:
        int64[count] samples, and int64[count] rounds since the one that `start` lies in.
    """
    samples = np.empty(count, dtype=np.int64)
    if not count:
        return samples, samples.copy()
    stops = np.arange(start, start + count)
    rounds = stops // size
    for number in range(rounds[0], rounds[-1] + 1):
        mixed = seed_from(seed, int(number))
        walk = shuffled(size, seed=mixed, epoch=0) if blocks is None else shuffled_blocks(blocks, seed=mixed, epoch=0)
        order = np.asarray(walk, dtype=np.int64)
        here = rounds == number
        samples[here] = order[stops[here] % size]
    return samples, rounds - rounds[0]


def rank_orders(sizes: Sequence[int], *, rank_batch: int, ranks: int, seed: int, epoch: int) -> list[list[int]]:
    """What each device sees in an epoch of VILA's `VILADistributedSampler`, in order.

    A source is cut into equal parts, one for each rank, of as many batches as all ranks can fill; its last samples are
    left out in every epoch. A rank shuffles its parts (Python's own generator, seeded by `seed + epoch` on every rank
    alike) and spreads them evenly over the epoch.

    Args:
        sizes: samples of each source; indices count over all of them.
        rank_batch: samples of one rank in a step.

    Raises:
        UserError: no source fills a step.
    """
    own = [size // (rank_batch * ranks) * rank_batch for size in sizes]
    if not sum(own):
        raise UserError(
            f"data.mixture.order: ranks leaves no sample: no source has {rank_batch * ranks} of them, one step of all "
            "devices; lower data.batch.size"
        )
    starts = np.cumsum([0, *sizes]).tolist()
    pattern = interleave_evenly(own).tolist()
    orders: list[list[int]] = []
    for rank in range(ranks):
        random = Random(seed + epoch)
        parts = [list(range(starts[k] + rank * n, starts[k] + (rank + 1) * n)) for k, n in enumerate(own)]
        for part in parts:
            random.shuffle(part)
        left = [iter(part) for part in parts]
        orders.append([next(left[kind]) for kind in pattern])
    return orders


def ranks_together(orders: Sequence[Sequence[int]], *, rank_batch: int) -> list[int]:
    """Steps one after another: of each the samples of rank 0, of rank 1, and so on."""
    num = len(orders[0])
    return [index for at in range(0, num, rank_batch) for order in orders for index in order[at : at + rank_batch]]


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to `shares`: what is left goes to the largest remainders."""
    exact = [share * total for share in shares]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
