"""What the three kinds of training data have in common."""

from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader

from vlm.codec import Codec
from vlm.data.loading.loader import StepLoader
from vlm.data.loading.predict_dataset import PredictDataset
from vlm.data.loading.rank_gather import Gather, gather_over_ranks
from vlm.data.loading.trainer_progress import TrainerProgress
from vlm.data.loading.workers import worker_context
from vlm.data.modules.passes import split
from vlm.data.modules.planned import PlannedData
from vlm.data.modules.trainer_checks import check_packs_of_epoch, check_trainer
from vlm.data.sampling.sharing import check_negatives
from vlm.data.sources.base import Concat, Source
from vlm.data.wrappers.shuffled_images import ShuffledImages
from vlm.errors import UserError
from vlm.evaluation.judges import Judges


class VisionLanguageData(PlannedData, L.LightningDataModule):
    """What Lightning asks of the data: its loaders by stage, on the ranks of a trainer."""

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer is not None and not self._trains:
            raise UserError("data.sources and data.batch: training needs both, the files and the published batch")
        used = {"test": self.test_sources, "predict": self.predict_sources, "validate": self.val_sources}
        if (gather := self._gather()) is not None:
            for source in used.get(stage, [*self.sources, *self.val_sources]):
                source.open_together(gather, **self._ranks())
        if stage == "fit" and self.trainer is not None:
            trainer = self._checked_trainer()
            module = trainer.lightning_module
            check_negatives(self.batch, module.in_batch_terms, system=type(module).__name__)  # type: ignore[arg-type]
            trainer.accumulate_grad_batches = self.micro_batches(
                self._codec(),
                world=self._ranks()["world"],
                given=trainer.accumulate_grad_batches,
                max_epochs=trainer.max_epochs,
                max_steps=trainer.max_steps,
            )
        if self._kept and stage in ("fit", "validate"):
            counts = [len(source.left_out) for source in self._kept]
            rank_zero_only(print)(
                f"quarantine: {sum(counts[: len(self.sources)]):,} samples are left out of the training and "
                f"{sum(counts[len(self.sources) :]):,} of the validation ({self.quarantine})",
                flush=True,
            )

        shown = {"test": self.test_sources, "predict": ()}.get(stage, (*self.sources, *self.val_sources))
        for source in shown:
            for note in source.notes():
                rank_zero_only(print)(note, flush=True)

    def train_dataloader(self) -> StepLoader:
        trainer = self._checked_trainer()
        accumulate = trainer.accumulate_grad_batches
        loader = self.train_loader(
            self._codec(),
            accumulate=accumulate,
            progress=TrainerProgress(trainer),
            sealed=True,
            gather=self._gather(),
            **self._ranks(),
        )
        check_packs_of_epoch(trainer, len(loader), self.batch, validates=bool(self.val_sources))
        return loader

    def val_dataloader(self) -> list[StepLoader]:
        return self._eval_loaders(self.val_sources, "data.val_sources")

    def test_dataloader(self) -> list[StepLoader]:
        return self._eval_loaders(self.test_sources, "data.test_sources")

    def predict_dataloader(self) -> DataLoader:
        """Lists of at most `val_batch_size` samples, every sample once over all ranks; a bad one as its `SampleError`.

        All ranks get the same number of lists, the last of a rank may be empty: generation of a sharded model needs
        every rank in every step.
        """
        self._checked_trainer()
        dataset = PredictDataset(
            self.predict_samples(), size=self.val_batch_size, answered=self.answered, **self._ranks()
        )
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.num_workers,
            multiprocessing_context=worker_context(self.num_workers),
            generator=torch.Generator(),
        )

    def predict_samples(self) -> Concat:
        return Concat(self.predict_sources, key="data.predict_sources")

    def _eval_loaders(self, sources: Sequence[Source], key: str) -> list[StepLoader]:
        trainer = self._checked_trainer()
        if not sources:
            if trainer.state.fn != "fit":
                raise UserError(f"{key} is empty: there is nothing to {trainer.state.fn}; name the files there")
            return []
        whole = Concat(sources, key=key)
        judges: Judges = trainer.lightning_module.judges  # type: ignore[assignment]
        parts = split(whole, judges)
        samples: Source = ShuffledImages(whole, seed=self.seed) if self.shuffle_images else whole
        return [
            self.eval_loader(
                samples,
                self._codec(),
                indices=indices,
                judged_by=name,
                generate=name is not None and judges.by_name[name].wants_answers,
                sealed=True,
                gather=self._gather(),
                **self._ranks(),
            )
            for name, indices in parts.items()
        ]

    def _codec(self) -> Codec:
        return self._checked_trainer().lightning_module.codec  # type: ignore[return-value]

    def _gather(self) -> Gather | None:
        return gather_over_ranks() if self._ranks()["world"] > 1 else None

    def _ranks(self) -> dict[str, int]:
        if self.trainer is None:
            return super()._ranks()
        # not the trainer's world size: ranks that hold parts of one model (tensor parallel) see the same data
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return {"world": ranks["num_replicas"], "rank": ranks["rank"]}

    def _checked_trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise UserError(
                "a trainer says how many ranks there are, and its module how it sees images; without one ask for "
                "data.train_loader(module.codec) or data.eval_loader(source, module.codec)"
            )
        check_trainer(self.trainer)
        return self.trainer
