"""The configuration files of a stage."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from vlm.errors import UserError
from vlm.recipes.catalogue import find_recipe
from vlm.recipes.graph import Node, Procedure, Recipe, TrainingStage
from vlm.recipes.inputs import fill_configs
from vlm.recipes.node import ProcedureFolder
from vlm.recipes.reading import load_recipe


def config_files(recipe: Recipe, stage: TrainingStage, *, demo: bool) -> list[Path]:
    """In the order in which they are read.

    Args:
        demo: with the overlays that make it laptop size.

    Raises:
        UserError: there is no demo of the stage.
    """
    files = list(stage.configs)
    for overlay in stage.overlays if demo else ():
        if not overlay.is_file():
            raise UserError(f"--demo: {recipe.system} has no demo of stage {stage.name}: {overlay} is missing")
        files.append(overlay)
    return files


def default_run(system: str, demo: bool, skipped: Sequence[str] = ()) -> Path:
    """The run folder where none is given."""
    name = f"{system}_demo" if demo else system
    return Path("runs") / "_without_".join((name, *skipped))


def add_stage_options(parser: argparse.ArgumentParser) -> None:
    """`--recipe`, `--demo` and `--stage`, which name the files of a stage instead of `-c FILE`."""
    parser.add_argument("--recipe", metavar="SYSTEM", help="the files of a recipe's stage instead of -c")
    parser.add_argument("--demo", action="store_true", help="with --recipe: at laptop size on the embedded data")
    parser.add_argument("--stage", metavar="NAME", help="with --recipe: which of its stages")


def stage_options(parsed: argparse.Namespace) -> list[str]:
    """What `add_stage_options` read, as options of `vlm fit`.

    Raises:
        UserError: no such recipe or stage, or more than one to choose from.
    """
    if parsed.recipe is None:
        if parsed.demo or parsed.stage is not None:
            raise UserError("--demo and --stage go with --recipe SYSTEM; with -c name the stage's files")
        return []
    recipe = load_recipe(find_recipe(parsed.recipe))
    stages = [node for node in recipe.nodes if isinstance(node, TrainingStage)]
    names: Sequence[str] = [stage.name for stage in stages]
    if parsed.stage is None and len(stages) > 1:
        raise UserError(f"--recipe {parsed.recipe}: say which stage with --stage, one of {', '.join(names)}")
    if parsed.stage is not None and parsed.stage not in names:
        raise UserError(f"--stage {parsed.stage}: {recipe.path} has the stages {', '.join(names)}")
    stage = stages[0] if parsed.stage is None else stages[names.index(parsed.stage)]
    run = default_run(recipe.system, parsed.demo)
    needs = {name: _data(run, recipe.node(name)) for name in stage.needs}
    files = fill_configs(config_files(recipe, stage, demo=parsed.demo), needs, run / stage.name / "configs")
    return [word for file in files for word in ("-c", from_here(file))] + ["--stage.name", stage.name]


def _data(run: Path, node: Node) -> Path:
    assert isinstance(node, Procedure)
    folder = ProcedureFolder(run / node.name)
    if not folder.finished:
        raise UserError(f"{folder.path}: the data of {node.name} is not made yet; `vlm fit --recipe` makes it there")
    return folder.path / node.writes


def from_here(path: Path) -> str:
    """Relative to the working directory where the file lies below it."""
    resolved, here = path.resolve(), Path.cwd().resolve()
    return os.fspath(resolved.relative_to(here) if resolved.is_relative_to(here) else resolved)
