"""Momentum copies, queues and moving averages: one process, ranks, resume, artefacts.

Tolerances stand beside what was measured; where nothing but the order of sums differs, that is about 1e-6.
"""

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import vlm
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, distributed

from callbacks import EMA, FSDP2Strategy, Health, MixedPrecisionFSDP
from callbacks.stage_transition import write_stage
from tests.support.blip import blip
from tests.support.ranks import run_ranks
from tests.support.samples import pairs
from tests.support.training import ListSource, Recorder, full, trainer, weights
from tests.training.test_resume import HOW, PROBE, SHARDED, World, assert_same, notes
from vlm.building.instantiate import describe
from vlm.checkpoints.artefact import read_artefact
from vlm.checkpoints.resume.single_file import AtomicCheckpointIO
from vlm.data import BatchSpec, InstructionData
from vlm.errors import UserError
from vlm.moving import update_copies
from vlm.schedules import Schedule
from vlm.stages import AdamW, InitFrom, Stage, Trained
from vlm.systems import BLIP

_FC1 = "language.layers.0.mlp.fc1.weight"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

PARTS = ("vision", "language", "projections", "heads")
STEPS = 5
"""Of 8 samples in 4 packs; an epoch has 3."""


def build(**stage: Any) -> Any:
    module = blip()
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
        fsdp="32-true" if how == "fsdp" else None,
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


def test_a_checkpoint_is_opened_with_its_averages(one: tuple[Path, dict]) -> None:
    folder, expected = one[0] / "one", one[1]["tensors"]
    opened = vlm.load(folder / f"step={STEPS}.ckpt")
    averaged = {name.removeprefix("average of "): value for name, value in expected.items() if "average of" in name}
    assert averaged
    expected = {name: value for name, value in expected.items() if "average of" not in name} | averaged
    assert equal(weights(opened), expected)
    assert equal(weights(vlm.load(folder / "artefact")), expected)


def _ranks(folder: Path, how: str) -> dict:
    """Like one process; a resume is the run that was not stopped. Sharded, also from a file of one process."""
    whole = fit(folder, folder / how, how)
    resumed = fit(folder, folder / f"{how} again", how, resume=folder / how / "step=2.ckpt")
    assert equal(resumed["tensors"], whole["tensors"]), "bit for bit, dropout on"
    if how == "ddp":
        return {"whole": whole}
    file = folder / "one" / "step=2.ckpt"
    return {"whole": whole, "from one process": fit(folder, folder / "from one", how, resume=file)}


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_packs_may_be_shared_by_ranks(how: str, one: tuple[Path, dict]) -> None:
    """1 x 4 packs are 2 x 2: the contrast, the hard negatives, the queue and the averages."""
    folder, expected = one
    first, second = run_ranks(_ranks, 2, folder, how)
    assert equal(first["whole"]["tensors"], second["whole"]["tensors"]), "copies, queue and averages of both ranks"
    for found in first.values():
        assert worst(found["tensors"], expected["tensors"]) < 5e-6  # measured: 2e-7
    assert first["whole"]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    if how == "fsdp":
        back = fit(folder, folder / "back", "one", resume=folder / how / "step=2.ckpt")
        assert worst(back["tensors"], expected["tensors"]) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_four_ranks(how: str, one: tuple[Path, dict]) -> None:
    folder, expected = one
    ranks = run_ranks(fit, 4, folder, folder / f"{how} 4", how)
    assert all(equal(rank["tensors"], ranks[0]["tensors"]) for rank in ranks)
    assert worst(ranks[0]["tensors"], expected["tensors"]) < 5e-6


def test_a_resume_is_the_run_that_was_not_stopped(one: tuple[Path, dict]) -> None:
    folder, expected = one
    resumed = fit(folder, folder / "again", "one", resume=folder / "one" / "step=2.ckpt")
    assert equal(resumed["tensors"], expected["tensors"])


# -- averages


