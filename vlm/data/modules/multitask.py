"""Many data sets at once, each with its share of the epoch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlm.data.loading.encoder import Encoder
from vlm.data.modules.base import VisionLanguageData
from vlm.data.sampling.batches import BatchSpec, Pure, batch_draws_pure
from vlm.data.sampling.mixture import DrawGroups, check_names
from vlm.data.sampling.turns import order_kinds
from vlm.data.sources.base import Source
from vlm.data.wrappers.resolution import WithResolution
from vlm.errors import UserError
from vlm.seeding import seed_from


class MultitaskData(VisionLanguageData):
    """Tasks that keep to themselves within a step or a pack, and images at the resolution of their data set.

    Args:
        pure: `step`: all samples of an optimizer step come from one source (InstructBLIP). `pack`: all samples of a
            row do, and a step is rows of all of them (Qwen-VL's second stage, with a batch counted in rows).
        tasks: by name of source, the task that it belongs to: sources of one task count as one for `pure`. A source
            that is not named is a task of its own.
        sizes: by task (or source that is one of its own), samples of its steps where these are not `batch.size`, with
            `pure: step` (XComposer2-4KHD: pages at full resolution have batches of their own size). Where chance picks
            the tasks, the shares of their samples stay what the mixture says.
        resolution: by name of source, what the codec is told about the resolution of its images (see
            `vlm.data.wrappers.resolution`); training alone, for validation wrap the source itself.
        **kwargs: as in `VisionLanguageData`.
    """

    def __init__(
        self,
        sources: Sequence[Source] = (),
        *,
        batch: BatchSpec | None = None,
        pure: Pure | None = None,
        tasks: Mapping[str, str] | None = None,
        sizes: Mapping[str, int] | None = None,
        resolution: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(sources, batch=batch, **kwargs)
        names = [source.name for source in self.sources]
        if pure not in (None, "step", "pack"):
            raise UserError(f"data.pure must be step or pack, found {pure!r}")
        if pure == "pack" and self.batch.unit != "rows":
            raise UserError(f"data.pure: pack needs a batch counted in rows, found unit {self.batch.unit!r}")
        if tasks and pure is None:
            raise UserError("data.tasks say which sources share a step or a pack; set data.pure: step or pack")
        if pure is not None:
            check_names("data.tasks" if tasks else "data.pure", tasks or {}, names)
        if resolution:
            check_names("data.resolution", resolution, names)
        self.pure = pure
        self.resolution = dict(resolution or {})
        self.tasks = [(tasks or {}).get(name, f"source {name}") for name in names]
        self.sizes = self._checked_sizes(sizes or {})
        self.sources = [
            WithResolution(source, self.resolution[source.name]) if source.name in self.resolution else source
            for source in self.sources
        ]

    def _checked_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        if sizes and (self.pure != "step" or self.batch.unit != "samples" or self.batch.negatives is not None):
            raise UserError(
                "data.sizes needs data.pure: step and a batch counted in samples, without data.batch.negatives; remove "
                "one of them"
            )
        known = {task.removeprefix("source "): task for task in self.tasks}
        for name, size in sizes.items():
            if name not in known:
                raise UserError(f"data.sizes names {name!r}, the tasks are {', '.join(known)}; take a name from there")
            if size < 1:
                raise UserError(f"data.sizes: {name} must be at least 1, found {size}")
        return {known[name]: size for name, size in sizes.items()}

    def group_sizes(self) -> list[int]:
        """Of each task, how many samples its steps have."""
        return [self.sizes.get(task, self.batch.size) for task in dict.fromkeys(self.tasks)]

    def _largest_batch(self) -> BatchSpec:
        return replace(self.batch, size=max(self.group_sizes(), default=self.batch.size))

    def groups(self) -> list[int]:
        """Of each source, the number of its task."""
        numbers = {task: number for number, task in enumerate(dict.fromkeys(self.tasks))}
        return [numbers[task] for task in self.tasks]

    def steps(self, epoch: int, *, encoder: Encoder) -> list[list[int]]:
        """As in `VisionLanguageData`; with `pure`, one task a step or row.

        Where a mixture picks sources by chance and the batch is counted in samples, each step picks its task. Else the
        draws of each task fill steps (or rows) in their order, and these take turns in random order, or evenly with
        `mixture.order: spread`; the last step (or row) of a task is shorter, and `drop_last` leaves such a step out.
        """
        if self.pure is None:
            return super().steps(epoch, encoder=encoder)
        draws = self.draws(epoch)
        if (turns := self.turns()) is not None:
            return self._steps_of_turns(draws, turns, epoch)
        lengths = None
        if self.batch.unit != "samples":
            lengths = self.lengths(draws, epoch=epoch, encoder=encoder)
        evenly = self.mixture is not None and self.mixture.order == "spread"
        kinds = self._groups_of(draws)
        steps = batch_draws_pure(
            draws,
            self.batch,
            kinds=kinds.tolist(),
            pure=self.pure,
            sizes=self.group_sizes() if self.sizes else None,
            arrange=lambda counts: order_kinds(counts, spread_out=evenly, seed=seed_from(self.seed, epoch, 3)).tolist(),
            lengths=lengths,
            drop_last=self.drop_last,
        )
        lost = np.setdiff1d(kinds, self._groups_of([step[0] for step in steps]))
        if self.pure == "step" and len(lost):
            named = [source.name for source, group in zip(self.sources, self.groups(), strict=True) if group in lost]
            raise UserError(
                f"data.drop_last leaves no step of {', '.join(named)}, which fill none; lower data.batch.size, "
                "or let them share steps with others (data.tasks)"
            )
        return steps

    def _steps_of_turns(self, draws: Sequence[int], turns: DrawGroups, epoch: int) -> list[list[int]]:
        assert self.mixture is not None
        sizes = {source.name: len(source) for source in self.sources}
        counts = self.mixture.turn_sizes(sizes, turns, seed=self.seed, epoch=epoch)
        steps = [step.tolist() for step in np.split(np.asarray(draws), np.cumsum(counts)[:-1])]
        full = len(steps[-1]) == self.group_sizes()[self._groups_of(steps[-1][:1])[0]]
        return steps if full or not self.drop_last else steps[:-1]

    def _groups_of(self, draws: Sequence[int]) -> np.ndarray:
        samples = np.asarray(draws, dtype=np.int64) % len(self.samples)
        return np.asarray(self.groups())[np.searchsorted(self.samples.ends, samples, side="right")]

    def turns(self) -> DrawGroups | None:
        chance = self.mixture is not None and self.mixture.by_chance
        if not chance or self.pure != "step" or self.batch.unit != "samples":
            return None
        return DrawGroups(self.groups(), self.group_sizes())

    def identity(self) -> dict[str, Any]:
        return super().identity() | {
            "data.pure": self.pure,
            "data.tasks": self.tasks,
            "data.sizes": self.sizes,
            "data.resolution": self.resolution,
        }
