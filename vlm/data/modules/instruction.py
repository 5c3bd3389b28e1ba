"""Conversations, with and without images."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from vlm.data.loading.encoder import Encoder, Prepare, Seeds
from vlm.data.modules.base import VisionLanguageData
from vlm.data.sampling.batches import BatchSpec, batch_draws
from vlm.data.sampling.mixture import DrawGroups, Mixture
from vlm.data.sampling.order import modality_grouped_steps, modality_length_grouped
from vlm.data.sampling.turns import order_kinds, shuffled_walk
from vlm.data.sources.base import Source
from vlm.errors import UserError
from vlm.sample import ImagePart, Part, RegionPart, Sample, TextPart
from vlm.seeding import seed_from


class InstructionData(VisionLanguageData):
    """Visual conversations mixed with text-only ones.

    Args:
        group_by_modality: steps are all with or all without images (LLaVA-1.5), but for the last one.
        ranks: with `group_by_modality`, the devices times micro-batches of LLaVA-1.5's run: the very order of its
            sampler, by the words of each sample, in the first epoch as after `torch.manual_seed(seed)`.
        text_share: share of text-only samples in an epoch. Every sample with an image comes once; of the text-only
            ones come as many as the share asks for, more or fewer than there are, each before any comes again.
        alternate: so many samples with images, then one more of text alone, and so on (InternLM-XComposer2). Sources
            of either kind are picked by chance, as the mixture says; by size without one.
        instructions: what the user says beside the images, where a sample leaves it open. One is drawn for all
            samples of a step (MiniGPT-4); evaluation takes the first.
        **kwargs: as in `VisionLanguageData`.
    """

    def __init__(
        self,
        sources: Sequence[Source] = (),
        *,
        batch: BatchSpec | None = None,
        group_by_modality: bool = False,
        ranks: int | None = None,
        text_share: float | None = None,
        alternate: int | None = None,
        instructions: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(sources, batch=batch, **kwargs)
        if group_by_modality and self.batch.unit != "samples":
            raise UserError(f"data.group_by_modality needs a batch counted in samples, found unit {self.batch.unit!r}")
        if group_by_modality and self.mixture is not None and self.mixture.order != "random":
            raise UserError(
                f"data.group_by_modality shuffles its steps; remove it or data.mixture.order: {self.mixture.order}"
            )
        if ranks is not None and not group_by_modality:
            raise UserError("data.ranks goes with data.group_by_modality: true; set it or remove data.ranks")
        if ranks is not None and (ranks < 1 or self.batch.size % ranks):
            raise UserError(f"data.ranks={ranks} must share data.batch.size={self.batch.size} alike")
        if ranks is not None and (self.mixture is not None or text_share is not None):
            raise UserError("data.ranks takes the sources as they are; remove data.mixture and data.text_share")
        if text_share is not None and not 0 <= text_share < 1:
            raise UserError(f"data.text_share must be at least 0 and below 1, found {text_share}")
        if text_share is not None and self.mixture is not None:
            raise UserError("data.text_share and data.mixture both say what an epoch has; remove one of them")
        if alternate is not None:
            self._check_alternation(alternate, group_by_modality or text_share is not None)
        if instructions and self.batch.unit != "samples":
            raise UserError(
                "data.instructions: the step of a sample decides, so they need a batch counted in samples, found unit "
                f"{self.batch.unit!r}"
            )
        if not all(text.strip() for text in instructions):
            raise UserError("data.instructions: one is empty; write or remove it")
        self.ranks = ranks
        self.alternate = alternate
        self.instructions = tuple(instructions)
        self.group_by_modality = group_by_modality
        self.text_share = text_share

    def _check_alternation(self, alternate: int, grouped: bool) -> None:
        if alternate < 1:
            raise UserError(f"data.alternate must be at least 1, found {alternate}")
        if grouped:
            raise UserError("data.alternate says which samples have pictures; remove group_by_modality and text_share")
        self.mixture = self.mixture or Mixture()
        self.mixture.check([source.name for source in self.sources])
        if not self.mixture.by_chance:
            raise UserError(
                "data.alternate picks sources by chance; give data.mixture.weights and no exact numbers or other order"
            )

    def turns(self) -> DrawGroups | None:
        if self.alternate is None:
            return None
        text_only = []
        for source in self.sources:
            pictured = source.image_mask()
            if pictured.any() != pictured.all():
                raise UserError(
                    f"data.alternate: source {source.name!r} has samples with and without pictures; split it in two"
                )
            text_only.append(int(not pictured.any()))
        assert self.mixture is not None
        shares = self.mixture.shares({source.name: len(source) for source in self.sources})
        if not all(np.bincount(text_only, weights=shares, minlength=2)):
            raise UserError("data.alternate needs sources with pictures and sources of text alone, each with a share")
        return DrawGroups(text_only, [self.alternate, self.alternate + 1], in_turn=True)

    def preparation(self) -> Prepare | None:
        return partial(instruct, instructions=self.instructions) if self.instructions else None

    def _refuse_streams(self, key: str) -> None:
        for source in self.sources:
            if source.blocks() is not None:
                raise UserError(
                    f"data.{key} picks samples from all over {source.name!r}, which comes in blocks; leave streaming, "
                    "groups_at_once and streams out of the source, or this out of the data"
                )

    def draws(self, epoch: int) -> Sequence[int]:
        if self.text_share is None:
            return super().draws(epoch)
        self._refuse_streams("text_share")
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
        self._refuse_streams("group_by_modality")
        if self.ranks is not None:
            order = modality_length_grouped(
                self._signed_words,
                batch_size=self.batch.size // self.ranks,
                world_size=self.ranks,
                generator=torch.Generator().manual_seed(self.seed + epoch),
            )
            return batch_draws(order, self.batch, drop_last=self.drop_last)
        pictured = self.samples.image_mask()
        whole = self.mixture is None and self.text_share is None  # the grouping itself shuffles
        draws = np.arange(len(pictured)) if whole else np.asarray(self.draws(epoch))
        steps = modality_grouped_steps(
            pictured[draws % len(pictured)].tolist(), size=self.batch.size, seed=self.seed, epoch=epoch
        )
        return [draws[step].tolist() for step in steps if len(step) == self.batch.size or not self.drop_last]

    @cached_property
    def _signed_words(self) -> list[int]:
        """Words of each sample, negative where it has no picture: what LLaVA-1.5's sampler goes by."""
        samples = (self.samples[index] for index in range(len(self.samples)))
        return [words_of(sample) if sample.images else -words_of(sample) for sample in samples]

    def identity(self) -> dict[str, Any]:
        return super().identity() | {
            "data.group_by_modality": self.group_by_modality,
            "data.ranks": self.ranks,
            "data.text_share": self.text_share,
            "data.alternate": self.alternate,
            "data.instructions": self.instructions,
        }


