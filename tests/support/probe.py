"""A callback for tests of resuming: notes what every micro-batch was, and kills the process group where it is told to.

`VLM_TEST_KILL=point:number` in the environment names the place:

    step      before the step after `number` finished ones
    window    in the middle of the accumulation window after `number` finished steps
    epoch     after epoch `number`
    validate  when validation begins after `number` finished steps
    stop      in the first batch of the validation after `number` finished steps, by SIGTERM to this process alone
    end       after the last step
    save      when half of this process's `number`-th checkpoint is written
    pointer   when that checkpoint is complete and `last` does not name it yet
    artefact  when the artefact's tensors are written and its `stage.json` is not

`VLM_TEST_PAUSE` is how many seconds every micro-batch waits.
"""

import io
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import vlm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import callbacks.fsdp_strategy
import vlm.checkpoints.artefact
import vlm.checkpoints.resume.single_file


def kill() -> NoReturn:
    os.killpg(os.getpgid(0), signal.SIGKILL)
    raise AssertionError("survived SIGKILL")


class Probe(Callback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        point, _, number = os.environ.get("VLM_TEST_KILL", "").partition(":")
        self.at = (point, int(number or 0)) if trainer.is_global_zero else ("", 0)
        folder = Path(trainer.default_root_dir, "probe")
        folder.mkdir(parents=True, exist_ok=True)
        self.begun = False
        self.pause = float(os.environ.get("VLM_TEST_PAUSE", "0"))
        self.log_file = open(folder / f"{trainer.global_rank}.jsonl", "a")  # noqa: SIM115
        if self.at[0] == "save":
            vlm.checkpoints.resume.single_file.torch.save = self._on_call(_save_half)
        if self.at[0] == "pointer":
            vlm.checkpoints.resume.single_file.point_last = callbacks.fsdp_strategy.point_last = self._on_call(
                lambda *_: None
            )
        if self.at[0] == "artefact":
            write = vlm.checkpoints.artefact.write_safetensors
            vlm.checkpoints.artefact.write_safetensors = self._on_call(write)

    def _on_call(self, function: Callable) -> Callable:
        """The real thing, but the n-th call does `function` and kills."""
        real, calls = {_save_half: torch.save}.get(function, vlm.checkpoints.resume.single_file.point_last), []

        def call(*args: Any, **options: Any) -> Any:
            calls.append(0)
            if len(calls) < self.at[1]:
                return real(*args, **options)
            function(*args, **options)
            return kill()

        return call

    def _reached(self, point: str, number: int) -> None:
        if self.at == (point, number):
            kill()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and not self.begun:
            self.begun = True
            folder = Path(trainer.default_root_dir, "probe")
            (folder / f"start-{sum(path.suffix == '' for path in folder.iterdir()) + 1}").touch()
        time.sleep(self.pause)
        self.rates = [group["lr"].hex() for group in trainer.optimizers[0].param_groups]
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._reached("step", trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        entry = {
            "step": trainer.global_step - whole,
            "micro_batch": [trainer.current_epoch, batch_idx],
            "loss": float(outputs["loss"]).hex(),
            "lr": self.rates,
            "ids": [info.id for info in batch.samples if not info.filler],
        }
        self.log_file.write(json.dumps(entry) + "\n")
        self.log_file.flush()
        if not whole:
            self._reached("window", trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._reached("validate", trainer.global_step)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if not trainer.sanity_checking and self.at == ("stop", trainer.global_step):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reached("epoch", trainer.current_epoch)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.log_file.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reached("end", 0)


def _save_half(checkpoint: Any, file: Any) -> None:
    buffer = io.BytesIO()
    _SAVE(checkpoint, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    os.fsync(file.fileno())


_SAVE = torch.save
