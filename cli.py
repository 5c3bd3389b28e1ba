"""The command line: LightningCLI for fit, validate, test and predict; a thin front end for recipes and tools.

`python cli.py ...`, `python -m cli ...` and `vlm ...` are the same.
"""

import argparse
import json
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import vlm
from vlm.errors import UserError

USAGE = """usage: vlm COMMAND ...

  fit --recipe SYSTEM [--demo]     train every stage of a published recipe, one process each; continues where it stopped
  fit -c FILE [-c FILE ...]        train one stage
  validate | test -c FILE ... --weights ARTEFACT
  scores NAME=FOLDER ...           what several evaluations found, side by side
  predict --weights ARTEFACT --image FILE|FOLDER ... --prompt TEXT | --questions FILE [--out FILE] [--pictures FOLDER]
  check-data -c FILE ...           look at every sample before a run does; a report, and a list of the bad ones
  show-data -c FILE ...            what is trained on: pictures as the system sees them, tokens and labels
  systems                          the systems and their stages
  demo-data FOLDER                 write the embedded data
  convert SRC DST --system NAME --to LAYOUT
  run PROCEDURE ...                make data as the papers do; `vlm run` lists the procedures
  export SRC DST                   a finished stage as a folder for the Hugging Face tools

`vlm fit --help` lists every option of a stage."""

UNTRAINED = "untrained"
"""Value of --weights for a system without any training of ours."""

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
"""What torchrun, SLURM and Lightning's own launcher tell a process about its place; the first one has 0 in all."""


TOOLS = {
    "check-data": "vlm.commands.check_data.command:main",
    "convert": "vlm.commands.convert:main",
    "demo-data": "vlm.demo:main",
    "export": "vlm.commands.export:main",
    "predict": "vlm.commands.predict:main",
    "run": "vlm.recipes.node:main",
    "scores": "vlm.evaluation.scores:main",
    "show-data": "vlm.commands.show_data:main",
    "systems": "vlm.recipes.catalogue:print_systems",
}
"""Commands that need no trainer: the function that runs each, imported when it is asked for."""

_CLASSES: dict[str, Any] = {
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "save_config_callback": None,
    "seed_everything_default": 0,
    "auto_configure_optimizers": False,
}
"""How LightningCLI treats our classes."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command; an error that the user can mend is printed as one line.

    Returns:
        The process's exit status: 0, 1 when a tool could not do all of its work, or 2 for an error of the user.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        return _dispatch(arguments)
    except Exception as error:
        cause = _user_error(error)
        if cause is None:
            raise
        print(f"vlm: error: {cause}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vlm: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _user_error(error: BaseException | None) -> UserError | None:
    """The error of the user behind an exception: the configuration parser and the trainer's clean-up wrap it."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(vlm.__version__)
        return 0
    if command == "fit" and any(argument.split("=")[0] == "--recipe" for argument in arguments):
        from vlm.recipes import run_recipe

        return run_recipe(arguments[1:])
    if command in TOOLS:
        module, name = TOOLS[command].split(":")
        keywords = {"describe": _describe} if command in ("check-data", "show-data") else {}
        return getattr(import_module(module), name)(arguments[1:], **keywords)
    if command not in ("fit", "validate", "test"):
        raise UserError(f"unknown command {command!r}; `vlm --help` lists them")
    _run_lightning(arguments)
    return 0


def _run_lightning(arguments: list[str]) -> None:
    """fit, validate and test: LightningCLI commands on a run folder."""
    import yaml
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ProgressBar
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.loggers import TensorBoardLogger

    from callbacks import BadSamples, LogCadence, Progress
    from vlm.checkpoints.resume.single_file import AtomicCheckpointIO
    from vlm.checkpoints.published.open import find_weights
    from vlm.data import VisionLanguageData
    from vlm.module import VisionLanguageModule
    from vlm.recipes.run_folder import RunFolder

    command, *options = arguments
    if command != "fit":
        arguments = [command, *_from_weights(options), *options]

    class StageCLI(LightningCLI):
        """One stage: `model`, `data`, `trainer`, and a group of options for each callback that every stage has."""

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            commands = LightningCLI.subcommands()
            return {name: commands[name] for name in ("fit", "validate", "test")}

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            _add_options(parser)

        def before_instantiate_classes(self) -> None:
            config = self.config[self.subcommand]
            root = config.trainer.default_root_dir or f"runs/{config.stage.name}"
            config.trainer.default_root_dir = root
            self.ckpt_path = config.get("ckpt_path")
            if self.subcommand == "fit":
                self._enter(RunFolder(root))
            elif config.weights is None:
                raise UserError(
                    f"{self.subcommand} needs --weights: an artefact, run folder or published folder, or {UNTRAINED!r}"
                )

        def _enter(self, folder: RunFolder) -> None:
            """Locks the run folder, finds where to go on, and refuses to go on with other settings."""
            if folder.finished:
                raise UserError(
                    f"{folder.path}: this stage is finished; choose another trainer.default_root_dir to train it again"
                )
            if is_first := all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES):
                locks.enter_context(folder.lock())
            self.ckpt_path = self.ckpt_path or folder.last_checkpoint()
            if not is_first:
                return
            config = yaml.safe_load(self._parser(self.subcommand).dump(self.config[self.subcommand], skip_unset=False))
            if self.ckpt_path is not None:
                folder.check_config(config)
            folder.save_config(config)

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            config = self.config[self.subcommand].trainer
            if self.subcommand != "fit" and config.logger in (None, True):
                kwargs["logger"] = False  # the table and scores.json say it; the log of the training stays as it is
            elif config.logger in (None, True):
                step = re.search(r"step=(\d+)", str(self.ckpt_path or ""))
                kwargs["logger"] = TensorBoardLogger(
                    config.default_root_dir,
                    name="",
                    version="tensorboard",
                    purge_step=int(step[1]) if step else 0,  # drop what a killed run logged after its checkpoint
                )
            plugins = self.config_init[self.subcommand].trainer.plugins or []
            kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
            own = self.config_init[self.subcommand].trainer.callbacks or []
            own = [*(own if isinstance(own, list) else [own]), LogCadence(adapt=config.log_every_n_steps is None)]
            if config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in own):
                own.append(Progress())
            kwargs["callbacks"] = own
            try:
                return super().instantiate_trainer(**kwargs)
            except (MisconfigurationException, ValueError, ModuleNotFoundError) as error:
                if _user_error(error) is not None:
                    raise
                given = ", ".join(f"{key}={config[key]}" for key in ("accelerator", "devices", "strategy"))
                reason = " ".join(str(error).split()).rstrip(".!")
                raise UserError(f"trainer ({given}): {reason}; correct it, or leave it at auto") from error

        def after_instantiate_classes(self) -> None:
            weights = self.config[self.subcommand].weights
            if weights is None or weights == UNTRAINED:
                return
            self.model.weights = find_weights(weights)

        def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
            table = {} if subcommand == "fit" else {"verbose": False}  # `Evaluation` prints its own
            return super()._prepare_subcommand_kwargs(subcommand) | table | {"ckpt_path": self.ckpt_path}

    _silence()
    one_line = {"exit_on_error": False}
    with ExitStack() as locks, _one_line_errors(), _status_of_sigterm():
        StageCLI(
            VisionLanguageModule,
            VisionLanguageData,
            **_CLASSES,
            # the data deals its own samples; the stage's banner says what the model summary would
            trainer_defaults={
                "use_distributed_sampler": False,
                "enable_model_summary": False,
                "callbacks": [BadSamples()],
            },
            parser_kwargs=one_line | dict.fromkeys(StageCLI.subcommands(), one_line),
            args=None if arguments == sys.argv[1:] else arguments,
        )


