"""What a system answers to `data.predict_sources`, in one file."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from callbacks.progress import say
from vlm.checkpoints.files.atomic import atomic_file
from vlm.checkpoints.published.open import is_artefact
from vlm.checkpoints.resume.opened import read_trained
from vlm.data import VisionLanguageData
from vlm.data.loading.predict_dataset import PredictDataset
from vlm.errors import SampleError, UserError
from vlm.language import Decoding
from vlm.module import VisionLanguageModule
from vlm.sample import RefPart, Sample, TextPart

FILE = "answers.jsonl"
ASKED, BAD = "asked.json", "bad"


class AnswerWriter(Callback):
    """Writes a line for each sample of `vlm predict -c ...`, in the order of the data: id, images, prompt, answer.

    While it runs, each rank adds to a file of its own in `<out>.parts`, line by line. The same command, killed and
    started again on any number of ranks, asks what is not answered yet. At the end the parts become `out`, in one
    piece. A sample that cannot be answered is named and counted; the parts then stay, so that it can be mended and the
    same command asks it again.

    Args:
        out: the JSONL file; by default `answers.jsonl` in `trainer.default_root_dir`.
        decoding: how answers are searched for, or which texts are chosen from.

    Attributes:
        failed: how many samples could not be answered; known to the first rank.
    """

    def __init__(self, out: Path | None = None, decoding: Decoding = Decoding()) -> None:  # noqa: B008  (frozen)
        self.out = out
        self.decoding = decoding
        self.failed = 0
        self._part: IO[str] | None = None
        self._bad: dict[int, str] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        assert isinstance(pl_module, VisionLanguageModule)
        pl_module.decoding = self.decoding
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        data = _data(trainer)
        self._out = Path(self.out or Path(trainer.default_root_dir) / FILE)
        self._parts = self._out.with_name(f"{self._out.name}.parts")
        self._samples = data.predict_samples()
        found: set[int] | str = ""
        if trainer.is_global_zero:
            try:
                found = self._begin(pl_module)
            except UserError as error:  # every rank ends with it: else the others wait for this one
                found = str(error)
        found = trainer.strategy.broadcast(found)
        if isinstance(found, str):
            raise UserError(found)
        data.answered = found

    def _begin(self, module: VisionLanguageModule) -> set[int]:
        """The folder of parts, and which samples it has answers to."""
        if self._out.exists() and not self._parts.exists():
            raise UserError(f"{self._out}: exists already; remove it, or give another file by answers.out")
        asked = {
            "samples": len(self._samples),
            "sources": [source.name for source in self._samples.sources],
            "weights": _fingerprint(module.weights),
            "decoding": json.loads(json.dumps(dataclasses.asdict(self.decoding))),
        }
        file = self._parts / ASKED
        if not file.exists():
            with atomic_file(file) as target:
                target.write(json.dumps(asked, indent=1).encode())
        before = json.loads(file.read_text())
        if other := [key for key in asked if before.get(key) != asked[key]]:
            raise UserError(
                f"{self._parts}: its answers have other {other[0]} ({before.get(other[0])} and now {asked[other[0]]}); "
                "remove the folder, or give another file by answers.out"
            )
        for left in self._parts.glob(f"{BAD}-*"):  # they are asked again
            left.unlink()
        answers = {position: row["id"] for position, row in _rows(self._parts)}
        for position, name in answers.items():
            if self._samples[position].id != name:
                raise UserError(
                    f"{self._parts}: has an answer to {name!r} where the data has another sample now; remove the "
                    "folder, or put the data back"
                )
        if answers:
            say(f"{len(answers):,} of {len(self._samples):,} samples are answered already")
        return set(answers)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._bad = {}
        path = self._parts / f"answers-{trainer.global_rank}.jsonl"
        _cut_half_line(path)
        self._part = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed at the end of predict)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Sequence[str | SampleError],
        batch: Sequence[Sample | SampleError],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        dataset = getattr(trainer.predict_dataloaders, "dataset", None)
        assert isinstance(dataset, PredictDataset)
        for position, sample, answer in zip(dataset.positions(batch_idx), batch, outputs, strict=True):
            if isinstance(answer, SampleError):
                self._bad[position] = str(answer)
                tqdm.write(f"not answered: {answer}", file=sys.stderr)
            elif self._part is not None:
                assert isinstance(sample, Sample)
                self._part.write(json.dumps([position, _row(sample, answer)], ensure_ascii=False) + "\n")
        if self._part is not None:
            self._part.flush()  # hours of answers survive whatever comes

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._part is None:
            self.failed = len(self._bad)
            return
        self._close()
        bad = "".join(f"{json.dumps([position, reason])}\n" for position, reason in self._bad.items())
        (self._parts / f"{BAD}-{trainer.global_rank}.jsonl").write_text(bad)
        trainer.strategy.barrier("answers")  # all parts are written
        if trainer.is_global_zero:  # and it alone ends in status 1: Lightning would kill it if another rank did
            self.failed = self._merge()

    def _merge(self) -> int:
        """One file of all parts; returns how many samples could not be answered."""
        answers, bad = dict(_rows(self._parts)), dict(_rows(self._parts, BAD))
        if left := len(self._samples) - len(answers) - len(bad):
            say(f"{left:,} of {len(self._samples):,} samples were not asked; start it again to go on")
            return len(bad)
        with atomic_file(self._out) as file:
            for position in sorted(answers):
                file.write(f"{json.dumps(answers[position], ensure_ascii=False)}\n".encode())
        say(f"written: {self._out} ({len(answers):,} answers)")
        if bad:
            say(f"{len(bad):,} of {len(self._samples):,} samples could not be answered; mend them and start it again")
        else:
            shutil.rmtree(self._parts)
        return len(bad)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._part is not None:
            self._part.close()
            self._part = None


def _data(trainer: Trainer) -> VisionLanguageData:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, VisionLanguageData)
    return data


def _fingerprint(weights: str | None) -> str:
    if weights is None:
        return "untrained"
    return read_trained(weights).fingerprint if is_artefact(weights) else str(weights)


def _row(sample: Sample, answer: str) -> dict[str, Any]:
    """A line of the file; the prompt is what the user said last."""
    asked = next((m.content for m in reversed(sample.messages) if m.role == "user"), ())
    prompt = "".join(part.text if isinstance(part, (TextPart, RefPart)) else "" for part in asked).strip()
    row = {"id": sample.id, "source": sample.source, "images": [image.name for image in sample.images]}
    return row | {"prompt": prompt, "answer": answer}


def _rows(parts: Path, kind: str = "answers") -> Iterator[tuple[int, Any]]:
    """(position, what stands there) of all ranks' whole lines."""
    for path in sorted(parts.glob(f"{kind}-*.jsonl")):
        data = path.read_bytes()
        for line in data[: data.rfind(b"\n") + 1].splitlines():
            position, row = json.loads(line)
            yield position, row


def _cut_half_line(path: Path) -> None:
    """What a killed process left."""
    if path.exists():
        data = path.read_bytes()
        with open(path, "r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
