"""What a system is worth in validation and test."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from vlm.batch import Batch
from vlm.checkpoints.files.atomic import atomic_file
from vlm.errors import UserError
from vlm.evaluation.judges import AnswerJudge, Judge, Judges
from vlm.language import Decoding
from vlm.metrics import AnswerMetric
from vlm.module import VisionLanguageModule
from vlm.evaluation.scores import table, write_scores
from vlm.evaluation.submissions import Submission


class Evaluation(Callback):
    """Judges what the system says to the validation or test samples: its answers, or how it finds images and texts.

    Values are logged as `val/<source or task>/<metric>` (`test/...` in `vlm test`). `vlm validate` and `vlm test` also
    print them and write, under `evaluation/<name>` in the run folder, `scores.json`, `answers.jsonl` and the
    `submission`.

    Args:
        metrics: by source or task; a source's come before its task's. Samples of neither are not judged. Metrics of
            answers, or `vlm.evaluation.Retrieval`.
        decoding: how answers are searched for.
        name: of the folder; `validate` or `test` by default.
        submission: a form in which a benchmark's server or judge takes the answers (`vlm.evaluation.submissions`).
    """

    def __init__(
        self,
        metrics: dict[str, AnswerMetric | Judge | list[AnswerMetric]] | None = None,
        decoding: Decoding = Decoding(),  # noqa: B008  (frozen)
        name: str | None = None,
        submission: Submission | None = None,
    ) -> None:
        self.judges: dict[str, Judge] = {
            key: value if isinstance(value, Judge) else _answer_judge(key, value, decoding)
            for key, value in (metrics or {}).items()
        }
        if name is not None and Path(name).name != name:
            raise UserError(f"evaluation.name is the name of a folder, found {name!r}")
        self.name = name
        self.submission = submission
        self.scores: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        pl_module.judges = Judges(self.judges)
        for judge in self.judges.values():
            judge.check()
        if self.submission is not None and stage != "fit":
            self.submission.check()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for judge in self.judges.values():
            judge.start(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch.judged_by is not None:
            self.judges[batch.judged_by].hear(outputs["said"], batch.samples)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.scores = {
            f"{key}/{name}": value
            for key, judge in self.judges.items()
            for name, value in judge.finish(pl_module).items()
        }
        when = "test" if trainer.testing else "val"
        for name, value in self.scores.items():
            pl_module.log(f"{when}/{name}", value, batch_size=1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn is None or trainer.state.fn == "fit":
            return
        rows = {key: judge.records() for key, judge in self.judges.items()}  # every rank
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
        if every:
            with atomic_file(folder / "answers.jsonl") as file:
                file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in every)
        if every and self.submission is not None:
            content = self.submission.content(every)
            with atomic_file(folder / self.submission.file) as file:
                file.write(content)
            print(f"for the benchmark's server or judge: {folder / self.submission.file}")

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end


def _answer_judge(key: str, metrics: AnswerMetric | list[AnswerMetric], decoding: Decoding) -> AnswerJudge:
    listed = metrics if isinstance(metrics, list) else [metrics]
    kinds = [type(metric).__name__ for metric in listed]
    if not kinds or len(set(kinds)) < len(kinds):
        raise UserError(f"evaluation.metrics.{key}: name at least one metric, and each once; found {kinds}")
    return AnswerJudge(listed, decoding)
