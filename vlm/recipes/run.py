"""`vlm fit --recipe`: one ordinary process, `vlm fit -c ...` or `vlm run ...`, for each unfinished node.

What to start next is decided from files that finished processes left behind, so a stopped recipe is continued by the
same command.
"""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vlm.errors import UserError
from vlm.options import OptionParser
from vlm.procedures import OVER_SHARDS
from vlm.recipes.catalogue import find_recipe
from vlm.recipes.child import run_child
from vlm.recipes.configs import default_run
from vlm.recipes.graph import Node, Procedure, Recipe, TrainingStage
from vlm.recipes.node import ProcedureFolder, compare_finished, rank
from vlm.recipes.reading import load_recipe
from vlm.recipes.request import Request

UNFINISHED = 75
"""Exit status when a stage ended well but before its end, as with `trainer.max_time` (EX_TEMPFAIL of sysexits.h)."""


def run_recipe(
    arguments: Sequence[str],
    *,
    command: Sequence[str] = (sys.executable, "-m", "cli"),
    compare: Callable[[Sequence[str]], None] | None = None,
) -> int:
    """Runs the unfinished nodes of a recipe in order, one process at a time.

    Args:
        arguments: what follows `vlm fit`.
        command: the program that works on one node; `fit -c ...` or `run ...` is appended.
        compare: refuses options of `vlm fit` for a finished stage that differ from those it was trained with.

    Returns:
        0 when everything asked for is finished, the exit status of the stage that failed, 128 plus the signal that
        stopped it, or `UNFINISHED`.

    Raises:
        UserError: an option, the recipe, an artefact that is not there, or other settings than a finished node's.
    """
    request = _parse(list(arguments))
    recipe = request.recipe
    chosen = recipe.nodes if request.stage is None else (recipe.node(request.stage),)
    waiting = [node for node in chosen if not request.skipped(node)]
    # all errors before the start
    commands = {node.name: [*command, *request.arguments(node)] for node in waiting}
    if request.is_trial and len(waiting) > 1:
        raise UserError("fit --recipe: trainer.fast_dev_run leaves nothing for a next stage; try one, with --stage")
    for node in () if request.dry_run else chosen:
        if node not in waiting and request.folder(node).finished:
            _compare(request, node, compare)
    for number, node in enumerate(chosen, start=1):
        label = f"[{number}/{len(chosen)}] {recipe.system} {node.name}"
        if node.name not in commands:
            _say(f"{label}: {request.skipped(node)}")
            continue
        _say(f"{label}:\n  {shlex.join(commands[node.name])}")
        alone = isinstance(node, Procedure) and node.run not in OVER_SHARDS
        if request.dry_run or (alone and rank() != "0"):
            continue
        status, received = run_child(commands[node.name])
        again = f"the same command continues: vlm fit {shlex.join(arguments)}"
        if received is not None:
            _say(f"{label}: stopped by {signal.Signals(received).name}; {again}")
            return 128 + received
        if status != 0:
            _say(f"{label}: failed with exit status {status}; {again}")
            return status
        if not request.folder(node).finished and not request.is_trial:
            _say(f"{label}: stopped before its end; {again}")
            return UNFINISHED
    return 0


def _compare(request: Request, node: Node, compare: Callable[[Sequence[str]], None] | None) -> None:
    """Refuses to take a finished node for what is asked now if it was made with other settings."""
    if f"{request.recipe.system}/{node.name}" in request.given:
        return
    folder = request.folder(node)
    try:
        words = request.procedure(node) if isinstance(node, Procedure) else request.arguments(node)[1:]
    except UserError as error:  # what it started from may be gone since
        _say(f"{node.name}: finished, and not compared with what is asked now: {error}")
        return
    if isinstance(folder, ProcedureFolder):
        compare_finished(folder, words)
    elif compare is not None and folder.config_file.is_file():
        compare(words)


