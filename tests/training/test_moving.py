"""Momentum copies, queues and moving averages: one process, ranks, resume, artefacts.

Tolerances stand beside what was measured; where nothing but the order of sums differs, that is about 1e-6.
"""

import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, distributed

import vlm.moving
from callbacks import EMA, FSDP2Strategy, Health, MixedPrecisionFSDP
from callbacks.stage_transition import write_stage
from tests.conftest import golden, golden_json
from tests.support.itc import FeatureQueue, contrast, itc, pairs
from tests.support.ranks import run_ranks
from tests.support.training import ListSource, Recorder, full, trainer, weights
from vlm.checkpoints.artefact import read_artefact
from vlm.checkpoints.resume.single_file import AtomicCheckpointIO
from vlm.data import BatchSpec, InstructionData
from vlm.errors import UserError
from vlm.moving import exchange, move_towards
from vlm.stages import AdamW, InitFrom, Stage, Trained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

PARTS = ("vision", "text", "projections", "head")
STEPS = 5
"""Of 8 samples in 4 packs; an epoch has 3."""


def build(**stage: Any) -> Any:
    module = itc()
    train = {part: Trained(lr=1e-2) for part in PARTS}
    module.stage = Stage("1_contrast", train, modes={"momentum": "train"}, optimizer=AdamW(eps=1e-4), **stage)
    return module


def fit(folder: Path, out: Path, how: str, *, resume: Path | None = None, steps: int = STEPS, **stage: Any) -> dict:
    """The run's losses, and every tensor in full on every rank; a checkpoint is left after each step."""
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    module, recorder = build(**stage), Recorder()
    checkpoints = ModelCheckpoint(out, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
    batch = BatchSpec(8, negatives="pack", packs=4)
    run = trainer(
        out,
        world=world,
        fsdp="fp32" if how == "fsdp" else None,
        max_steps=steps,
        enable_checkpointing=True,
        callbacks=[EMA(0.9), Health(every_n_steps=1), recorder, checkpoints],
        plugins=[AtomicCheckpointIO()],
        **({"strategy": "ddp"} if how == "ddp" else {}),
    )
    run.fit(module, InstructionData([ListSource(pairs(folder))], batch=batch, seed=5), ckpt_path=resume)
    write_stage(out / "artefact", module, global_step=steps, optimizer=run.optimizers[0], is_writer=run.is_global_zero)
    averages = {f"average of {name}": full(average) for name, average in module.averages.items()}
    return {"losses": recorder.losses, "tensors": weights(module) | averages, "epochs": module.epochs_done}


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    difference = max((ours[name].double() - tensor.double()).abs().max().item() for name, tensor in theirs.items())
    print("worst difference", difference)
    return difference


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("one")
    pairs(folder)  # before ranks would write the same files
    return folder, fit(folder, folder / "one", "one")


# -- one process and ranks


def test_copies_start_as_what_they_copy_and_move(one: tuple[Path, dict]) -> None:
    start, end = build(), one[1]["tensors"]
    start.configure_model()
    tensors = start.state_dict()
    copied = [name for name in tensors if name.startswith("momentum.")]
    assert start.load_report.copied == sorted(copied)
    assert "copied" in start.load_report.render()
    for name in copied:
        origin = name.removeprefix("momentum.")
        assert torch.equal(tensors[name], tensors[origin])
        assert not torch.equal(end[name], tensors[name])
        assert not torch.equal(end[name], end[origin])
    assert not any(name.startswith(("momentum", "queue")) for name in start.frozen_hashes)
    torch.testing.assert_close(tensors["queue.image"].norm(dim=0), torch.ones(16))
    again = build()
    torch.rand(7)  # the queue's first features belong to the seed, not to what was drawn before
    again.configure_model()
    assert torch.equal(again.queue.image, tensors["queue.image"])
    assert int(end["queue.place"]) == STEPS * 8 % 16
    assert one[1]["epochs"] == pytest.approx(1 + 1 / 3)  # when the fifth step began


def _ranks(folder: Path, how: str) -> dict:
    """Like one process; a resume is the run that was not stopped, from this way's checkpoint and from one process'."""
    whole = fit(folder, folder / how, how)
    resumed = fit(folder, folder / f"{how} again", how, resume=folder / how / "step=2.ckpt")
    assert equal(resumed["tensors"], whole["tensors"]), "bit for bit, dropout on"
    single = fit(folder, folder / f"{how} single", how, resume=folder / "one" / "step=2.ckpt")
    return {"whole": whole, "from one process": single}


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_packs_may_be_shared_by_ranks(how: str, one: tuple[Path, dict]) -> None:
    """1 x 4 packs are 2 x 2: the contrast, the hard negatives, the queue and the averages."""
    folder, expected = one
    first, second = run_ranks(_ranks, 2, folder, how)
    assert equal(first["whole"]["tensors"], second["whole"]["tensors"]), "copies, queue and averages of both ranks"
    for found in first.values():
        assert worst(found["tensors"], expected["tensors"]) < 2e-5  # measured: 1e-6
    assert first["whole"]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    back = fit(folder, folder / f"{how} back", "one", resume=folder / how / "step=2.ckpt")
    assert worst(back["tensors"], expected["tensors"]) < 2e-5


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_four_ranks(how: str, one: tuple[Path, dict]) -> None:
    folder, expected = one
    ranks = run_ranks(fit, 4, folder, folder / f"{how} 4", how)
    assert all(equal(rank["tensors"], ranks[0]["tensors"]) for rank in ranks)
    assert worst(ranks[0]["tensors"], expected["tensors"]) < 2e-5


def test_a_resume_is_the_run_that_was_not_stopped(one: tuple[Path, dict]) -> None:
    folder, expected = one
    resumed = fit(folder, folder / "again", "one", resume=folder / "one" / "step=2.ckpt")
    assert equal(resumed["tensors"], expected["tensors"])