class Watch(L.Callback):
    """The trained weights after every step, and what a validation ran with."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.weights.append(trained(pl_module))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validated.append(trained(pl_module))

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self.losses.append(trainer.callback_metrics["val/loss"].item())


def trained(module: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights(module).items() if name in module.trained_names()}


def average(folder: Path, out: Path, fsdp: bool) -> dict[str, Any]:
    """Four steps with a validation after the second and the last one."""
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    module, watch = build(), Watch()
    sharded = [MixedPrecisionFSDP("32-true", reshard_after_forward=False)] if fsdp else []
    run = trainer(
        out,
        world=world,
        max_steps=4,
        val_check_interval=8 // world,
        check_val_every_n_epoch=None,
        callbacks=[EMA(0.75), watch, *sharded],
        **({"strategy": FSDP2Strategy()} if fsdp else {}),
    )
    samples = pairs(folder)
    batch = BatchSpec(8, negatives="pack", packs=4)
    data = InstructionData(
        [ListSource(samples[:16])], val_sources=[ListSource(samples[16:])], val_batch_size=4, batch=batch, seed=5
    )
    run.fit(module, data)
    write_stage(out / "artefact", module, global_step=4, is_writer=run.is_global_zero)
    return {
        "weights": watch.weights,
        "validated": watch.validated,
        "losses": watch.losses,
        "averages": {name: full(average) for name, average in module.averages.items()},
        "end": trained(module),
    }


def test_averages_are_what_is_validated_and_handed_on(tmp_path: Path) -> None:
    pairs(tmp_path)
    one = average(tmp_path, tmp_path / "one", False)
    fresh = build()
    fresh.configure_model()
    expected = {name: tensor.clone() for name, tensor in trained(fresh).items()}
    for step, moved in enumerate(one["weights"], start=1):
        expected = {name: 0.75 * tensor + 0.25 * moved[name] for name, tensor in expected.items()}
        if step == 2:
            assert worst(one["validated"][0], expected) < 1e-6
    assert worst(one["averages"], expected) < 1e-6
    assert worst(one["averages"], one["end"]) > 1e-3
    assert equal(one["end"], one["weights"][-1]), "put back after the last validation"

    artefact = read_artefact(tmp_path / "one" / "artefact")
    assert artefact.meta["averaged"]
    held = dict(artefact.items())
    assert equal({name: held[name] for name in one["averages"]}, one["averages"])
    assert {name.split(".")[0] for name in held} == {*PARTS, "momentum", "queue"}

    # blocks that stay gathered after a validation are not trained on as they were validated
    for sharded in run_ranks(average, 2, tmp_path, tmp_path / "fsdp", True):
        for kind in ("averages", "end"):
            assert worst(sharded[kind], one[kind]) < 5e-6
        assert sharded["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert len(one["losses"]) == 2


def test_a_stage_follows_averages_and_continues_weights(one: tuple[Path, dict], tmp_path: Path) -> None:
    folder, expected = one
    artefact = str(folder / "one" / "artefact")
    follower, phase = build(follows=[InitFrom(artefact)]), build(follows=[InitFrom(artefact, {"language": "language"})])
    for module in (follower, phase):
        module.configure_model()
    tensors = expected["tensors"]
    for name, tensor in weights(follower).items():
        assert torch.equal(tensor, tensors.get(f"average of {name}", tensors[name]))
    assert not follower.load_report.copied, "the artefact has copies of its own"
    assert torch.equal(phase.momentum.language.layers[0].mlp.fc1.weight, phase.language.layers[0].mlp.fc1.weight)
    assert torch.equal(phase.language.layers[0].mlp.fc1.weight, tensors[f"average of {_FC1}"])


# -- killed and started again


class Contrast(World):
    """Runs of the tiny system through the command line: 3 steps to an epoch, each epoch with its rate, and averages."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        records = [
            {
                "id": sample.id,
                "image": sample.images[0].name,
                "conversations": [
                    {"from": "human", "value": "<image>"},
                    {"from": "gpt", "value": sample.messages[1].content[0].text},
                ],
            }
            for sample in pairs(folder)
        ]
        (folder / "pairs.json").write_text(json.dumps(records))
        source = {"path": str(folder / "pairs.json"), "image_root": str(folder)}
        arguments = blip().arguments
        self.overlay = {
            "model": {
                "class_path": "vlm.systems.BLIP",
                "init_args": {
                    **{name: describe(arguments[name]) for name in ("vision", "language", "tokenizer")},
                    **{name: arguments[name] for name in ("dim", "queue", "momentum", "max_tokens")},
                },
            },
            "data": {
                "class_path": "vlm.data.InstructionData",
                "init_args": {
                    "sources": [{"class_path": "vlm.data.LlavaJson", "init_args": source}],
                    "batch": {"size": 8, "negatives": "pack", "packs": 4},
                    "num_workers": 0,
                },
            },
            "trainer": self.overlay["trainer"] | {"max_epochs": 4, "accumulate_grad_batches": 1},
            "stage": {
                "name": "1_contrast",
                "train": {part: {"lr": 1e-2} for part in PARTS},
                "modes": {"momentum": "train"},
                "schedule": {"kind": "staircase", "decay": 0.5, "warmup": 2},
            },
            "checkpoint": {"every_n_train_steps": 2},
        }
        self.overlay["trainer"]["callbacks"] = [PROBE, {"class_path": "callbacks.EMA", "init_args": {"decay": 0.9}}]

    def command(self, run: Path, *options: str) -> list[str]:
        overlay = self.folder / "contrast.yaml"
        overlay.write_text(yaml.safe_dump(self.overlay))
        return [
            *(sys.executable, "-m", "cli", "fit", "-c", str(overlay)),
            f"--trainer.default_root_dir={run}",
            *options,
        ]


