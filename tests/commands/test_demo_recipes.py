"""Every system's demo recipe through all its nodes, shortened to two steps a stage: wiring, hand-over and files.

What the demos learn, and how long they take, is measured by `make demo-scores`, which shares the machine with nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.demo_scores import DATA, asked_stages, demo_data, first_stage, judge_config
from vlm.recipes import Recipe, TrainingStage, find_recipe, load_recipe, systems

ROOT = Path(__file__).parents[2]
STEPS = 2
SHORTENED = [f"--trainer.max_steps={STEPS}", "--trainer.limit_val_batches=1", "--data.init_args.num_workers=0"]
SMALL = {"runs/demo_mmc4": ["--num", "60"], "runs/demo_coyo": ["--num", "200"]}


def run(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{arguments}:\n{done.stdout[-3000:]}"


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demos' paths, which start at the repository, lead to small data."""
    folder = tmp_path_factory.mktemp("demos")
    for name in ("vlm", "callbacks", "configs", "cli.py"):
        (folder / name).symlink_to(ROOT / name)
    few = ["--num_train", "80", "--num_val", "4", "--num_test", "4"]
    for target, options in DATA.items():
        run(folder, "demo-data", target, *options, *SMALL.get(target, few))
    return folder


def check_stage(recipe: Recipe, stage: TrainingStage, folder: Path) -> None:
    """Its files, and that it starts from just what it follows."""
    own = folder / stage.name
    meta = json.loads((own / "artefact/stage.json").read_text())
    assert (meta["system"], meta["stage"], meta["global_step"]) == (recipe.system, stage.name, STEPS)
    assert meta["tensors"], "what it trained"
    followed = [*(item.stage for item in stage.follows), *([stage.continues] if stage.continues else [])]
    ends = [(own / "artefact" / entry["path"]).resolve() for entry in meta["follows"]]
    assert ends == [(folder / name / "artefact").resolve() for name in followed]
    assert (own / "config.yaml").is_file()
    assert (own / "checkpoints/last").read_text().strip() == f"step={STEPS}.ckpt"
    assert list((own / "tensorboard").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("system", systems())
def test_a_shortened_recipe(system: str, place: Path) -> None:
    recipe, folder = load_recipe(find_recipe(system)), place / "runs" / f"{system}_demo"
    assert set(demo_data(recipe)) <= DATA.keys(), "`make demo-scores` knows how to make each"
    run(place, "fit", "--recipe", system, "--demo", "--", *SHORTENED)
    for node in recipe.nodes:
        if isinstance(node, TrainingStage):
            check_stage(recipe, node, folder)
    few = [
        "--trainer.limit_test_batches=1",
        "--data.init_args.val_batch_size=4",
        "--evaluation.decoding.max_new_tokens=4",
    ]
    for stage in asked_stages(recipe):
        test = ["test", "-c", judge_config(system, stage.name), "--weights", str(folder / stage.name)]
        run(place, *test, "--evaluation.name=trained", *few)
        scores = json.loads((folder / stage.name / "evaluation/trained/scores.json").read_text())["scores"]
        assert len(scores) > 1
    first = first_stage(recipe)
    if first is not None:
        skip = ["--skip", first, "--stage", recipe.without(first).nodes[0].name]
        run(place, "fit", "--recipe", system, "--demo", *skip, "--dry-run")
