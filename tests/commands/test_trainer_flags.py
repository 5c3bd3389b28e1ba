"""Lightning's own flags, callbacks and loggers do what its users expect, or are refused in one line."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import cli
from tests.commands.test_cli import CONFIGS, World


def callback(name: str, **arguments: Any) -> str:
    return f"--trainer.callbacks+={json.dumps({'class_path': name, 'init_args': arguments})}"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


REFUSED = {
    "averages": ([callback("StochasticWeightAveraging", swa_lrs=0.1)], "use callbacks.EMA"),
    "batch": ([callback("BatchSizeFinder")], "data.init_args.max_tokens"),
    "rate": ([callback("LearningRateFinder")], "stage.train"),
    "accumulation": ([callback("GradientAccumulationScheduler", scheduling={"0": 2})], "data.init_args.batch"),
    "timer": ([callback("Timer", duration="00:00:01:00")], "trainer.max_time"),
    "barebones": (["--trainer.barebones=true"], "trainer.barebones"),
    "no checkpoints": (["--trainer.enable_checkpointing=false"], "checkpoint.every_n_train_steps"),
    "seed": (["--seed_everything=true"], "give a number"),
    "package": (["--trainer.logger=WandbLogger"], "WandbLogger needs the package wandb: pip install wandb"),
    "profiler": (["--trainer.profiler=simpel"], "'simple', 'advanced', 'pytorch'"),
    "logger's folder": (["--trainer.logger=CSVLogger"], "save_dir: is not given; CSVLogger needs it"),
    "overfit": (["--trainer.overfit_batches=1"], "use trainer.limit_train_batches"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, world: World, capfd: pytest.CaptureFixture[str]) -> None:
    options, words = REFUSED[case]
    assert world.fit(*options) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("vlm: error: ")]
    assert len(said) == 1
    assert words in said[0]


def test_restarts_that_would_wait_for_the_dead(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert world.fit() == 2
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capfd.readouterr().err


def test_obeyed_together(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    source = {"class_path": "LlavaJson", "init_args": {"path": str(world.folder / "data.json")}}
    loggers = [
        {"class_path": "CSVLogger", "init_args": {"save_dir": str(world.folder / "csv")}},
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(world.folder / "tb")}},
    ]
    options = [
        f"--data.init_args.val_sources={json.dumps([source])}",
        f"--trainer.logger={json.dumps(loggers)}",
        callback("LearningRateMonitor", logging_interval="step"),
        callback("ModelCheckpoint", monitor="val/loss", save_top_k=1),
        *("--trainer.profiler=simple", "--trainer.log_every_n_steps=1", "--trainer.num_sanity_val_steps=-1"),
        *("--trainer.gradient_clip_val=1.0", "--trainer.deterministic=true", "--trainer.detect_anomaly=true"),
        *("--trainer.val_check_interval=1", "--trainer.limit_val_batches=1", "--trainer.max_epochs=2"),
    ]
    assert world.fit(*options) == 0, capfd.readouterr().err
    assert (world.run / "artefact" / "stage.json").exists()
    assert "validation_step" in (world.run / "fit-profile.txt").read_text()
    assert len(list((world.run / "model_checkpoints").glob("*.ckpt"))) == 1
    (metrics,) = (world.folder / "csv").rglob("metrics.csv")
    names = set(next(csv.reader(metrics.open())))
    assert {"train/loss", "val/loss"} <= names
    assert any(name.startswith("lr-") for name in names)
    assert list((world.folder / "tb").rglob("events.out.tfevents.*"))


def test_a_metric_that_nobody_logs(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    assert world.fit(callback("EarlyStopping", monitor="val_loss"), "--trainer.max_steps=1") == 2
    said = capfd.readouterr().err
    assert "metric `val_loss` which is not available" in said
    assert "`train/loss`" in said
    assert "Traceback" not in said


def test_what_is_printed_runs_unchanged(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        world.fit("--print_config")
    assert ended.value.code == 0
    printed = capfd.readouterr().out
    (world.folder / "printed.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        cli.main(["fit", "-c", str(world.folder / "printed.yaml"), "--print_config"])
    again = capfd.readouterr().out
    assert yaml.safe_load(again) == yaml.safe_load(printed)
    assert cli.main(["fit", "-c", str(world.folder / "printed.yaml")]) == 0
    assert (world.run / "artefact" / "stage.json").exists()


def test_help_with_short_names(capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        (["--data.help", "InstructionData"], "--data.group_by_modality"),
        (["--data", "InstructionData", "--data.sources.help", "LlavaJson"], "--sources.image_root"),
        (["--data.help"], "vlm.data.WebDataset"),
        (["--model.help", "LLaVA15"], "--model.vision"),
        (["--help"], "usage: vlm fit"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["fit", *options])
        assert ended.value.code == 0
        assert words in capsys.readouterr().out


def test_a_stage_without_running_it(world: World) -> None:
    assert world.fit("--trainer.max_steps=1") == 0
    files = [CONFIGS / "model.yaml", CONFIGS / "1_align.yaml", world.folder / "overlay.yaml"]
    made = cli.main(["fit", *(f"--config={file}" for file in files), "--trainer.max_steps=1"], run=False)
    assert type(made.model).__name__ == "LLaVA15"
    made.trainer.fit(made.model, datamodule=made.datamodule)
    assert made.trainer.global_step == 1
