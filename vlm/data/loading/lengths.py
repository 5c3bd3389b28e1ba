"""Token counts of whole epochs: for batches that are counted in rows or tokens, and for limits of tokens."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlm.data.loading.encoder import Encoder
from vlm.data.loading.rank_gather import Gather
from vlm.data.loading.workers import worker_context
from vlm.errors import SampleError, UserError

CHUNK = 256


class _Chunks(Dataset):
    def __init__(self, encoder: Encoder, draws: Sequence[int], epoch: int, tolerant: bool) -> None:
        self.encoder = encoder
        self.draws = np.asarray(draws, dtype=np.int64)
        self.epoch = epoch
        self.tolerant = tolerant

    def __len__(self) -> int:
        return -(-len(self.draws) // CHUNK)

    def __getitem__(self, index: int) -> np.ndarray | UserError:
        draws = self.draws[index * CHUNK : (index + 1) * CHUNK].tolist()
        try:
            return np.array([self._length(draw) for draw in draws], dtype=np.int32)
        except UserError as error:  # see `StepDataset.__getitem__`
            return error

    def _length(self, draw: int) -> int:
        try:
            return self.encoder(draw, epoch=self.epoch).num_tokens
        except SampleError:
            if not self.tolerant:
                raise
            return 0  # the step that it falls into leaves it out


def draw_lengths(
    encoder: Encoder,
    draws: Sequence[int],
    *,
    epoch: int,
    num_workers: int = 0,
    tolerant: bool = False,
    world: int = 1,
    rank: int = 0,
    gather: Gather | None = None,
    order: np.ndarray | None = None,
) -> list[int]:
    """Tokens of each draw, true for this epoch: a caption pick or a prefix split can change them.

    Args:
        tolerant: a sample that cannot be encoded has length 0.
        world: ranks that measure a share each and tell each other by `gather`; `rank` is this one.
        order: int64[len(draws)], places in `draws` of which the ranks measure consecutive parts.

    Raises:
        UserError: that of the first sample that cannot be encoded.
    """
    if gather is None:
        return _measured(encoder, draws, epoch=epoch, num_workers=num_workers, tolerant=tolerant)
    shares = np.array_split(np.arange(len(draws)) if order is None else order, world)
    own: list[int] | UserError
    try:
        own = _measured(
            encoder, [draws[at] for at in shares[rank]], epoch=epoch, num_workers=num_workers, tolerant=tolerant
        )
    except UserError as error:
        own = error
    lengths = np.zeros(len(draws), dtype=np.int64)
    for share, told in zip(shares, gather(own), strict=True):
        if isinstance(told, UserError):
            raise told
        lengths[share] = told
    return lengths.tolist()


def _measured(encoder: Encoder, draws: Sequence[int], *, epoch: int, num_workers: int, tolerant: bool) -> list[int]:
    """Tokens of each draw, measured here."""
    chunks = _Chunks(encoder, draws, epoch, tolerant)
    found = []
    loader = DataLoader(
        chunks,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context=worker_context(num_workers, encoder.codec),
        generator=torch.Generator(),
    )
    for lengths in loader:
        if isinstance(lengths, UserError):
            raise lengths
        found.append(np.asarray(lengths))
    return np.concatenate(found).tolist() if found else []


def step_lengths(
    plan: Callable[[int], Sequence[Sequence[int]]],
    measure: Callable[[list[int]], Sequence[int]],
    *,
    num_samples: int,
    max_epochs: int | None,
    max_steps: int,
) -> list[np.ndarray]:
    """Tokens of the samples of every step of a run, int64[n] each.

    A sample is measured once, whatever it draws in later epochs.

    Args:
        plan: the draws of each step of an epoch.
        measure: from samples to their tokens.
        max_epochs: of the run, None or -1 for no limit; `max_steps` likewise. Without any limit, one epoch.
    """
    steps: list[np.ndarray] = []
    for epoch in itertools.count(1):
        steps += [np.asarray(step) % num_samples for step in plan(epoch - 1)]
        endless = max_epochs in (None, -1) and max_steps == -1
        if not steps or endless or epoch == max_epochs or 0 <= max_steps <= len(steps):
            break
    if not steps:
        return []
    samples, places = np.unique(np.concatenate(steps), return_inverse=True)
    tokens = np.asarray(measure(samples.tolist()))[places]
    return np.split(tokens, np.cumsum([len(step) for step in steps])[:-1])
