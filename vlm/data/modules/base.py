"""What the three kinds of training data have in common."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader

from vlm.codec import Codec
from vlm.data.loading.encoder import Encoder
from vlm.data.loading.lengths import draw_lengths
from vlm.data.loading.loader import LoopPosition, StepLoader
from vlm.data.loading.predict_dataset import PredictDataset
from vlm.data.loading.rank_gather import Gather, gather_over_ranks
from vlm.data.loading.trainer_progress import TrainerProgress
from vlm.data.loading.workers import worker_context
from vlm.data.modules.passes import split
from vlm.data.sampling.batches import BatchSpec, batch_draws
from vlm.data.sampling.mixture import DrawGroups, Mixture, rank_orders, ranks_together
from vlm.data.sampling.order import shuffled
from vlm.data.sources.base import Concat, Source
from vlm.data.wrappers.quarantine import Kept, Quarantine, fingerprint
from vlm.data.wrappers.shuffled_images import ShuffledImages
from vlm.errors import UserError
from vlm.sample import Sample


class VisionLanguageData(L.LightningDataModule):
    """Sources, the published batch, and loaders that keep it on any number of devices.

    Args:
        sources: what is trained on.
        val_sources: judged in order, every sample once over all ranks; likewise `test_sources`, `predict_sources`.
        batch: the batch of one optimizer step.
        mixture: how much of each source an epoch has; by default every sample once, in random order.
        max_tokens: limit per pack; None for no limit.
        val_batch_size: samples per pack of validation, test and predict.
        num_workers: loader processes per rank.
        seed: of the order of samples and of every choice that belongs to a sample.
        drop_last: leave out the last step of an epoch when it is not full.
        shuffle_images: in validation and test show every sample the pictures of another one, to see what a system
            answers without looking.
        quarantine: list of samples to leave out of training and validation (`vlm check-data` writes one).
        max_bad_samples: how many different bad samples a training may meet. A bad one is noted and left out of its
            step; one more than this ends the run.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        batch: BatchSpec,
        mixture: Mixture | None = None,
        val_sources: Sequence[Source] = (),
        test_sources: Sequence[Source] = (),
        predict_sources: Sequence[Source] = (),
        max_tokens: int | None = None,
        val_batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        drop_last: bool = False,
        shuffle_images: bool = False,
        quarantine: str | Path | None = None,
        max_bad_samples: int = 0,
    ) -> None:
        super().__init__()
        if val_batch_size < 1:
            raise UserError(f"data.val_batch_size must be at least 1, found {val_batch_size}")
        if max_bad_samples < 0:
            raise UserError(f"data.max_bad_samples must not be negative, found {max_bad_samples}")
        self.sources = list(sources)
        self.val_sources = list(val_sources)
        self._kept: Sequence[Kept] = ()
        if quarantine is not None:
            self._kept = Quarantine(quarantine, [*sources, *val_sources]).kept()
            self.sources, self.val_sources = list(self._kept[: len(sources)]), list(self._kept[len(sources) :])
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
        self.max_tokens = max_tokens
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.drop_last = drop_last
        self.shuffle_images = shuffle_images
        self.quarantine = quarantine
        self.max_bad_samples = max_bad_samples
        self._samples: Concat | None = None

    @property
    def samples(self) -> Concat:
        """All sources as one; opened on first use."""
        if self._samples is None:
            self._samples = Concat(self.sources)
        return self._samples

    def setup(self, stage: str) -> None:
        if self._kept and stage in ("fit", "validate"):
            counts = [len(source.left_out) for source in self._kept]
            rank_zero_only(print)(
                f"quarantine: {sum(counts[: len(self.sources)]):,} samples are left out of the training and "
                f"{sum(counts[len(self.sources) :]):,} of the validation ({self.quarantine})",
                flush=True,
            )

    def preparation(self) -> Callable[[Sample, int], Sample] | None:
        """What this kind of training does to a sample (given its seed) before it is encoded.

        A plain function: it travels to workers, the data module does not.
        """
        return None

    def turns(self) -> DrawGroups | None:
        """Draws that the mixture takes together where chance picks their source; None: each alone."""
        return None

    def draws(self, epoch: int) -> Sequence[int]:
        """The epoch in order (see `vlm.data.loading.loader.Plan` for what a draw is)."""
        if self.mixture is None:
            return shuffled(len(self.samples), seed=self.seed, epoch=epoch)
        sizes = {source.name: len(source) for source in self.sources}
        if self.mixture.ranks is not None:
            each = {"rank_batch": self.batch.size // self.mixture.ranks}
            orders = rank_orders(list(sizes.values()), ranks=self.mixture.ranks, seed=self.seed, epoch=epoch, **each)
            return ranks_together(orders, **each)
        samples, visits = self.mixture.draws(sizes, seed=self.seed, epoch=epoch, turns=self.turns())
        return (samples + visits * len(self.samples)).tolist()

    def steps(self, epoch: int, *, encoder: Encoder) -> list[list[int]]:
        """The draws of every optimizer step of the epoch: a function of (seed, epoch) alone."""
        draws = self.draws(epoch)
        lengths = None
        if self.batch.unit != "samples":
            lengths = self.lengths(draws, epoch=epoch, encoder=encoder)
        return batch_draws(draws, self.batch, lengths=lengths, drop_last=self.drop_last)

    def lengths(self, draws: Sequence[int], *, epoch: int, encoder: Encoder) -> list[int]:
        """Tokens of each draw, for batches that are counted in rows or tokens."""
        tolerant = self.max_bad_samples > 0
        return draw_lengths(encoder, draws, epoch=epoch, num_workers=self.num_workers, tolerant=tolerant)

    def identity(self) -> dict[str, Any]:
        """What decides the samples of a step: a run cannot resume with another one."""
        return {
            "data.batch": dataclasses.asdict(self.batch),
            "data.mixture": None if self.mixture is None else dataclasses.asdict(self.mixture),
            "data.seed": self.seed,
            "data.drop_last": self.drop_last,
            "data.quarantine": fingerprint(self._kept[: len(self.sources)]),
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
        encoder = Encoder(self.samples, codec, self.seed, self.preparation())
        loader = StepLoader(
            encoder,
            plan=lambda epoch: self.steps(epoch, encoder=encoder),
            world=world,
            rank=rank,
            accumulate=accumulate,
            max_tokens=self.max_tokens,
            num_workers=self.num_workers,
            identity=self.identity(),
            progress=progress,
            sealed=sealed,
            max_bad_samples=self.max_bad_samples,
            gather=gather,
        )
        if not len(loader):
            raise UserError(
                f"data.drop_last leaves no step of the {len(self.samples)} training samples, "
                f"which are less than {self.batch.size} {self.batch.unit}; lower data.batch.size"
            )
        return loader

    def eval_loader(
        self,
        samples: Source,
        codec: Codec,
        *,
        indices: Sequence[int] | None = None,
        judged_by: str | None = None,
        world: int = 1,
        rank: int = 0,
        sealed: bool = False,
    ) -> StepLoader:
        """In order, every sample once over all ranks; the same number of packs on each, filled up with fillers.

        Args:
            indices: of `samples`, those to load; all by default.
            judged_by: the samples are to be answered (see `Batch.judged_by`).
        """
        size = self.val_batch_size * world
        steps = batch_draws(range(len(samples)) if indices is None else indices, BatchSpec(size))
        return StepLoader(
            Encoder(samples, codec, self.seed, self.preparation(), training=False, judged_by=judged_by),
            plan=lambda epoch: steps,
            world=world,
            rank=rank,
            max_tokens=self.max_tokens,
            num_workers=self.num_workers,
            fixed=True,
            sealed=sealed,
        )

    def train_dataloader(self) -> StepLoader:
        trainer = self._checked_trainer()
        accumulate = trainer.accumulate_grad_batches
        loader = self.train_loader(
            self._codec(),
            accumulate=accumulate,
            progress=TrainerProgress(trainer),
            sealed=True,
            gather=gather_over_ranks() if self.max_bad_samples else None,
            **self._ranks(),
        )
        limit, packs = trainer.limit_train_batches, len(loader)
        used = min(packs, limit) if isinstance(limit, int) else int(packs * limit)
        if used % accumulate or (isinstance(limit, float) and limit < 1 and self.batch.unit != "samples"):
            raise UserError(
                f"trainer.limit_train_batches={limit} (or fast_dev_run) ends in the middle of an optimizer step; "
                f"give a whole number that is a multiple of trainer.accumulate_grad_batches={accumulate}"
            )
        every = trainer.val_check_interval
        if isinstance(every, int) and every > used and trainer.check_val_every_n_epoch is not None and self.val_sources:
            raise UserError(
                f"trainer.val_check_interval={every} is more than the {used} packs of an epoch; lower it, or set "
                "trainer.check_val_every_n_epoch: null to count on over the epochs"
            )
        return loader

    def val_dataloader(self) -> list[StepLoader]:
        return self._eval_loaders(self.val_sources, "data.val_sources")

    def test_dataloader(self) -> list[StepLoader]:
        return self._eval_loaders(self.test_sources, "data.test_sources")

    def predict_dataloader(self) -> DataLoader:
        """Lists of at most `val_batch_size` samples, every sample once over all ranks.

        All ranks get the same number of lists, the last of a rank may be empty: generation of a sharded model needs
        every rank in every step.
        """
        samples = Concat(self.predict_sources, key="data.predict_sources")
        self._checked_trainer()
        dataset = PredictDataset(samples, size=self.val_batch_size, **self._ranks())
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.num_workers,
            multiprocessing_context=worker_context(self.num_workers),
            generator=torch.Generator(),
        )

    def _eval_loaders(self, sources: Sequence[Source], key: str) -> list[StepLoader]:
        trainer = self._checked_trainer()
        if not sources:
            if trainer.state.fn != "fit":
                raise UserError(f"{key} is empty: there is nothing to {trainer.state.fn}; name the files there")
            return []
        samples: Source = Concat(sources, key=key)
        parts = split(samples, trainer.lightning_module.judges)  # type: ignore[arg-type]
        if self.shuffle_images:
            samples = ShuffledImages(samples, seed=self.seed)
        return [
            self.eval_loader(samples, self._codec(), indices=indices, judged_by=name, sealed=True, **self._ranks())
            for name, indices in parts.items()
        ]

    def _codec(self) -> Codec:
        assert self.trainer is not None
        return self.trainer.lightning_module.codec  # type: ignore[return-value]

    def _ranks(self) -> dict[str, int]:
        # not the trainer's world size: ranks that hold parts of one model (tensor parallel) see the same data
        assert self.trainer is not None
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return {"world": ranks["num_replicas"], "rank": ranks["rank"]}

    def _checked_trainer(self) -> L.Trainer:
        assert self.trainer is not None
        if self.trainer.world_size > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
            raise UserError("the data deals its own samples to the ranks; set trainer.use_distributed_sampler: false")
        if self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise UserError("trainer.overfit_batches would replace the sampler; use trainer.limit_train_batches")
        return self.trainer
