"""How an epoch's samples are cut into optimizer steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from vlm.batch import Negatives
from vlm.errors import UserError

Pure = Literal["step", "pack"]
"""What holds samples of one kind alone: an optimizer step, or a row of a batch that is counted in rows."""


@dataclass(frozen=True)
class BatchSpec:
    """The published batch of one optimizer step, over all devices and micro-batches."""

    size: int
    """How many units a step has."""

    unit: Literal["samples", "rows", "tokens"] = "samples"
    """`tokens`: samples in the order of the epoch while they fit into `size` tokens. `rows`: samples in the order of
    the epoch fill rows of `row_tokens` tokens, a step is `size` rows (Qwen-VL)."""

    row_tokens: int | None = None
    """Length of a row, for `unit: rows` alone."""

    negatives: Negatives | None = None
    """For objectives that compare samples with each other (`vlm.in_batch`): with those of their `pack` (BLIP), or with
    all of the `step` (BLIP-2). All packs then have as many samples, in the order of the epoch, and a last step that is
    not full is left out."""

    packs: int | None = None
    """Of a step, with `negatives`: the devices of the published run, each of which had one. Devices here times micro-
    batches make up as many. Not needed where samples are compared over the step."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"data.batch.size must be at least 1, found {self.size}")
        if self.unit not in ("samples", "rows", "tokens"):
            raise UserError(f"data.batch.unit must be samples, rows or tokens, found {self.unit!r}")
        if (self.unit == "rows") != (self.row_tokens is not None):
            raise UserError(f"data.batch.row_tokens goes with unit rows and no other, found unit {self.unit!r}")
        if self.negatives not in (None, "pack", "step"):
            raise UserError(f"data.batch.negatives must be pack or step, found {self.negatives!r}")
        if self.negatives is not None and self.unit != "samples":
            raise UserError(f"data.batch.negatives needs a batch counted in samples, found unit {self.unit!r}")
        if self.negatives == "pack" and self.packs is None:
            raise UserError("data.batch.negatives: pack needs data.batch.packs, the devices of the published run")
        if self.packs is not None and self.negatives is None:
            raise UserError("data.batch.packs goes with data.batch.negatives: pack or step; remove it or say which")
        if self.packs is not None and (self.packs < 1 or self.size % self.packs):
            raise UserError(f"data.batch.packs={self.packs} must divide data.batch.size={self.size}")


def batch_draws(
    draws: Sequence[int], spec: BatchSpec, *, lengths: Sequence[int] | None = None, drop_last: bool = False
) -> list[list[int]]:
    """Consecutive draws as steps.

    Args:
        draws: the epoch in order.
        lengths: tokens of each draw, in the same order; needed for rows and tokens. A draw longer than a
            row, or than all tokens of a step, stands alone.
        drop_last: leave out the last step when it is not full.
    """
    if spec.unit == "samples":
        steps = [list(draws[i : i + spec.size]) for i in range(0, len(draws), spec.size)]
        full = not steps or len(steps[-1]) == spec.size
    else:
        assert lengths is not None
        assert len(lengths) == len(draws)
        room = spec.size if spec.row_tokens is None else spec.row_tokens
        bins, used = _fill(draws, lengths, room)
        if spec.unit == "rows":
            return _steps_of_rows(bins, spec.size, drop_last=drop_last)
        steps, full = bins, used >= spec.size
    return steps if full or not drop_last else steps[:-1]


def batch_draws_pure(
    draws: Sequence[int],
    spec: BatchSpec,
    *,
    kinds: Sequence[int],
    pure: Pure,
    sizes: Sequence[int] | None = None,
    arrange: Callable[[Sequence[int]], Sequence[int]],
    lengths: Sequence[int] | None = None,
    drop_last: bool = False,
) -> list[list[int]]:
    """As `batch_draws`, with one kind of sample in a step, or in a row.

    The draws of each kind fill steps (rows) in their order; these take turns.

    Args:
        kinds: of each draw.
        sizes: samples of a step of each kind; `spec.size` by default.
        arrange: from the number of steps (rows) of kinds 0, 1, ... to the kind of each one of the epoch.
        drop_last: leave out what is not full: with pure steps the last one of each kind, with pure rows the last step.
    """
    kinds_of = np.asarray(kinds)
    bins: list[list[list[int]]] = []
    for kind in range(int(kinds_of.max(initial=-1)) + 1):
        places = np.flatnonzero(kinds_of == kind).tolist()
        own = [draws[i] for i in places]
        own_lengths = [lengths[i] for i in places] if lengths is not None else None
        if not own:
            bins.append([])
        elif pure == "step":
            own_spec = spec if sizes is None else replace(spec, size=sizes[kind])
            bins.append(batch_draws(own, own_spec, lengths=own_lengths, drop_last=drop_last))
        else:
            assert own_lengths is not None
            assert spec.row_tokens is not None
            bins.append(_fill(own, own_lengths, spec.row_tokens)[0])
    left = [iter(own) for own in bins]
    taken = [next(left[kind]) for kind in arrange([len(own) for own in bins])]
    return taken if pure == "step" else _steps_of_rows(taken, spec.size, drop_last=drop_last)


def _steps_of_rows(rows: Sequence[Sequence[int]], size: int, *, drop_last: bool = False) -> list[list[int]]:
    steps = [[draw for row in rows[i : i + size] for draw in row] for i in range(0, len(rows), size)]
    return steps[:-1] if drop_last and len(rows) % size else steps


def _fill(draws: Sequence[int], lengths: Sequence[int], room: int) -> tuple[list[list[int]], int]:
    """Opens the next bin when a draw does not fit into the current one; also returns the tokens of the last bin."""
    bins: list[list[int]] = [[]]
    used = 0
    for draw, length in zip(draws, lengths, strict=True):
        if bins[-1] and used + length > room:
            bins.append([])
            used = 0
        bins[-1].append(draw)
        used += length
    return bins, used