def _add_options(parser: Any) -> None:
    """What every stage has besides `model`, `data` and `trainer`."""
    from callbacks import Evaluation, Health, Predictions, ResumeCheckpoint, StageTransition, Throughput

    parser.add_lightning_class_args(StageTransition, "stage")
    parser.add_lightning_class_args(ResumeCheckpoint, "checkpoint")
    parser.add_lightning_class_args(Health, "health")
    parser.add_lightning_class_args(Throughput, "throughput")
    parser.add_lightning_class_args(Predictions, "predictions")
    parser.add_lightning_class_args(Evaluation, "evaluation")
    help_text = f"what to look at, as in predict; {UNTRAINED}: the system as its first stage finds it"
    parser.add_argument("--weights", type=str | None, default=None, help=help_text)
    parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)
    parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)


def _silence() -> None:
    """What libraries say that our own banner and checks say, or that is meant that way."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "LightningCLI's args parameter",
        "Found .* module.s. in eval mode",
        "Total length of .list. across ranks is zero",
        ".*LeafSpec",
        ".*smaller than the logging interval",  # `LogCadence` sees to it
    ):
        warnings.filterwarnings("ignore", message)


def _describe(options: Sequence[str]) -> Any:
    """The stage that `vlm fit` would train with these options, as a `StageView`. Nothing is built."""
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from vlm.data import VisionLanguageData
    from vlm.commands.check_data.stage_view import StageView
    from vlm.module import VisionLanguageModule

    class Description(LightningCLI):
        """The options of `fit` without a trainer."""

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            _add_options(parser)

        def instantiate_classes(self) -> None:
            self.config_init = self.parser.instantiate(self.config)

    _silence()
    with _one_line_errors():
        made = Description(
            VisionLanguageModule,
            VisionLanguageData,
            **_CLASSES,
            parser_kwargs={"exit_on_error": False},
            args=list(options),
            run=False,
        ).config_init
    return StageView(made.model.system, made.stage.stage.name, made.model.codec, made.data)


def _from_weights(options: Sequence[str]) -> list[str]:
    """What weights know about themselves, as options that configuration files and other options come after."""
    from vlm.checkpoints.artefact import read_artefact
    from vlm.checkpoints.published.open import describe_published, find_weights, is_artefact
    from vlm.building.instantiate import model_of

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--weights")
    try:
        weights = parser.parse_known_args(list(options))[0].weights
    except argparse.ArgumentError:
        return []  # said by the parser of all options
    if weights is None or weights == UNTRAINED:
        return ["--stage.name", UNTRAINED, "--stage.train", "{}"]
    found = find_weights(weights)
    if is_artefact(found):
        artefact = read_artefact(found)
        model, stage, folder = model_of(artefact), artefact.meta["stage"], artefact.folder.parent
    else:
        model, stage = describe_published(found).model, "published"
        folder = Path("runs") / Path(found).name
    known = {
        "stage.name": stage,
        "stage.train": "{}",
        "trainer.default_root_dir": str(folder),
        "seed_everything": str(model["init_args"].pop("seed", 0)),
        "model": json.dumps(model),
    }
    return [word for key, value in known.items() for word in (f"--{key}", value)]


@contextmanager
def _status_of_sigterm() -> Iterator[None]:
    """Lightning ends a terminated training with status 0, as if it were finished."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    try:
        yield
    except SIGTERMException:
        print("vlm: stopped by SIGTERM; the same command goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except (ArgumentError, MisconfigurationException) as error:
        if (cause := _user_error(error)) is not None:
            raise cause from error
        raise UserError(" ".join(str(error).split())) from error


if __name__ == "__main__":
    sys.exit(main())
