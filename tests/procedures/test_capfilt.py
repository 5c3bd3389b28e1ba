"""CapFilt as a recipe: stopped in the middle of a procedure, and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cli
import vlm.recipes.run
from tests.conftest import PATIENCE
from tests.support.commands import run_forked
from vlm.data import WebDataset
from vlm.recipes import Procedure, find_recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("--", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1")


def test_nodes_come_in_the_order_of_the_paper() -> None:
    recipe = load_recipe(find_recipe("blip_capfilt"))
    made = [node.run if isinstance(node, Procedure) else node.name for node in recipe.nodes]
    trained = ["1_pretrain", "2_captioner", "2_filter"]
    assert made == [*trained, "caption-images", "filter-pairs", "bootstrap", "6_pretrain"]


@pytest.mark.slow
def test_a_stopped_recipe_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the second shard is captioned: the first is not made again, and all nodes end."""
    for name in ("vlm", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cli.main(["demo-data", "runs/demo_blip", "--format", "blip", "--num", "120"]) == 0
    shards = (
        "--stage.3_captions.shard_size=30",
        "--stage.4_filtered.shard_size=30",
        "--stage.5_bootstrapped.shard_size=30",
    )
    recipe = ["fit", "--recipe", "blip_capfilt", "--demo", *shards, *STEPS]
    run = tmp_path / "runs/blip_capfilt_demo"
    first = run / "3_captions/captions/web_train-00000.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *recipe], env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True
    )
    try:
        until = time.monotonic() + 2 * PATIENCE
        while not first.exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        assert first.exists()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (run / "3_captions/finished.json").exists()
    made = first.stat().st_mtime_ns
    monkeypatch.setattr(vlm.recipes.run, "run_child", run_forked)
    assert cli.main(recipe) == 0
    assert first.stat().st_mtime_ns == made
    report = json.loads((run / "5_bootstrapped/set/report.json").read_text())
    assert len(WebDataset(run / "5_bootstrapped/set/*.tar")) == report["pairs"] >= 30, "people's pairs at least"
    assert {"precision", "recall"} <= json.loads((run / "4_filtered/filtered/report.json").read_text()).keys()
    assert (run / "6_pretrain/artefact/stage.json").exists()
