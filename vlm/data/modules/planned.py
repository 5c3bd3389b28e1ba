"""What is trained on, how it is cut into steps and how these are shared: all that needs no trainer."""

import dataclasses
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from vlm.codec import Codec
from vlm.data.loading.encoder import Encoder, Prepare
from vlm.data.loading.lengths import draw_lengths, step_lengths
from vlm.data.loading.loader import LoopPosition, StepLoader
from vlm.data.loading.rank_gather import Gather
from vlm.data.sampling.batches import BatchSpec, batch_draws
from vlm.data.sampling.mixture import DrawGroups, Mixture
from vlm.data.sampling.order import shuffled, with_blocks
from vlm.data.sampling.packs import Packing
from vlm.data.sampling.sharing import check_owner, micro_batches, packing_of
from vlm.data.sampling.streams import Streams
from vlm.data.sampling.turns import rank_orders, ranks_together
from vlm.data.sources.base import Concat, Source
from vlm.data.wrappers.held_out import HoldOut
from vlm.data.wrappers.quarantine import Kept, Quarantine, fingerprint
from vlm.errors import UserError


class PlannedData:
    """Sources, the published batch, and loaders that keep it on any number of devices.

    Attributes:
        answered: positions in `predict_sources` that predict leaves out, because an earlier start has their answers.

    Args:
        sources: what is trained on; evaluation alone needs none.
        val_sources: judged in order, every sample once over all ranks; likewise `test_sources`, `predict_sources`.
        batch: the batch of one optimizer step; training does not begin without it.
        mixture: how much of each source an epoch has; by default every sample once, in random order.
        micro_batch_size: samples of a pack at most; micro-batches follow from it.
        max_tokens: tokens of a pack at most; micro-batches follow from it, unless the trainer is given a number of them
            (`vlm.data.sampling.sharing`). At most one of `batch.packs`, `micro_batch_size` and `max_tokens` is given;
            without any, packs are devices times `trainer.accumulate_grad_batches`.
        val_batch_size: samples per pack of validation, test and predict.
        num_workers: loader processes per rank.
        seed: of the order of samples and of every choice that belongs to a sample.
        drop_last: leave out the last step of an epoch when it is not full; always so with `batch.negatives`.
        shuffle_images: in validation and test show every sample the images of another one, to see what a system
            answers without looking.
        val_split: share of the samples of `sources` that is held out as validation, behind `val_sources`; samples with
            an image or a group in common are never on both sides (`vlm.data.wrappers.held_out`).
        quarantine: list of samples to leave out of training and validation (`vlm check-data` writes one).
        max_bad_samples: how many different bad samples a run may meet. A bad one is noted and left out of its
            step; one more than this ends the run.
    """

    def __init__(
        self,
        sources: Sequence[Source] = (),
        *,
        batch: BatchSpec | None = None,
        mixture: Mixture | None = None,
        val_sources: Sequence[Source] = (),
        test_sources: Sequence[Source] = (),
        predict_sources: Sequence[Source] = (),
        micro_batch_size: int | None = None,
        max_tokens: int | None = None,
        val_batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        drop_last: bool = False,
        shuffle_images: bool = False,
        val_split: float | None = None,
        quarantine: str | Path | None = None,
        max_bad_samples: int = 0,
    ) -> None:
        super().__init__()
        self._trains = bool(sources) and batch is not None
        batch = batch if batch is not None else BatchSpec(1)
        if val_batch_size < 1:
            raise UserError(f"data.val_batch_size must be at least 1, found {val_batch_size}")
        check_owner(batch, micro_batch_size=micro_batch_size, max_tokens=max_tokens)
        if max_bad_samples < 0:
            raise UserError(f"data.max_bad_samples must not be negative, found {max_bad_samples}")
        self.sources = list(sources)
        self.val_sources = list(val_sources)
        self._kept: Sequence[Kept] = ()
        if quarantine is not None:
            self._kept = Quarantine(quarantine, [*sources, *val_sources]).kept()
            self.sources, self.val_sources = list(self._kept[: len(sources)]), list(self._kept[len(sources) :])
        if val_split is not None:
            held_out = HoldOut(val_split, self.sources)
            self.sources, self.val_sources = (
                list(held_out.parts("training")),
                [*self.val_sources, *held_out.parts("validation")],
            )
        self.val_split = val_split
        self.test_sources = list(test_sources)
        self.predict_sources = list(predict_sources)
        self.batch = batch
        self.mixture = mixture
        if mixture is not None:
            mixture.check([source.name for source in self.sources])
            if mixture.ranks is not None and (batch.unit != "samples" or batch.size % mixture.ranks):
                raise UserError(
                    f"data.mixture.order: ranks needs a batch of samples that {mixture.ranks} devices share alike, "
                    f"found {batch.size} {batch.unit}"
                )
        self.micro_batch_size = micro_batch_size
        self.max_tokens = max_tokens
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.drop_last = drop_last or batch.negatives is not None
        self.shuffle_images = shuffle_images
        self.quarantine = quarantine
        self.max_bad_samples = max_bad_samples
        self.answered: Set[int] = frozenset()
        self._samples: Concat | None = None

    @property
    def samples(self) -> Concat:
        """All sources as one; opened on first use."""
        if self._samples is None:
            self._samples = Concat(self.sources)
        return self._samples

    def micro_batches(
        self, codec: Codec, *, world: int = 1, given: int = 1, max_epochs: int | None = 1, max_steps: int = -1
    ) -> int:
        """Of a step on each of `world` devices, the same in the whole run (see `vlm.data.sampling.sharing`).

        Args:
            given: what the trainer was given.
            max_epochs: of the run, which may end after `max_steps` too; the longest step decides. None or -1: no limit.
        """

        encoder = self._encoder(codec)
        known = self.batch.unit == "samples"  # else the steps of an epoch cost the encoding of all of its samples

        def lengths() -> list[np.ndarray]:
            return step_lengths(
                lambda epoch: self.streams().in_order(self.steps(epoch, encoder=encoder)),
                lambda samples: self.lengths(samples, epoch=0, encoder=encoder),
                num_samples=len(self.samples),
                max_epochs=max_epochs if known else 1,
                max_steps=max_steps,
            )

        limits = {"micro_batch_size": self.micro_batch_size, "max_tokens": self.max_tokens}
        parts = self.streams().parts(world)
        return micro_batches(self._largest_batch(), world=world, given=given, lengths=lengths, parts=parts, **limits)

    def _largest_batch(self) -> BatchSpec:
        return self.batch

    def preparation(self) -> Prepare | None:
        """What this kind of training does to a sample before it is encoded.

        A plain function: it travels to workers, the data module does not.
        """
        return None

    def turns(self) -> DrawGroups | None:
        """Draws that the mixture takes together where chance picks their source; None: each alone."""
        return None

    def draws(self, epoch: int) -> Sequence[int]:
        """The epoch in order (see `vlm.data.loading.step_sampler.Plan` for what a draw is)."""
        if self.mixture is None:
            order = shuffled(len(self.samples), seed=self.seed, epoch=epoch)
            blocks, ends = [source.blocks() for source in self.sources], self.samples.ends.tolist()
            return with_blocks(order, ends, blocks, seed=self.seed, epoch=epoch)
        sizes = {source.name: len(source) for source in self.sources}
        if self.mixture.ranks is not None:
            each = {"rank_batch": self.batch.size // self.mixture.ranks}
            orders = rank_orders(list(sizes.values()), ranks=self.mixture.ranks, seed=self.seed, epoch=epoch, **each)
            return ranks_together(orders, **each)
        fetched = {source.name: source.blocks() for source in self.sources}
        samples, visits = self.mixture.draws(sizes, seed=self.seed, epoch=epoch, turns=self.turns(), blocks=fetched)
        return (samples + visits * len(self.samples)).tolist()

    def steps(self, epoch: int, *, encoder: Encoder) -> list[list[int]]:
        """The draws of every optimizer step of the epoch: a function of (seed, epoch) alone."""
        draws = self.draws(epoch)
        lengths = None
        if self.batch.unit != "samples":
            lengths = self.lengths(draws, epoch=epoch, encoder=encoder)
        return batch_draws(draws, self.batch, lengths=lengths, drop_last=self.drop_last)

    def streams(self) -> Streams:
        """The sources that ranks read files of their own from."""
        return Streams({source.name: source.blocks() for source in self.sources}, self.samples.ends.tolist())

    def lengths(self, draws: Sequence[int], *, epoch: int, encoder: Encoder) -> list[int]:
        """Tokens of each draw, for batches that are counted in rows or tokens; all ranks of a trainer ask together."""
        tolerant = self.max_bad_samples > 0
        samples, ends = np.asarray(draws) % len(self.samples), self.samples.ends
        which, starts = np.searchsorted(ends, samples, side="right"), np.concatenate([[0], ends[:-1]])
        share = (samples - starts[which]) / np.diff(ends, prepend=0)[which]  # a rank measures a part of each source
        return draw_lengths(
            encoder,
            draws,
            epoch=epoch,
            num_workers=self.num_workers,
            tolerant=tolerant,
            gather=self._gather(),
            order=np.argsort(share, kind="stable"),
            **self._ranks(),
        )

    def identity(self) -> dict[str, Any]:
        """What decides the samples of a step: a run cannot resume with another one."""
        return {
            "data.batch": dataclasses.asdict(self.batch),
            "data.mixture": None if self.mixture is None else dataclasses.asdict(self.mixture),
            "data.seed": self.seed,
            "data.drop_last": self.drop_last,
            "data.val_split": self.val_split,
            "data.quarantine": fingerprint(self._kept[: len(self.sources)]),
            "streams of data.sources": self.streams().by_name or None,
            "the number of training samples": len(self.samples),
        }

    def train_loader(
        self,
        codec: Codec,
        *,
        world: int = 1,
        rank: int = 0,
        accumulate: int = 1,
        progress: LoopPosition | None = None,
        sealed: bool = False,
        gather: Gather | None = None,
    ) -> StepLoader:
        """The loader of one rank, for use without a trainer too (arguments as in `StepLoader`)."""
        encoder = self._encoder(codec)
        limits = {"micro_batch_size": self.micro_batch_size, "max_tokens": self.max_tokens}
        parts = self.streams().parts(world)
        loader = StepLoader(
            encoder,
            plan=lambda epoch: self.streams().in_order(self.steps(epoch, encoder=encoder)),
            world=world,
            rank=rank,
            accumulate=accumulate,
            packing=packing_of(self._largest_batch(), packs=world * accumulate, parts=parts, **limits),
            num_workers=self.num_workers,
            identity=self.identity(),
            progress=progress,
            sealed=sealed,
            max_bad_samples=self.max_bad_samples,
            gather=gather,
        )
        if not len(loader):
            raise UserError(
                f"{'data.batch.negatives' if self.batch.negatives else 'data.drop_last'} leaves no step of the "
                f"{len(self.samples)} training samples, which are less than {self.batch.size} {self.batch.unit}; lower "
                "data.batch.size"
            )
        return loader

    def _encoder(self, codec: Codec) -> Encoder:
        return Encoder(self.samples, codec, self.seed, self.preparation())

    def eval_loader(
        self,
        samples: Source,
        codec: Codec,
        *,
        indices: Sequence[int] | None = None,
        judged_by: str | None = None,
        generate: bool = False,
        world: int = 1,
        rank: int = 0,
        sealed: bool = False,
        gather: Gather | None = None,
    ) -> StepLoader:
        """In order, every sample once over all ranks, the same number of packs on each.

        Packs are the same on any number of devices; the last ones may be fillers. In-batch objectives compare the
        samples of a pack.

        Args:
            indices: of `samples`, those to load; all by default.
            judged_by: who judges what is said of the samples (see `Batch.judged_by`).
            generate: they are to be answered.
        """
        size = self.val_batch_size * world
        steps = batch_draws(range(len(samples)) if indices is None else indices, BatchSpec(size))
        encoder = Encoder(
            samples, codec, self.seed, self.preparation(), training=False, judged_by=judged_by, generate=generate
        )
        return StepLoader(
            encoder,
            plan=lambda epoch: steps,
            world=world,
            rank=rank,
            packing=Packing(self.max_tokens, self.val_batch_size, in_order=True, negatives="pack"),
            num_workers=self.num_workers,
            fixed=True,
            sealed=sealed,
            gather=gather,
        )

    def _gather(self) -> Gather | None:
        """How the ranks tell each other about samples; None without ranks that read their own."""
        return None

    def _ranks(self) -> dict[str, int]:
        """How many ranks there are, and which is this one."""
        return {"world": 1, "rank": 0}
