"""Metrics of answers in validation and test."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from vlm.batch import Batch
from vlm.checkpoints.files.atomic import atomic_file
from vlm.errors import UserError
from vlm.metrics.judges import Judges
from vlm.language import Decoding
from vlm.metrics import AnswerMetric, Answers
from vlm.module import VisionLanguageModule
from vlm.evaluation.scores import table, write_scores
from vlm.evaluation.submissions import Submission


class Evaluation(Callback):
    """Lets the system answer the validation or test samples, and judges the answers.

    Values are logged as `val/<source or task>/<metric>` (`test/...` in `vlm test`). `vlm validate` and `vlm test` also
    print them and write, under `evaluation/<name>` in the run folder, `scores.json`, `answers.jsonl` and the
    `submission`.

    Args:
        metrics: by source or task; a source's come before its task's. Samples of neither are not answered.
        decoding: how answers are searched for.
        name: of the folder; `validate` or `test` by default.
        submission: a form in which a benchmark's server or judge takes the answers (`vlm.evaluation.submissions`).
    """

    def __init__(
        self,
        metrics: dict[str, AnswerMetric | list[AnswerMetric]] | None = None,
        decoding: Decoding = Decoding(),  # noqa: B008  (frozen)
        name: str | None = None,
        submission: Submission | None = None,
    ) -> None:
        listed = {key: [*value] if isinstance(value, list) else [value] for key, value in (metrics or {}).items()}
        for key, found in listed.items():
            kinds = [type(metric).__name__ for metric in found]
            if not kinds or len(set(kinds)) < len(kinds):
                raise UserError(f"evaluation.metrics.{key}: name at least one metric, and each once; found {kinds}")
        if name is not None and Path(name).name != name:
            raise UserError(f"evaluation.name is the name of a folder, found {name!r}")
        self.metrics: Mapping[str, list[AnswerMetric]] = listed
        self.decoding = decoding
        self.name = name
        self.submission = submission
        self.answers = {key: Answers() for key in listed}
        self.scores: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        pl_module.judges = Judges(self.metrics, self.decoding)
        if self.submission is not None and stage != "fit":
            self.submission.check()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for key, metrics in self.metrics.items():
            for metric in (*metrics, self.answers[key]):
                metric.reset()
                metric.to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch.judged_by is None:
            return
        for metric in (*self.metrics[batch.judged_by], self.answers[batch.judged_by]):
            metric.update(outputs["answers"], batch.samples)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.scores = {
            f"{key}/{name}": value
            for key, metrics in self.metrics.items()
            for metric in metrics
            for name, value in metric.values().items()
        }
        when = "test" if trainer.testing else "val"
        for name, value in self.scores.items():
            pl_module.log(f"{when}/{name}", value, batch_size=1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn is None or trainer.state.fn == "fit":
            return
        rows = {key: answers.over_ranks() for key, answers in self.answers.items()}  # every rank
        if not trainer.is_global_zero:
            return
        when = "test" if trainer.testing else "val"
        logged = {name.removeprefix(f"{when}/"): value.item() for name, value in trainer.callback_metrics.items()}
        scores = {name: value for name, value in logged.items() if name not in self.scores} | self.scores
        counts = {key: len(found) for key, found in rows.items()}
        assert isinstance(pl_module, VisionLanguageModule)
        folder = Path(trainer.default_root_dir) / "evaluation" / (self.name or str(trainer.state.fn.value))
        print(table({when: scores}, counts))
        print(f"{write_scores(folder, scores=scores, counts=counts, weights=pl_module.weights or 'untrained').parent}")
        every = [row for found in rows.values() for row in found]
        if rows:
            with atomic_file(folder / "answers.jsonl") as file:
                file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in every)
        if rows and self.submission is not None:
            content = self.submission.content(every)
            with atomic_file(folder / self.submission.file) as file:
                file.write(content)
            print(f"for the benchmark's server or judge: {folder / self.submission.file}")

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end
