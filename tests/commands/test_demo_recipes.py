"""Every system's demo recipe through all its nodes, shortened to two steps a stage: wiring, hand-over and files.

What the demos learn, and how long they take, is measured by `make demo-scores`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import cli
import vlm.recipes.run

from benchmarks.demo_scores import DATA, asked_stages, demo_data, first_stage, judge_config
from tests.support.commands import run_forked
from vlm.recipes import Recipe, StageRef, TrainingStage, find_recipe, load_recipe, systems

ROOT = Path(__file__).parents[2]
STEPS = 2
SHORTENED = [f"--trainer.max_steps={STEPS}", "--trainer.limit_val_batches=1", "--data.init_args.num_workers=0"]
SMALL = {"runs/demo_coyo": 200}
"""Scenes of demo data, where 60 are too few."""


def run(folder: Path, *arguments: str) -> None:
    """In this process, which saves the start of another one; the stages of a recipe run in forked ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlm.recipes.run, "run_child", run_forked)
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        assert cli.main(list(arguments)) == 0, arguments


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demos' paths, which start at the repository, lead to small data."""
    folder = tmp_path_factory.mktemp("demos")
    for name in ("vlm", "callbacks", "configs", "cli.py"):
        (folder / name).symlink_to(ROOT / name)
    few = ["--num_train", "80", "--num_val", "4", "--num_test", "4"]
    for target, options in DATA.items():
        small = ["--num", str(SMALL.get(target, 60))] if "--num" in options else few
        run(folder, "demo-data", target, *options, *small)
    return folder


def train(place: Path, system: str, stages: Sequence[str] | None = None) -> None:
    """Stages of a system, all of them by default, and before them what they start from in other systems."""
    recipe = load_recipe(find_recipe(system))
    nodes = [node for node in recipe.nodes if stages is None or node.name in stages]
    for item in [item for node in nodes if isinstance(node, TrainingStage) for item in node.follows]:
        if item.system != system:
            train(place, item.system, lineage(item))
    for options in [[]] if stages is None else [["--stage", name] for name in stages]:
        run(place, "fit", "--recipe", system, "--demo", *options, "--", *SHORTENED)


def lineage(stage: StageRef) -> list[str]:
    """A stage and those of its own system that it starts from, the first one first."""
    node = load_recipe(find_recipe(stage.system)).node(stage.stage)
    assert isinstance(node, TrainingStage)
    before = [item for item in node.follows if item.system == stage.system]
    before += [StageRef(stage.system, node.continues)] if node.continues else []
    return list(dict.fromkeys([*(name for item in before for name in lineage(item)), stage.stage]))


def _phases(recipe: Recipe, stage: TrainingStage) -> int:
    """Stages that count on from each other, up to this one."""
    if stage.continues is None:
        return 1
    before = recipe.node(stage.continues)
    assert isinstance(before, TrainingStage)
    return 1 + _phases(recipe, before)


def check_stage(recipe: Recipe, stage: TrainingStage, runs: Path) -> None:
    """Its files, and that it starts from just what it follows."""
    own = runs / f"{recipe.system}_demo" / stage.name
    meta = json.loads((own / "artefact/stage.json").read_text())
    steps = STEPS * _phases(recipe, stage)
    assert (meta["system"], meta["stage"], meta["global_step"]) == (recipe.system, stage.name, steps)
    assert meta["tensors"], "what it trained"
    before = [*stage.follows, *([StageRef(recipe.system, stage.continues)] if stage.continues else [])]
    found = [(own / "artefact" / entry["path"]).resolve() for entry in meta["follows"]]
    trained = [path for path in found if path.is_relative_to(runs)]  # the others are pretrained parts that ship
    assert trained == [runs / f"{item.system}_demo" / item.stage / "artefact" for item in before]
    assert (own / "config.yaml").is_file()
    if meta["shortened"]:
        assert (own / "checkpoints/last").read_text().strip() == f"step={steps}.ckpt"
    else:  # its recipe counts in steps
        assert not list((own / "checkpoints").iterdir())
    assert list((own / "tensorboard").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("system", systems())
def test_a_shortened_recipe(system: str, place: Path) -> None:
    recipe, runs = load_recipe(find_recipe(system)), place.resolve() / "runs"
    assert set(demo_data(recipe)) <= DATA.keys(), "`make demo-scores` knows how to make each"
    train(place, system)
    for node in recipe.nodes:
        if isinstance(node, TrainingStage):
            check_stage(recipe, node, runs)
    few = [
        "--trainer.limit_test_batches=1",
        "--data.init_args.val_batch_size=4",
        "--evaluation.decoding.max_new_tokens=4",
    ]
    for stage in asked_stages(recipe):
        test = ["test", "-c", judge_config(system, stage.name), "--weights", str(runs / f"{system}_demo" / stage.name)]
        run(place, *test, "--evaluation.name=trained", *few)
        scores = json.loads((runs / f"{system}_demo" / stage.name / "evaluation/trained/scores.json").read_text())[
            "scores"
        ]
        assert len(scores) > 1
    first = first_stage(recipe)
    if first is not None:
        skip = ["--skip", first, "--stage", recipe.without(first).nodes[0].name]
        run(place, "fit", "--recipe", system, "--demo", *skip, "--dry-run")
