"""The order of samples: pure functions of their arguments, so that a resumed run continues where it stopped.

The grouping functions follow the samplers of LLaVA (`llava_trainer.py`): samples of like length share a batch, and
with `modality` a global batch holds either samples with images or text alone.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from vlm.seeding import seed_from


def shuffled(n: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n)."""
    return torch.randperm(n, generator=_generator(seed, epoch)).tolist()


class Blocks(NamedTuple):
    """Samples that are fetched together, or lie in one file.

    Attributes:
        ends: int64[blocks], where blocks end.
        together: how many blocks are shuffled together.
        streams: equal parts of all samples that are read side by side: a rank has some of them to itself.
    """

    ends: np.ndarray
    together: int
    streams: int = 1

    @property
    def stream_ends(self) -> np.ndarray:
        """int64[streams], where the parts end; the first ones have a sample more where they cannot be equal."""
        size, longer = divmod(int(self.ends[-1]), self.streams)
        return np.cumsum(size + (np.arange(self.streams) < longer))


def shuffled_blocks(blocks: Blocks, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of all samples that comes back to no block: blocks in random order, the samples of a few of them
    shuffled together. For files that are far away, of which a whole block is fetched to get at one sample.

    With streams each is walked so for itself, and they take turns: any few samples in a row come from all over them.
    """
    generator, starts, begin = _generator(seed, epoch), np.concatenate([[0], blocks.ends[:-1]]), 0
    walks: list[np.ndarray] = []
    for end in blocks.stream_ends.tolist():
        here = np.flatnonzero((starts <= end) & (blocks.ends >= begin))
        walk = [np.empty(0, dtype=np.int64)]
        for window in _chunks(torch.randperm(len(here), generator=generator).tolist(), blocks.together):
            places = [np.arange(max(starts[block], begin), min(blocks.ends[block], end)) for block in here[window]]
            samples = np.concatenate(places)
            walk.append(samples[torch.randperm(len(samples), generator=generator).numpy()])
        walks.append(np.concatenate(walk))
        begin = end
    turns = _spread(blocks.streams)
    size = len(walks[-1])  # the shortest
    rest = [walks[stream][size:] for stream in turns]
    return np.concatenate([np.stack([walks[stream][:size] for stream in turns], axis=1).ravel(), *rest])


def _spread(num: int) -> np.ndarray:
    """A permutation of range(num) of which any few in a row lie evenly in it: by their binary digits, reversed."""
    digits = max(num - 1, 1).bit_length()
    return np.argsort([int(format(at, f"0{digits}b")[::-1], 2) for at in range(num)], kind="stable")


def with_blocks(
    order: Sequence[int], ends: Sequence[int], blocks: Sequence[Blocks | None], *, seed: int, epoch: int
) -> list[int]:
    """An order over several sources in which those with blocks take the same places, filled by `shuffled_blocks`.

    Args:
        ends: number of samples up to and with each source.
        blocks: of each source.
    """
    found = np.asarray(order, dtype=np.int64)
    for which, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if (own := blocks[which]) is not None:
            places = np.flatnonzero((found >= start) & (found < end))
            found[places] = shuffled_blocks(own, seed=seed_from(seed, which), epoch=epoch) + start
    return found.tolist()


def length_grouped(
    lengths: Sequence[int], *, batch_size: int, world_size: int, generator: torch.Generator
) -> list[int]:
    """Indices in which every global batch is a random draw, dealt to ranks by length.

    Args:
        lengths: of each sample. Negative ones sort the shortest sample first, as in the published sampler for data that
            is text alone.
        batch_size: per rank.
        world_size: ranks; consecutive runs of `batch_size` indices belong to rank 0, 1, ...

    Returns:
        Global batches one after another, the largest length first within a rank.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    indices: list[int] = []
    for batch in _chunks(order, batch_size * world_size):
        by_length = sorted(batch, key=lambda index: lengths[index], reverse=True)
        for rank in _deal(by_length, lengths, world_size):
            indices += rank
    return indices


def modality_length_grouped(
    lengths: Sequence[int],
    *,
    batch_size: int,
    world_size: int,
    generator: torch.Generator,
    outer: torch.Generator | None = None,
) -> list[int]:
    """`length_grouped` within each modality, then global batches in random order (LLaVA-1.5's sampler).

    As published, the last batch of either modality, full or not, is merged with the other's, sorted by index, and put
    at the end.

    Args:
        lengths: > 0 for a sample with images, < 0 for text alone.
        outer: draws the order of batches; default `generator`.

    Raises:
        ValueError: a length is 0, so that its modality is unknown.
    """
    if not all(lengths):
        raise ValueError(f"sample {list(lengths).index(0)} has length 0; lengths are > 0 with images, < 0 without")
    outer = outer or generator
    size = batch_size * world_size
    groups = [[i for i, n in enumerate(lengths) if n > 0], [i for i, n in enumerate(lengths) if n < 0]]
    if not all(groups):
        return length_grouped(lengths, batch_size=batch_size, world_size=world_size, generator=outer)
    batches: list[list[int]] = []
    rest: list[int] = []
    for group in groups:
        own = [abs(lengths[i]) for i in group]
        order = length_grouped(own, batch_size=batch_size, world_size=world_size, generator=generator)
        *full, last = _chunks([group[i] for i in order], size)
        batches += full
        rest += last
    mixed = torch.randperm(len(batches), generator=outer).tolist()
    return [index for batch in [*(batches[i] for i in mixed), sorted(rest)] for index in batch]


def modality_grouped_steps(has_image: Sequence[bool], *, size: int, seed: int, epoch: int) -> list[list[int]]:
    """Global batches of one modality each; what is left over of both is mixed at the end.

    Args:
        has_image: of each sample.
        size: samples of a global batch.

    Returns:
        Every index once. All batches but the last hold `size` samples; the last one or two may mix modalities.
    """
    generator = _generator(seed, epoch)
    batches: list[list[int]] = []
    rest: list[int] = []
    for modality in (True, False):
        group = [index for index, image in enumerate(has_image) if bool(image) is modality]
        order = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
        full = len(order) // size * size
        batches += _chunks(order[:full], size)
        rest += order[full:]
    rest = [rest[i] for i in torch.randperm(len(rest), generator=generator).tolist()]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()] + _chunks(rest, size)


def _generator(seed: int, epoch: int) -> torch.Generator:
    # Both through a hash: `seed + epoch` would give neighbouring seeds each other's epochs
    mixed = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little") >> 1)


def _chunks(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


def _deal(indices: Sequence[int], lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Equally many samples to each rank, the next one always to the rank with the fewest tokens so far."""
    if len(indices) % ranks:
        return [list(indices[rank::ranks]) for rank in range(ranks)]
    hands: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in indices:
        open_hands = [rank for rank in range(ranks) if len(hands[rank]) < len(indices) // ranks]
        rank = min(open_hands, key=lambda r: tokens[r])
        hands[rank].append(index)
        tokens[rank] += lengths[index]
    return hands
