"""Conversations, with and without pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm.data.loading.encoder import Encoder
from vlm.data.modules.base import VisionLanguageData
from vlm.data.sampling.batches import BatchSpec
from vlm.data.sampling.mixture import order_kinds, shuffled_walk
from vlm.data.sampling.order import modality_grouped_steps
from vlm.data.sources.base import Source
from vlm.errors import UserError
from vlm.seeding import seed_from


class InstructionData(VisionLanguageData):
    """Visual conversations mixed with text-only ones.

    Args:
        group_by_modality: steps are all with or all without pictures (LLaVA-1.5), but for the last one.
        text_share: share of text-only samples in an epoch. Every sample with a picture comes once; of the text-only
            ones come as many as the share asks for, more or fewer than there are, each before any comes again.
        **kwargs: as in `VisionLanguageData`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        batch: BatchSpec,
        group_by_modality: bool = False,
        text_share: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(sources, batch=batch, **kwargs)
        if group_by_modality and batch.unit != "samples":
            raise UserError(f"data.group_by_modality needs a batch counted in samples, found unit {batch.unit!r}")
        if group_by_modality and self.mixture is not None and self.mixture.order != "random":
            raise UserError(
                f"data.group_by_modality shuffles its steps; remove it or data.mixture.order: {self.mixture.order}"
            )
        if text_share is not None and not 0 <= text_share < 1:
            raise UserError(f"data.text_share must be at least 0 and below 1, found {text_share}")
        if text_share is not None and self.mixture is not None:
            raise UserError("data.text_share and data.mixture both say what an epoch has; remove one of them")
        self.group_by_modality = group_by_modality
        self.text_share = text_share

    def draws(self, epoch: int) -> Sequence[int]:
        if self.text_share is None:
            return super().draws(epoch)
        pictured = self.samples.image_mask()
        groups = [np.flatnonzero(pictured), np.flatnonzero(~pictured)]
        counts = [len(groups[0]), round(len(groups[0]) * self.text_share / (1 - self.text_share))]
        if not counts[0] or (counts[1] and not len(groups[1])):
            missing = "text-only samples" if counts[0] else "samples with pictures"
            raise UserError(f"data.text_share={self.text_share} needs {missing}, data.sources have none; add or remove")
        kinds = order_kinds(counts, spread_out=False, seed=seed_from(self.seed, epoch, 4))
        draws = np.empty(len(kinds), dtype=np.int64)
        for kind, (group, count) in enumerate(zip(groups, counts, strict=True)):
            found, visits = shuffled_walk(
                len(group), start=count * epoch, count=count, seed=seed_from(self.seed, kind, 5)
            )
            draws[kinds == kind] = group[found] + visits * len(pictured)
        return draws.tolist()

    def steps(self, epoch: int, *, encoder: Encoder) -> list[list[int]]:
        if not self.group_by_modality:
            return super().steps(epoch, encoder=encoder)
        pictured = self.samples.image_mask()
        whole = self.mixture is None and self.text_share is None  # the grouping itself shuffles
        draws = np.arange(len(pictured)) if whole else np.asarray(self.draws(epoch))
        steps = modality_grouped_steps(
            pictured[draws % len(pictured)].tolist(), size=self.batch.size, seed=self.seed, epoch=epoch
        )
        return [draws[step].tolist() for step in steps if len(step) == self.batch.size or not self.drop_last]

    def identity(self) -> dict[str, Any]:
        return super().identity() | {
            "data.group_by_modality": self.group_by_modality,
            "data.text_share": self.text_share,
        }
