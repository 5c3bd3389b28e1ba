"""The run folder: one process at a time, one set of settings, and a pointer that never lies."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vlm.errors import UserError
from vlm.recipes.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
HOLD = """
import os, sys, time
from vlm.recipes.run_folder import RunFolder
folder = RunFolder(sys.argv[1])
folder.lock()
if sys.argv[2] == "fork":
    wait, tell = os.pipe()
    if os.fork() == 0:
        os.write(tell, b"!")
        time.sleep(600)  # a loader worker that outlives its parent
    os.read(wait, 1)
print("held", flush=True)
time.sleep(600)
"""
OWN = {"class_path": "mine.Ema", "init_args": {"decay": 0.9}}
FLOAT32 = {"precision": "32-true", "reduce_dtype": "fp32", "reshard_after_forward": True}
BFLOAT16 = FLOAT32 | {"precision": "bf16-mixed"}
CONFIG = {
    "seed_everything": 0,
    "model": {"class_path": "vlm.systems.LLaVA15", "init_args": {"language": {"init_args": {"checkpointing": True}}}},
    "data": {"init_args": {"batch": {"size": 128}, "num_workers": 4, "sources": [{"path": "a.json"}]}},
    "stage": {"train": {"connector": {"lr": 1e-5}}, "follows": []},
    "trainer": {"devices": 1, "max_epochs": 1, "strategy": "auto", "callbacks": [OWN]}
    | dict.fromkeys(["logger", "max_time"]),
    "checkpoint": {"every_n_train_steps": 200},
    "ckpt_path": None,
}


def _holder(folder: Path, how: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), how], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


@pytest.mark.parametrize("how", ["plain", "fork"])
def test_a_second_start_is_refused_until_the_first_is_dead(tmp_path: Path, how: str) -> None:
    process = _holder(tmp_path / "run", how)
    try:
        with pytest.raises(UserError, match=rf"pid {process.pid} on host {os.uname().nodename}"):
            RunFolder(tmp_path / "run").lock()
        process.kill()
        process.wait()
        # free at once, though with `fork` a child of the killed process is still alive
        with RunFolder(tmp_path / "run").lock():
            assert f"pid {os.getpid()} " in (tmp_path / "run/.lock").read_text()
        RunFolder(tmp_path / "run").lock().release()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def test_a_lock_ends_with_its_block(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.lock(), pytest.raises(UserError, match=f"pid {os.getpid()}"):
        RunFolder(tmp_path).lock()
    with RunFolder(tmp_path).lock():
        pass


def _changed(**changes: object) -> dict:
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        node = config
        for key in path:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[last] = value
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trainer__devices": 8, "trainer__strategy": {"class_path": "DDPStrategy", "init_args": {"a": 1}}},
        {"trainer__accumulate_grad_batches": 4, "data__init_args__num_workers": 0},
        {"trainer__logger": {"class_path": "CSVLogger"}, "trainer__max_time": "00:01:00:00"},
        {"checkpoint__every_n_train_steps": 5, "ckpt_path": "x.ckpt", "config": ["a.yaml"]},
        {"model__init_args__language__init_args__checkpointing": False},
        {"stage__train__connector__lr": 0.00001, "model__init_args__added_since": None},
        {"trainer__callbacks": [{"class_path": "callbacks.Health", "init_args": {"dead_after": 3}}, OWN]},
        {"trainer__callbacks": [{"class_path": "callbacks.MixedPrecisionFSDP", "init_args": FLOAT32}, OWN]},
    ],
)
def test_how_it_runs_may_change(tmp_path: Path, changes: dict) -> None:
    folder = RunFolder(tmp_path)
    folder.check_config(CONFIG)  # nothing stored yet
    assert not folder.config_file.exists()
    folder.save_config(CONFIG)
    folder.check_config(_changed(**changes))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data__init_args__batch__size": 64}, "  data.init_args.batch.size: 128 -> 64"),
        ({"stage__train__connector__lr": 2e-5}, "  stage.train.connector.lr: 1.0e-05 -> 2.0e-05"),
        ({"data__init_args__sources__0__path": "b.json"}, "  data.init_args.sources.0.path: a.json -> b.json"),
        ({"stage__train__language": {"lr": 1.0}}, "  stage.train.language.lr: null -> 1.0"),
        ({"trainer__max_epochs": True}, "  trainer.max_epochs: 1 -> true"),
        ({"stage__follows": [{"artefact": "x"}]}, "  stage.follows.0.artefact: null -> x"),
        ({"trainer__callbacks": []}, "  trainer.callbacks.mine.Ema.decay: 0.9 -> null"),
        (
            {"trainer__callbacks": [{"class_path": "callbacks.MixedPrecisionFSDP", "init_args": BFLOAT16}, OWN]},
            "  trainer.callbacks.callbacks.MixedPrecisionFSDP.precision: 32-true -> bf16-mixed",
        ),
    ],
)
def test_what_it_computes_may_not(tmp_path: Path, changes: dict, line: str) -> None:
    folder = RunFolder(tmp_path)
    folder.save_config(CONFIG)
    with pytest.raises(UserError) as caught:
        folder.check_config(_changed(**changes))
    assert line in str(caught.value).splitlines()
    assert "another run folder" in str(caught.value).splitlines()[-1]
    assert yaml.safe_load(folder.config_file.read_text()) == CONFIG, "checking must not write"


def test_the_difference_is_cut(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save_config(CONFIG)
    with pytest.raises(UserError) as caught:
        folder.check_config(CONFIG | {"model": {f"key{i}": i for i in range(20)}})
    lines = str(caught.value).splitlines()
    assert len(lines) == 13
    assert lines[11] == "  and 11 more"


def test_two_spellings_of_a_path_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artefact").mkdir()
    folder = RunFolder(tmp_path / "run")
    folder.save_config(CONFIG | {"weights": Path("artefact")})
    folder.check_config(CONFIG | {"weights": tmp_path / "run/../artefact"})


def test_the_saved_settings_survive_yaml(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new")
    folder.save_config({"a": (1, 2), "b": Path("x"), "c": 1e-5, "d": "1e-5", "e": "größe"})
    assert yaml.safe_load(folder.config_file.read_text()) == {
        "a": [1, 2],
        "b": "x",
        "c": 1e-5,
        "d": "1e-5",
        "e": "größe",
    }
    assert os.listdir(folder.path) == ["config.yaml"]
    folder.config_file.write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml: cannot be read"):
        folder.check_config({})


def test_last_and_finished(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.last_checkpoint() is None
    assert not folder.finished
    folder.checkpoints.mkdir()
    (folder.checkpoints / "step=10.ckpt").touch()
    assert folder.last_checkpoint() is None, "a checkpoint that `last` does not name is not complete"
    (folder.checkpoints / "last").write_text("step=10.ckpt\n")
    assert folder.last_checkpoint() == tmp_path / "checkpoints/step=10.ckpt"
    for name in ("step=11.ckpt", "", "../checkpoints/step=10.ckpt"):
        (folder.checkpoints / "last").write_text(name)
        with pytest.raises(UserError, match="which is not in"):
            folder.last_checkpoint()
    folder.artefact.mkdir()
    assert not folder.finished
    (folder.artefact / "stage.json").touch()
    assert folder.finished


def test_the_lock_is_not_inherited_by_programs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lock = folder.lock()
    child = subprocess.Popen(["sleep", "600"])
    try:
        lock.release()
        RunFolder(tmp_path).lock().release()
    finally:
        child.kill()
        child.wait()
