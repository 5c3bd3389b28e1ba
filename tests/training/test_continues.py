"""A stage that continues another one takes the steps that one longer stage would have taken."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cli
from tests.training.test_resume import HOW, SHARDED, World
from vlm.checkpoints.artefact import read_artefact

EVERYTHING = {"connector": {"lr": 1e-2}, "language": {"lr": 1e-2, "weight_decay": 0.1}}


class Phases(World):
    """Every step trains on all samples, so that the steps of two stages are those of one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, count=6)
        self.overlay["data"]["init_args"]["batch"]["size"] = 6
        self.overlay["data"]["init_args"]["group_by_modality"] = False
        self.overlay["trainer"] |= {"accumulate_grad_batches": 1, "logger": False, "callbacks": None}
        self.overlay["model"]["init_args"]["augment"] = None
        self.overlay["model"]["init_args"]["language"]["init_args"]["config"]["attention_dropout"] = 0.0
        self.overlay["stage"]["train"] = EVERYTHING
        self.overlay["stage"] |= {"schedule": {"kind": "cosine", "warmup": 3, "total_steps": 8}}

    def train(self, run: str, steps: int, *options: str, train: dict | None = None) -> int:
        self.overlay["stage"]["train"] = train or EVERYTHING
        limit = f"--trainer.max_epochs={steps}"
        return cli.main([*self.command(self.folder / run, limit, *options)[3:]])

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / run / "artefact/model.safetensors")

    def artefact(self, run: str) -> str:
        return str(self.folder / run / "artefact")


@pytest.fixture
def phases(tmp_path: Path) -> Phases:
    return Phases(tmp_path)


def test_two_phases_are_one_stage(phases: Phases) -> None:
    keep = "--stage.keep_optimizer=true"
    assert phases.train("whole", 8, keep) == 0
    assert phases.train("a", 3, keep) == 0
    assert phases.train("b", 3, keep, f"--stage.continues={phases.artefact('a')}") == 0
    assert phases.train("c", 2, keep, f"--stage.continues={phases.artefact('b')}") == 0
    assert phases.train("cold", 5, keep, f'--stage.follows=[{{"artefact": "{phases.artefact("a")}"}}]') == 0
    whole, parts, cold = (phases.weights(run) for run in ("whole", "c", "cold"))
    for name, expected in whole.items():
        # the epochs of a later phase begin at 0 again, so the samples of a step lie in another order in the row
        torch.testing.assert_close(
            parts[name], expected, atol=2e-4, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert any((cold[name] - whole[name]).abs().max() > 1e-2 for name in whole), "without moments it is another run"
    stages = [read_artefact(phases.artefact(run)) for run in ("whole", "c")]
    assert [stage.meta["global_step"] for stage in stages] == [8, 8]
    ours, theirs = (dict(stage.moments.items()) for stage in stages)
    assert (
        ours.keys() == theirs.keys() == {f"{name}/{key}" for name in whole for key in ("step", "exp_avg", "exp_avg_sq")}
    )
    assert all(value == 8 for name, value in theirs.items() if name.endswith("/step"))


def test_two_phases_carry_averages_and_weights(phases: Phases, capfd: pytest.CaptureFixture[str]) -> None:
    keep = "--stage.keep_optimizer=true"
    phases.overlay["trainer"]["callbacks"] = [{"class_path": "callbacks.EMA", "init_args": {"decay": 0.9}}]
    assert phases.train("whole", 8, keep) == 0
    assert phases.train("a", 3, keep) == 0
    continues = f"--stage.continues={phases.artefact('a')}"
    assert phases.train("b", 5, keep, continues) == 0
    stages = [read_artefact(phases.artefact(run)) for run in ("whole", "b")]
    averages, others = (dict(stage.items()) for stage in stages)
    states = [dict(stage.moments.items()) for stage in stages]
    for expected, found in ((averages, others), states):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, atol=2e-4, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
            )
    name = "connector.0.weight"
    assert (states[0][f"{name}/weight"] - averages[name]).abs().max() > 1e-2, "two states, not one"
    phases.overlay["trainer"]["callbacks"] = None
    assert phases.train("c", 5, continues) == 2
    assert "keeps moving averages; add callbacks.EMA" in capfd.readouterr().err


@pytest.mark.slow
def test_phases_on_any_devices(phases: Phases) -> None:
    """Sharded moments are gathered when a stage ends and cut again when the next one begins."""
    keep = "--stage.keep_optimizer=true"
    assert phases.train("whole", 8, keep) == 0
    how = [option for option in HOW["fsdp"] if "callbacks" not in option]
    how.append(f"--trainer.callbacks={json.dumps([SHARDED])}")
    phases.fit(phases.folder / "a", keep, *how, "--trainer.max_epochs=3")
    continues = f"--stage.continues={phases.artefact('a')}"
    phases.fit(phases.folder / "b", keep, *how, "--trainer.max_epochs=5", continues)
    assert phases.train("c", 5, keep, continues) == 0
    expected = {**phases.weights("whole"), **dict(read_artefact(phases.artefact("whole")).moments.items())}
    for run in ("b", "c"):
        found = {**phases.weights(run), **dict(read_artefact(phases.artefact(run)).moments.items())}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, atol=2e-4, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_a_phase_may_train_more_and_less(phases: Phases) -> None:
    some = {"connector": {"lr": 1e-2}, "language.model.layers.0": {"lr": 1e-2}}
    other = {"connector": {"lr": 1e-2}, "language.model.layers.1": {"lr": 1e-2}}
    keep = "--stage.keep_optimizer=true"
    assert phases.train("a", 3, keep, train=some) == 0
    assert phases.train("b", 2, keep, f"--stage.continues={phases.artefact('a')}", train=other) == 0
    moments = dict(read_artefact(phases.artefact("b")).moments.items())
    steps = {name.removesuffix("/step"): int(value) for name, value in moments.items() if name.endswith("/step")}
    assert steps["connector.0.weight"] == 5
    assert steps["language.model.layers.1.mlp.up_proj.weight"] == 2
    assert "language.model.layers.0.mlp.up_proj.weight" not in steps
    frozen = json.loads(Path(phases.artefact("b"), "stage.json").read_text())["follows"]
    assert [entry["path"] for entry in frozen] == ["../../a/artefact"], "layer 0 is what phase a made of it"


def test_what_cannot_be_continued(phases: Phases, capfd: pytest.CaptureFixture[str]) -> None:
    assert phases.train("a", 1) == 0
    assert phases.train("b", 1, f"--stage.continues={phases.artefact('a')}") == 2
    assert "train its stage again with stage.keep_optimizer: true" in capfd.readouterr().err
    del phases.overlay["stage"]["schedule"]["total_steps"]
    assert phases.train("c", 1, f"--stage.continues={phases.artefact('a')}") == 2
    assert "set stage.schedule.total_steps" in capfd.readouterr().err