def test_killed_and_started_again(tmp_path: Path) -> None:
    world = Contrast(tmp_path)
    assert world.fit_here(tmp_path / "whole") == 0
    world.fit(
        tmp_path / "run", kill="window:7"
    )  # in the third epoch; the newest checkpoint is of the end of the second
    assert world.fit_here(tmp_path / "run") == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
    rates = [float.fromhex(entries[0]["lr"][0]) for _, entries in sorted(notes(tmp_path / "run").items())][::4]
    assert rates == pytest.approx([1e-2 * factor for factor in (0, 0.5, 1, *[0.5] * 3, *[0.25] * 3, *[0.125] * 3)])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ranks_killed_and_started_again(how: str, tmp_path: Path) -> None:
    world = Contrast(tmp_path)
    if how == "fsdp":
        world.overlay["trainer"]["callbacks"].append(SHARDED)
    options = [option for option in HOW[how] if "callbacks" not in option]
    world.fit(tmp_path / "whole", *options)
    for kill in ("window:5", "save:2"):
        world.fit(tmp_path / "run", *options, kill=kill)
    world.fit(tmp_path / "run", *options)
    assert_same(tmp_path / "run", tmp_path / "whole")


# -- refusals


def test_mistakes_are_named(one: tuple[Path, dict], tmp_path: Path) -> None:
    folder, _ = one

    def message(*, callbacks: Any = (), module: Any = None, resume: Path | None = None, **options: Any) -> str:
        run = trainer(tmp_path, callbacks=callbacks, **({"max_steps": 1} | options))
        batch = BatchSpec(8, negatives="pack", packs=4)
        with pytest.raises(UserError) as raised:
            run.fit(module or build(), InstructionData([ListSource(pairs(folder))], batch=batch), ckpt_path=resume)
        return str(raised.value)

    checkpoint = folder / "one" / "step=2.ckpt"
    assert "only one of the checkpoint and this run keeps moving averages" in message(resume=checkpoint)
    half = message(callbacks=[EMA(0.9)], precision="bf16-true")
    assert "callbacks.EMA averages float32 weights" in half
    with pytest.raises(UserError, match="decay must be at least 0 and below 1, found 1"):
        EMA(1.0)
    module = build()
    module.stage = Stage("s", {"momentum.projections": Trained(1.0)})
    with pytest.raises(UserError, match=r"stage\.train: momentum\.projections\.image\.bias moves without a gradient"):
        module.configure_model()
    assert "set trainer.max_epochs" in message(module=build(schedule=Schedule("cosine_per_epoch")))


def _updated_while_gathered(folder: Path) -> str:
    class Wrong(BLIP):
        def losses(self, batch: Any) -> dict[str, Tensor]:
            update_copies(self, 0.5)
            return super().losses(batch)

    module = Wrong(**blip().arguments)
    module.stage = Stage("s", {part: Trained(1e-2) for part in PARTS})
    batch = BatchSpec(8, negatives="pack", packs=4)
    with pytest.raises(AssertionError) as raised:
        trainer(folder, fsdp="32-true", max_steps=1).fit(
            module, InstructionData([ListSource(pairs(folder))], batch=batch)
        )
    return str(raised.value)


def test_copies_are_not_updated_while_gathered(tmp_path: Path) -> None:
    assert "do it in `on_step_start`" in run_ranks(_updated_while_gathered, 1, tmp_path)[0]
