"""What a system sees, is trained on and says, in TensorBoard."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.switched import SwitchedCallback
from vlm.codec import Codec, step_counts
from vlm.data import VisionLanguageData
from vlm.data.loading.encoder import Encoder
from vlm.data.loading.trainer_progress import ends_step, is_finished
from vlm.data.sources.base import Concat
from vlm.errors import SampleError, UserError
from vlm.geometry import Box, View
from vlm.language import Decoding
from vlm.module import VisionLanguageModule
from vlm.drawing.panels import Panel, Piece, as_text, draw, pieces_of, views_as_seen
from vlm.sample import Sample


@dataclass(frozen=True)
class _Shown:
    """A sample, the images it is seen with, what boxes of the first one count from, and its tokens."""

    sample: Sample
    pictures: tuple[Any, ...]
    view: View | None
    pieces: tuple[Piece, ...]


class Predictions(SwitchedCallback):
    """Shows the same few samples at every validation, the one before the first step included.

    A panel `predictions/<i>` has the images as the network sees them, the prompt, the target, what the system says
    to it (greedy), boxes that either of them names, and the tokens with the trained ones in colour. The samples lie
    evenly over `data.val_sources`; without any, over the training data, and then they are shown every `every_n_steps`
    and at the end.

    Loggers other than TensorBoard's are left alone. The ranks of a sharded system generate together; otherwise the
    first one does it while the others wait.

    Args:
        num_samples: how many are shown.
        max_new_tokens: limit on what is said.
        every_n_steps: optimizer steps between two times in a run without validation.
        enabled: false switches it off.
    """

    def __init__(
        self, num_samples: int = 4, max_new_tokens: int = 64, every_n_steps: int = 500, enabled: bool = True
    ) -> None:
        for name, value in (("num_samples", num_samples), ("every_n_steps", every_n_steps)):
            if value < 1:
                raise UserError(f"predictions.{name} must be at least 1, found {value}")
        self.num_samples = num_samples
        self.decoding = Decoding(max_new_tokens=max_new_tokens)
        self.every_n_steps = every_n_steps
        self.enabled = enabled
        self._shown: list[_Shown] | None = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _validates(trainer) and trainer.global_step == 0:
            self._show(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_whole = ends_step(trainer, batch_idx)
        if is_whole and trainer.global_step % self.every_n_steps == 0 and not _validates(trainer):
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _validates(trainer) and trainer.global_step % self.every_n_steps and is_finished(trainer):
            self._show(trainer, pl_module)

    def _show(self, trainer: Trainer, module: LightningModule) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not loggers or not isinstance(data, VisionLanguageData):
            return
        assert isinstance(module, VisionLanguageModule)
        if self._shown is None:
            self._shown = self._choose(data, module) if trainer.is_global_zero else []
        answers: list[str] | list[None] = [None] * len(self._shown)
        speaks = type(module).answers is not VisionLanguageModule.answers
        if speaks and (module.is_sharded or trainer.is_global_zero):
            answers = module.generate([shown.sample for shown in self._shown], decoding=self.decoding)
        step = max(0, trainer.global_step - 1)  # where Lightning writes the step's losses
        for index, (shown, answer) in enumerate(zip(self._shown, answers, strict=True)):
            panel = _panel(shown, answer, steps=trainer.global_step, codec=module.codec)
            for logger in loggers:
                logger.experiment.add_image(f"predictions/{index}", np.asarray(draw(panel)), step, dataformats="HWC")
                logger.experiment.add_text(f"predictions/{index}", panel.markdown(), step)

    def _choose(self, data: VisionLanguageData, module: VisionLanguageModule) -> list[_Shown]:
        """Samples evenly over the data; of one that cannot be read its neighbour takes the place."""
        samples = Concat(data.val_sources, key="data.val_sources") if data.val_sources else data.samples
        encoder = Encoder(samples, module.codec, data.seed, data.preparation(), training=False)
        count = min(self.num_samples, len(samples))
        chosen: list[_Shown] = []
        for place in range(count):
            first, end = (len(samples) * p // count for p in (place, place + 1))
            for index in range(first, min(end, first + 10)):
                try:
                    chosen.append(_prepare(encoder, index))
                    break
                except SampleError:  # told to the user by the loader that comes to it
                    continue
        return chosen


def _validates(trainer: Trainer) -> bool:
    data = trainer.datamodule  # type: ignore[attr-defined]
    return trainer.enable_validation and isinstance(data, VisionLanguageData) and bool(data.val_sources)


def _prepare(encoder: Encoder, index: int) -> _Shown:
    codec = encoder.codec
    encoded = encoder(index, epoch=0)
    sample = encoded.sample
    batch = codec.collate([encoded], counts=step_counts([encoded]))
    pictures = [picture for views in views_as_seen(batch, codec).values() for _, picture in views]
    tokenizer = getattr(codec, "tokenizer", None)  # not every codec has one kind of token
    sequences = [*encoded.text, *(sequence for row in encoded.rows.values() for sequence in row)]
    pieces = [piece for s in sequences for piece in pieces_of(s, tokenizer.decode)] if tokenizer is not None else []
    sizes = [size for views in batch.views.values() for size in views.size]
    return _Shown(sample, tuple(pictures), codec.view(*sizes[0]) if sizes else None, tuple(pieces))


def _panel(shown: _Shown, answer: str | None, *, steps: int, codec: Codec) -> Panel:
    sample = shown.sample
    *turns, last = sample.messages
    is_answer = last.role == "assistant"
    target = as_text([last]) if is_answer else " | ".join(text for text, _ in sample.answers)
    view = shown.view

    def boxes(text: str) -> list[Box]:
        return [] if view is None else [view.in_view(box) for box in codec.find_boxes(text, size=view.size)]

    return Panel(
        title=f"after {steps:,} steps     sample {sample.id}     {Path(sample.source).name}",
        pictures=shown.pictures,
        prompt=as_text(turns if is_answer else sample.messages),
        target=target,
        prediction=answer,
        pieces=shown.pieces,
        find_boxes=boxes,
    )
