"""`vlm fit --recipe`: one ordinary `vlm fit -c ...` process for each unfinished stage.

What to start next is decided from files that finished processes left behind, so a stopped recipe is continued by the
same command.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from vlm.errors import UserError
from vlm.recipes.catalogue import find_recipe
from vlm.recipes.configs import config_files, from_here
from vlm.recipes.graph import Followed, Procedure, Recipe, TrainingStage, load_recipe
from vlm.recipes.run_folder import RunFolder

UNFINISHED = 75
"""Exit status when a stage ended well but before its end, as with `trainer.max_time` (EX_TEMPFAIL of sysexits.h)."""

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"fit --recipe: {message}; options of the stages themselves go behind --")


@dataclass(frozen=True)
class _Request:
    """What the command line asks for.

    Attributes:
        name: the recipe as the command line called it.
        stage: the only one to run, None for all.
        given: artefacts that need not be made, by `system/stage`.
        options: for every stage.
        stage_options: for one stage, by its name; they come after `options` and win.
    """

    name: str
    recipe: Recipe
    run: Path
    demo: bool
    stage: str | None
    dry_run: bool
    given: Mapping[str, Path]
    options: tuple[str, ...]
    stage_options: Mapping[str, tuple[str, ...]]


def run_recipe(arguments: Sequence[str], *, command: Sequence[str] = (sys.executable, "-m", "cli")) -> int:
    """Runs the unfinished stages of a recipe in order, one process at a time.

    Args:
        arguments: what follows `vlm fit`.
        command: the program that trains one stage; `fit -c ...` is appended.

    Returns:
        0 when everything asked for is finished, the exit status of the stage that failed, 128 plus the signal that
        stopped it, or `UNFINISHED`.

    Raises:
        UserError: an option, the recipe, or an artefact that is not there.
    """
    request = _parse(list(arguments))
    recipe = request.recipe
    chosen = recipe.nodes if request.stage is None else (recipe.node(request.stage),)
    waiting = [node for node in chosen if not _skipped(request, node)]
    commands = {
        node.name: [*command, *_fit_arguments(request, node)] for node in waiting
    }  # all errors before the start
    for number, node in enumerate(chosen, start=1):
        label = f"[{number}/{len(chosen)}] {recipe.system} {node.name}"
        if node.name not in commands:
            _say(f"{label}: {_skipped(request, node)}")
            continue
        _say(f"{label}:\n  {shlex.join(commands[node.name])}")
        if request.dry_run:
            continue
        status, received = _run_child(commands[node.name])
        again = f"the same command continues: vlm fit {shlex.join(arguments)}"
        if received is not None:
            _say(f"{label}: stopped by {signal.Signals(received).name}; {again}")
            return 128 + received
        if status != 0:
            _say(f"{label}: failed with exit status {status}; {again}")
            return status
        if not RunFolder(request.run / node.name).finished:
            _say(f"{label}: stopped before its end; {again}")
            return UNFINISHED
    return 0


def _parse(arguments: list[str]) -> _Request:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own, options = arguments[:at], tuple(arguments[at + 1 :])
    own, of_stages = _split_stage_options(own)
    parser = _Parser(
        prog="vlm fit --recipe",
        allow_abbrev=False,
        description="Trains every stage of a published recipe, one process each. The same command continues.",
        epilog="--stage.NAME.KEY=VALUE sets an option of one stage; options behind -- go to every stage.",
    )
    parser.add_argument("--recipe", required=True, metavar="SYSTEM", help="name in configs/, or path of a recipe.yaml")
    parser.add_argument("--demo", action="store_true", help="the same stages at laptop size on the embedded data")
    parser.add_argument("--run", type=Path, help="run folder; runs/SYSTEM or runs/SYSTEM_demo by default")
    parser.add_argument("--stage", metavar="NAME", help="this stage alone; under torchrun and SLURM there must be one")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="an ablation: without it")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="print the commands and start nothing")
    parser.add_argument(
        "--from",
        action="append",
        default=[],
        dest="given",
        metavar="SYSTEM/STAGE=FOLDER",
        help="start from this artefact (or run folder of a stage) instead of training it",
    )
    options_read = parser.parse_args(own)
    recipe = load_recipe(find_recipe(options_read.recipe))
    for name in options_read.skip:
        recipe = recipe.without(name)
    for name in of_stages:
        recipe.node(name)
    if options_read.stage is None and not options_read.dry_run and _is_distributed():
        names = ", ".join(node.name for node in recipe.nodes)
        raise UserError(
            "fit --recipe: this process is one of several (torchrun or SLURM), so say which stage with --stage "
            f"({names}); configs/cluster/slurm.sh loops over them"
        )
    return _Request(
        name=options_read.recipe,
        recipe=recipe,
        run=options_read.run or _default_run(recipe.system, options_read.demo, options_read.skip),
        demo=options_read.demo,
        stage=options_read.stage,
        dry_run=options_read.dry_run,
        given=_given(options_read.given, recipe),
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
    followed = {str(f) for node in recipe.nodes if isinstance(node, TrainingStage) for f in node.follows}
    given: dict[str, Path] = {}
    for entry in entries:
        name, equals, folder = entry.partition("=")
        if not equals or not folder:
            raise UserError(f"--from {entry}: write --from SYSTEM/STAGE=FOLDER")
        if name not in followed:
            known = ", ".join(sorted(followed)) or "nothing"
            raise UserError(f"--from {entry}: no stage of {recipe.path} follows {name}; they follow {known}")
        candidates = (Path(folder), Path(folder) / "artefact")
        artefact = next((path for path in candidates if (path / "stage.json").is_file()), None)
        if artefact is None:
            raise UserError(f"--from {entry}: {folder} holds no finished stage (no stage.json)")
        given[name] = artefact
    return given


def _default_run(system: str, demo: bool, skipped: Sequence[str] = ()) -> Path:
    name = f"{system}_demo" if demo else system
    return Path("runs") / "_without_".join((name, *skipped))


def _is_distributed() -> bool:
    def number(name: str) -> int:
        value = os.environ.get(name, "")
        return int(value) if value.isdecimal() else 1

    return number("WORLD_SIZE") > 1 or number("SLURM_NTASKS") > 1 or "TORCHELASTIC_RUN_ID" in os.environ


def _skipped(request: _Request, node: TrainingStage | Procedure) -> str | None:
    """Why a node need not run, None when it has to."""
    given = request.given.get(f"{request.recipe.system}/{node.name}")
    if given is not None:
        return f"not needed, its artefact is {given}"
    folder = RunFolder(request.run / node.name)
    return f"finished, skipped ({folder.artefact})" if folder.finished else None


def _fit_arguments(request: _Request, node: TrainingStage | Procedure) -> list[str]:
    """The arguments of the process that trains one stage."""
    recipe = request.recipe
    if isinstance(node, Procedure):
        raise UserError(f"{recipe.path}: stages.{node.name}.run: this version has no procedure {node.run!r}")
    arguments = ["fit"]
    for file in config_files(recipe, node, demo=request.demo):
        arguments += ["-c", from_here(file)]
    arguments += ["--trainer.default_root_dir", str(request.run / node.name), "--stage.name", node.name]
    if node.follows:
        follows = [
            {"artefact": str(_artefact(request, followed)), "parts": dict(followed.parts)} for followed in node.follows
        ]
        arguments += ["--stage.follows", json.dumps(follows)]
    if node.continues is not None:
        arguments += ["--stage.continues", str(_artefact(request, Followed(recipe.system, node.continues)))]
    if any(isinstance(other, TrainingStage) and other.continues == node.name for other in recipe.nodes):
        arguments += ["--stage.keep_optimizer", "true"]
    return [*arguments, *request.options, *request.stage_options.get(node.name, ())]


def _artefact(request: _Request, followed: Followed) -> Path:
    """The artefact of a followed stage. It is there, or an earlier node of this command makes it."""
    if str(followed) in request.given:
        return request.given[str(followed)]
    is_own = followed.system == request.recipe.system
    run = request.run if is_own else _default_run(followed.system, request.demo)
    folder = RunFolder(run / followed.stage)
    if folder.finished or (is_own and request.stage is None):
        return folder.artefact
    recipe = request.name if is_own else followed.system
    makes_it = ["vlm", "fit", "--recipe", recipe, *(["--demo"] if request.demo else [])]
    makes_it += ["--run", str(run), "--stage", followed.stage]
    raise UserError(
        f"{folder.artefact}: {followed} is not finished; make it with `{shlex.join(makes_it)}` "
        f"or give one with --from {followed}=FOLDER"
    )


def _run_child(command: list[str]) -> tuple[int, int | None]:
    """Runs one process in the foreground.

    Returns:
        Its exit status (128 + signal if one killed it), and the signal this process got and passed on, if any.
    """
    child: subprocess.Popen | None = None
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # Ctrl-C reaches the whole foreground group; a second one would cut the child's orderly stop short
        if child is not None and not (number == signal.SIGINT and _is_foreground()):
            child.send_signal(number)

    # what this process ignores (SIGHUP under nohup) the child must go on ignoring, and it inherits just that
    heard = [number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, pass_on) for number in heard}
    try:
        child = subprocess.Popen(command)
        for number in list(received):  # came before there was a child to pass it to
            child.send_signal(number)
        status = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    # SIGUSR1 and SIGUSR2 ask a scheduler's questions (save, requeue), they do not say stop
    stopped = next((number for number in received if number not in (signal.SIGUSR1, signal.SIGUSR2)), None)
    return (128 - status if status < 0 else status), stopped


def _is_foreground() -> bool:
    """Whether this process is in the foreground of a terminal, where the terminal itself sends SIGINT to its child."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _say(line: str) -> None:
    # of several ranks one speaks; flushed, because the stage writes to the same place
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(line, flush=True)