def _parse(arguments: list[str]) -> Request:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own, options = arguments[:at], tuple(arguments[at + 1 :])
    own, of_stages = _split_stage_options(own)
    parser = OptionParser(
        command="fit --recipe",
        remedy="; options of the stages themselves go behind --",
        prog="vlm fit --recipe",
        description="Every stage and procedure of a published recipe, one process each. The same command continues.",
        epilog="--stage.NAME.KEY=VALUE sets an option of one node; options behind -- go to every training stage.",
    )
    parser.add_argument("--recipe", required=True, metavar="SYSTEM", help="name in configs/, or path of a recipe.yaml")
    parser.add_argument("--demo", action="store_true", help="the same stages at laptop size on the embedded data")
    parser.add_argument("--run", type=Path, help="run folder; runs/SYSTEM or runs/SYSTEM_demo by default")
    parser.add_argument("--stage", metavar="NAME", help="this stage alone; under torchrun and SLURM there must be one")
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="FILE", help="over the files of every training stage"
    )
    parser.add_argument("--weights", metavar="X", help="with --stage: start that stage from X, as `vlm fit -c` does")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="an ablation: without it")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="print the commands and start nothing")
    parser.add_argument(
        "--from",
        action="append",
        default=[],
        dest="given",
        metavar="SYSTEM/STAGE=FOLDER",
        help="start from this artefact, run folder of a stage, or data of a procedure, instead of making it",
    )
    options_read = parser.parse_args(own)
    recipe = load_recipe(find_recipe(options_read.recipe))
    for name in options_read.skip:
        recipe = recipe.without(name)
    for name in of_stages:
        recipe.node(name)
    if options_read.weights is not None and (options_read.stage is None or options_read.given):
        raise UserError("fit --recipe: --weights says what one stage starts from; name it with --stage, without --from")
    if options_read.stage is None and not options_read.dry_run and _is_distributed():
        names = ", ".join(node.name for node in recipe.nodes)
        raise UserError(
            "fit --recipe: this process is one of several (torchrun or SLURM), so say which stage with --stage "
            f"({names}); configs/cluster/slurm.sh loops over them"
        )
    return Request(
        name=options_read.recipe,
        recipe=recipe,
        run=options_read.run or default_run(recipe.system, options_read.demo, options_read.skip),
        demo=options_read.demo,
        stage=options_read.stage,
        dry_run=options_read.dry_run,
        given=_given(options_read.given, recipe),
        configs=tuple(options_read.config),
        weights=options_read.weights,
        options=options,
        stage_options=of_stages,
    )


def _split_stage_options(arguments: list[str]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Takes `--stage.NAME.KEY=VALUE` and `--stage.NAME.KEY VALUE` out: {NAME: (`--KEY=VALUE`, ...)}."""
    rest: list[str] = []
    found: dict[str, tuple[str, ...]] = {}
    items = iter(arguments)
    for item in items:
        if not item.startswith("--stage."):
            rest.append(item)
            continue
        left, equals, value = item.partition("=")
        name, dot, key = left.removeprefix("--stage.").partition(".")
        if not equals:
            value = next(items, "")
        if not (name and dot and key) or (not equals and (not value or value.startswith("--"))):
            raise UserError(f"fit --recipe: {item}: write --stage.NAME.KEY=VALUE")
        found[name] = (*found.get(name, ()), f"--{key}={value}")
    return rest, found


def _given(entries: list[str], recipe: Recipe) -> dict[str, Path]:
    used = {str(f): None for node in recipe.nodes if isinstance(node, TrainingStage) for f in node.follows}
    nodes = {f"{recipe.system}/{node.name}": node for node in recipe.nodes}
    needed = {f"{recipe.system}/{name}" for node in recipe.nodes for name in node.needs}
    given: dict[str, Path] = {}
    for entry in entries:
        name, equals, folder = entry.partition("=")
        if not equals or not folder:
            raise UserError(f"--from {entry}: write --from SYSTEM/STAGE=FOLDER")
        if name not in {*used, *needed}:
            known = ", ".join(sorted({*used, *needed})) or "nothing"
            raise UserError(f"--from {entry}: no stage of {recipe.path} follows {name}; they follow {known}")
        given[name] = _given_product(entry, Path(folder), nodes.get(name))
    return given


def _given_product(entry: str, path: Path, node: Node | None) -> Path:
    """The artefact in a folder, or the data that a procedure wrote."""
    if isinstance(node, Procedure):
        data = path / node.writes if ProcedureFolder(path).finished else path
        if not data.exists():
            raise UserError(f"--from {entry}: {data} is not there")
        return data
    candidates = (path, path / "artefact")
    artefact = next((folder for folder in candidates if (folder / "stage.json").is_file()), None)
    if artefact is None:
        raise UserError(f"--from {entry}: {path} holds no finished stage (no stage.json)")
    return artefact


def _is_distributed() -> bool:
    def number(name: str) -> int:
        value = os.environ.get(name, "")
        return int(value) if value.isdecimal() else 1

    return number("WORLD_SIZE") > 1 or number("SLURM_NTASKS") > 1 or "TORCHELASTIC_RUN_ID" in os.environ


def _say(line: str) -> None:
    # of several ranks one speaks; flushed, because the stage writes to the same place
    if rank() == "0":
        print(line, flush=True)
