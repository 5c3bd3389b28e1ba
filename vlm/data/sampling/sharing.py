"""How a step is shared by devices and micro-batches: the one place where that is decided."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from vlm.data.sampling.batches import BatchSpec
from vlm.data.sampling.packs import Packing, check_packs
from vlm.errors import UserError

Lengths = Callable[[], Iterable[np.ndarray]]
"""Gives the tokens of each sample of every step, int64[n]; asked only where they decide."""


def check_owner(batch: BatchSpec, *, micro_batch_size: int | None, max_tokens: int | None) -> None:
    """Raises `UserError` unless at most one setting decides how a step is dealt, and can."""
    given = {"data.batch.packs": batch.packs, "data.micro_batch_size": micro_batch_size, "data.max_tokens": max_tokens}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} both decide how a step is dealt; keep one")
    for name, value in given.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, found {value}")
    if micro_batch_size is not None and batch.unit != "samples":
        raise UserError(
            f"data.micro_batch_size needs a batch counted in samples, found unit {batch.unit!r}; use data.max_tokens"
        )


def check_negatives(batch: BatchSpec, terms: Sequence[str], *, system: str) -> None:
    """Raises `UserError` unless `batch` says what the in-batch `terms` of a loss compare, or there are none."""
    if terms and batch.negatives is None:
        raise UserError(
            f"{system} compares the samples of a batch ({', '.join(terms)}); set data.batch.negatives to pack (and "
            "data.batch.packs) or step, as published"
        )
    if batch.negatives is not None and not terms:
        raise UserError(f"data.batch.negatives: {batch.negatives}, but {system} compares no samples; remove it")


def micro_batches(
    batch: BatchSpec,
    *,
    world: int,
    given: int,
    micro_batch_size: int | None,
    max_tokens: int | None,
    lengths: Lengths,
    parts: int = 1,
) -> int:
    """Micro-batches of a step on each device (Lightning's `accumulate_grad_batches`), the same in the whole run.

    Args:
        batch: of a step; of the largest where steps differ.
        world: devices.
        given: what the trainer was given; 1 says nothing.
        parts: as in `Packing`.

    Raises:
        UserError: the step cannot be shared like this, or `given` contradicts what decides.
    """
    if batch.negatives == "step":
        return _one_pack_each(batch, world, given, micro_batch_size, max_tokens, lengths)
    if batch.packs is not None:
        if batch.packs % world:
            fitting = [number for number in range(1, batch.packs + 1) if batch.packs % number == 0]
            raise UserError(
                f"data.batch.packs={batch.packs} cannot be shared alike by {world} devices; use "
                f"{', '.join(map(str, fitting))}"
            )
        return _agreed(batch.packs // world, given, f"data.batch.packs={batch.packs}", world)
    if micro_batch_size is not None:
        needed = -(-batch.size // (micro_batch_size * world))
        return _agreed(needed, given, f"data.micro_batch_size={micro_batch_size}", world)
    if max_tokens is not None and given == 1:
        return _within(list(lengths()), Packing(max_tokens, parts=parts), world)
    return given


def packing_of(
    batch: BatchSpec, *, packs: int, micro_batch_size: int | None = None, max_tokens: int | None = None, parts: int = 1
) -> Packing:
    """What a pack may hold when a step is dealt into `packs`, each rank's `parts` for itself."""
    if batch.negatives is None:
        if micro_batch_size is not None and packs * micro_batch_size < batch.size:
            raise UserError(
                f"data.micro_batch_size={micro_batch_size}: {packs} packs hold no step of {batch.size} samples"
            )
        return Packing(max_tokens, micro_batch_size, parts=parts)
    if batch.size % packs or batch.packs not in (None, packs):
        wanted = f"{batch.packs} packs" if batch.packs is not None else f"packs that share {batch.size} samples alike"
        raise UserError(f"data.batch wants {wanted}, devices times micro-batches make up {packs}")
    return Packing(max_tokens, batch.size // packs, in_order=True, negatives=batch.negatives)


def _agreed(needed: int, given: int, owner: str, world: int) -> int:
    if given not in (1, needed):
        raise UserError(
            f"trainer.accumulate_grad_batches={given} contradicts {owner}, which makes it {needed} on {world} devices; "
            "remove one of them"
        )
    return needed


def _within(steps: Sequence[np.ndarray], packing: Packing, world: int) -> int:
    """The smallest number of micro-batches with which no pack of any step is over the limit."""
    assert packing.max_tokens is not None
    least = max((lengths.sum() for lengths in steps), default=0) / (packing.max_tokens * world)
    for number in itertools.count(max(1, int(least))):
        too_long = next((lengths for lengths in steps if not packing.fits(lengths, world * number)), None)
        if too_long is None:
            return number
        if too_long.max() > packing.max_tokens:
            check_packs(too_long, packing, world=world, accumulate=number, training=True)
    raise AssertionError


def _one_pack_each(
    batch: BatchSpec, world: int, given: int, micro_batch_size: int | None, max_tokens: int | None, lengths: Lengths
) -> int:
    """1, where samples of the whole step are compared: all of them have to be on the devices at once."""
    shares = [number for number in range(1, batch.size + 1) if batch.size % number == 0]
    if batch.packs is None and world not in shares:
        below, above = [n for n in shares if n < world], [n for n in shares if n > world]
        raise UserError(
            f"data.batch.negatives: step needs equally many of its {batch.size} samples on each device, which "
            f"{world} devices cannot have; use {' or '.join(map(str, [*below[-1:], *above[:1]]))}"
        )
    steps = list(lengths()) if max_tokens is not None else []

    def holds(devices: int) -> bool:
        packing = packing_of(batch, packs=devices, max_tokens=max_tokens)
        few = micro_batch_size is None or batch.size <= micro_batch_size * devices
        return few and all(packing.fits(tokens, devices) for tokens in steps)

    if batch.packs is not None:
        enough: int | None = batch.packs
    else:
        enough = next((number for number in shares if number >= world * given and holds(number)), None)
    if enough is None:
        raise UserError(f"data.max_tokens={max_tokens} is less than the longest training sample has; raise it")
    if given != 1 or enough != world:
        other = ", or remove data.batch.packs" if batch.packs is not None and world in shares else ""
        raise UserError(
            f"data.batch.negatives: step compares {batch.size} samples, which are all on the devices at once, without "
            f"accumulation; use {enough} devices, found {world}{other}"
        )
    return 1