def instruct(sample: Sample, seeds: Seeds, *, instructions: Sequence[str]) -> Sample:
    """The sample with one of the instructions behind the images of its first question, the same in all of a step.

    Raises:
        SampleError: the question says something itself, or there is none.
    """
    at = next((at for at, message in enumerate(sample.messages) if message.role == "user"), None)
    if at is None:
        raise sample.error("has no message of the user that data.instructions could fill in")
    asked = sample.messages[at]
    pictures = tuple(part for part in asked.content if isinstance(part, ImagePart))
    if any(not isinstance(part, TextPart) or part.text.strip() for part in asked.content if part not in pictures):
        raise sample.error("its question says something itself; remove that, or data.instructions")
    text = TextPart(instructions[seeds.step % len(instructions)])
    asked = replace(asked, content=(*pictures, text))
    return replace(sample, messages=(*sample.messages[:at], asked, *sample.messages[at + 1 :]))


def words_of(sample: Sample) -> int:
    """Words of a conversation, an image mark being one and the numbers of a place as many as they are.

    Raises:
        SampleError: it has none.
    """

    def text_of(part: Part) -> str:
        if isinstance(part, ImagePart):
            return "<image>"
        return part.text if not isinstance(part, RegionPart) else " ".join(["0"] * 2 * len(part.points))

    texts = ["".join(map(text_of, message.content)) for message in sample.messages]
    if not (count := sum(len(text.split()) for text in texts)):
        raise sample.error("has no word, so that data.ranks cannot place it; remove it")
    return count
