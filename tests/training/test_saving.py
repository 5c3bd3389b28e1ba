"""When states are saved, how, and by whom: behind the training, by minutes, at a signal that one rank alone has got."""

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, distributed

import vlm.checkpoints.files.writing
from callbacks import EMA, ResumeCheckpoint
from tests.support.ranks import run_ranks
from tests.support.samples import samples
from tests.support.systems import make
from tests.support.training import ListSource, trainer, weights
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.resume.background import BackgroundWriter
from vlm.checkpoints.resume.opened import read_trained
from vlm.checkpoints.resume.pointer import read_last
from vlm.checkpoints.resume.single_file import AtomicCheckpointIO
from vlm.commands.export import export
from vlm.data import BatchSpec, InstructionData
from vlm.errors import UserError
from vlm.stages import Trained

MINUTES = {"every_n_train_steps": None, "every_n_minutes": 1e-9, "background": True, "keep": 9}
"""Behind the training after every step."""


class At(L.Callback):
    """Does something in a hook of the step after so many steps."""

    def __init__(self, step: int, hook: str, action: Callable[[], None]) -> None:
        self.step, self.action = step, action
        setattr(self, hook, self._call)

    def _call(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.action()


def fit(
    folder: Path, *callbacks: L.Callback, how: str | None = None, every: int | None = None, **checkpoint: Any
) -> dict[str, Tensor]:
    """Six steps of three samples, from the newest state on, validated after every so many; the trained weights."""
    module = make("llava_1_5", {"connector": Trained(lr=1e-2)})
    source = ListSource(samples(folder))
    data = InstructionData(
        [source], val_sources=[source] if every else [], batch=BatchSpec(3), val_batch_size=2, seed=5
    )
    world = distributed.get_world_size() if how else 1
    run = trainer(
        folder / "run",
        world=world,
        fsdp="32-true" if how == "fsdp" else None,
        max_steps=6,
        **({"val_check_interval": every, "check_val_every_n_epoch": None} if every else {}),
        enable_checkpointing=True,
        callbacks=[*callbacks, ResumeCheckpoint(**checkpoint)],
        plugins=[AtomicCheckpointIO()],
        **({"strategy": "ddp"} if how == "ddp" else {}),
    )
    run.fit(module, data, ckpt_path=read_last(folder / "run" / "checkpoints"))
    return weights(module)


def states(folder: Path) -> dict[str, bytes]:
    files = [path for path in (folder / "run" / "checkpoints").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_for(state: str, write: Callable[..., Any]) -> Callable[..., Any]:
    """`write`, but for this state; those before it may still be on their way behind the training."""

    def write_others(*arguments: Any, **options: Any) -> Any:
        names = [argument.name for argument in arguments if hasattr(argument, "name")]
        return no_space() if any(state in str(name) for name in names) else write(*arguments, **options)

    return write_others


def test_states_are_written_behind_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, every_n_train_steps=1, keep=9)
    expected = states(tmp_path)
    assert len(expected) == 7
    shutil.rmtree(tmp_path / "run")
    real, first, going_on = AtomicCheckpointIO.save_checkpoint, [True], threading.Event()

    def slow(*arguments: Any, **options: Any) -> None:
        if first:
            first.clear()
            assert going_on.wait(60), "the training waits for its first state"
        real(*arguments, **options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", slow)
    fit(tmp_path, At(1, "on_before_optimizer_step", going_on.set), **MINUTES)
    assert states(tmp_path) == expected


def test_what_could_not_be_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", no_space_for("step=3.ckpt", torch.save))
    with pytest.raises(UserError, match="no space left"):
        fit(tmp_path, **MINUTES)
    monkeypatch.undo()
    assert set(states(tmp_path)) == {f"run/checkpoints/{name}" for name in ("last", "step=1.ckpt", "step=2.ckpt")}
    writer, order = BackgroundWriter(), []
    for number in range(3):
        writer.start(partial(order.append, number))
    writer.start(no_space)
    while not writer.has_failed:
        pass
    with pytest.raises(OSError, match="No space"):
        writer.start(partial(order.append, 3))
    writer.wait()
    assert order == [0, 1, 2], "one after the other, and none behind an error"
    for wrong in ({"every_n_train_steps": None}, {"every_n_minutes": 0}, {"every_n_train_steps": 0}):
        with pytest.raises(UserError, match=r"^checkpoint"):
            ResumeCheckpoint(**wrong)


def _on_two_ranks(folder: Path) -> None:
    """Two ranks; the second one gets the signal, and cannot write."""
    second = distributed.get_rank() == 1
    for how in ("ddp", "fsdp"):
        here = folder / how
        whole = fit(here, how=how, every_n_train_steps=1, keep=9)
        expected = states(here)
        _start_afresh(here)
        # in the middle of a step: when the ranks have asked each other already, and at its start
        stops = ((1, "on_before_optimizer_step", 2), (4, "on_train_batch_start", 1))
        for step, hook, later in stops if how == "ddp" else stops[:1]:
            stop = At(step, hook, partial(os.kill, os.getpid(), signal.SIGTERM) if second else lambda: None)
            with pytest.raises(SIGTERMException) as stopped:
                fit(here, stop, how=how, every_n_train_steps=100)
            assert stopped.value.args == (signal.SIGTERM,)
            last = read_last(here / "run" / "checkpoints")
            assert last is not None
            assert last.name == f"step={step + later}.ckpt"
        resumed = fit(here, how=how)
        assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
        _start_afresh(here)
    _cut_a_validation(here, second)
    _start_afresh(here)
    fit(here, how="fsdp", **MINUTES)
    assert states(here) == expected
    _start_afresh(here)
    write = vlm.checkpoints.files.writing._write_shard
    if second:
        vlm.checkpoints.files.writing._write_shard = no_space_for("step=3.ckpt", write)
    with pytest.raises(UserError, match="no space left"):
        fit(here, how="fsdp", **MINUTES)
    vlm.checkpoints.files.writing._write_shard = write
    distributed.barrier()
    last = read_last(here / "run" / "checkpoints")
    assert last is not None
    assert last.name == "step=2.ckpt"
    assert sorted(path.name for path in last.parent.iterdir()) == ["last", "step=1.ckpt", "step=2.ckpt"]


def _cut_a_validation(folder: Path, second: bool) -> None:
    """The second rank gets the signal in the first batch of one, which takes moving averages; it begins again."""
    validations: list[int] = []
    count = At(4, "on_validation_batch_start", lambda: validations.append(1))
    whole = fit(folder, count, EMA(0.9), how="fsdp", every=2)
    batches = len(validations)
    _start_afresh(folder)
    stop = At(4, "on_validation_batch_start", partial(os.kill, os.getpid(), signal.SIGTERM) if second else lambda: None)
    with pytest.raises(SIGTERMException):
        fit(folder, count, EMA(0.9), stop, how="fsdp", every=2, every_n_train_steps=100)
    assert batches > len(validations) - batches
    last = read_last(folder / "run" / "checkpoints")
    assert last is not None
    assert last.name == "step=4.ckpt"
    validations.clear()
    resumed = fit(folder, count, EMA(0.9), how="fsdp", every=2)
    assert len(validations) == batches
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def _start_afresh(folder: Path) -> None:
    distributed.barrier()
    if distributed.get_rank() == 0:
        shutil.rmtree(folder / "run")
    distributed.barrier()


def test_two_ranks(tmp_path: Path) -> None:
    for how in ("ddp", "fsdp"):
        (tmp_path / how).mkdir()
        samples(tmp_path / how)
    run_ranks(_on_two_ranks, 2, tmp_path)
    # what they have left, without them
    state = tmp_path / "fsdp" / "run" / "checkpoints" / "step=2.ckpt"
    export(state, tmp_path / "hf")
    written = dict(WeightFiles(tmp_path / "hf").items())
    projector = next(
        tensor for name, tensor in written.items() if name.endswith("multi_modal_projector.linear_1.weight")
    )
    assert any(torch.equal(projector, tensor) for _, tensor in read_trained(state).items())
