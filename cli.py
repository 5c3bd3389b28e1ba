"""The command line: LightningCLI for fit, validate, test and predict; a thin front end for recipes and tools.

`python cli.py ...`, `python -m cli ...` and `vlm ...` are the same.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import vlm
from vlm.command_line.classes import import_classes
from vlm.command_line.commands import HELP, OPTIONS, TAKE_STAGES, TOOLS, USAGE, is_stage_command
from vlm.command_line.config_faults import Section, find_fault, find_lost_key
from vlm.command_line.errors import (
    innermost,
    lost_rank_error,
    memory_error,
    one_line_errors,
    refused_trainer,
    status_of_signals,
    user_error,
)
from vlm.command_line.layers import read_layers
from vlm.command_line.quiet import silence
from vlm.command_line.trainer_flags import check_launcher, check_seed, check_trainer_settings, keep_in_run, log_of_run
from vlm.command_line.weights import UNTRAINED, options_from_weights
from vlm.errors import UserError
from vlm.finetuning import read_options


def main(args: Sequence[str] | None = None, run: bool = True) -> Any:
    """Runs one command; an error that the user can mend is printed as one line.

    Args:
        args: of the command line; by default those of this process.
        run: false makes model, data and trainer of a stage and runs nothing; `args` are then those of `vlm fit`.

    Returns:
        The process's exit status: 0, 1 when a tool could not do all of its work, or 2 for an error of the user.
        The LightningCLI with `model`, `datamodule` and `trainer` where nothing is to run.

    Raises:
        UserError: only where nothing is to run.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if not run:
        return _open_stage(arguments[1:] if arguments[:1] == ["fit"] else arguments)
    try:
        return _dispatch(arguments)
    except Exception as error:
        cause = user_error(error) or memory_error(error) or lost_rank_error(error)
        if cause is None:
            raise
        print(f"vlm: error: {cause}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vlm: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _dispatch(arguments: list[str]) -> int:
    command, options = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(vlm.__version__)
        return 0
    if command == "fit" and any(option.split("=")[0] == "--recipe" for option in options):
        from vlm.recipes import run_recipe

        return run_recipe(options, compare=_compare_finished)
    if is_stage_command(command, options):
        if command != "fit":
            return _run_stage(command, [*options_from_weights(options), *options])
        asked = read_options(options)
        return _run_stage(command, asked.options, tell=asked.tell)
    if command in TOOLS:
        module, name = TOOLS[command].split(":")
        keywords = {"describe": _describe} if command in TAKE_STAGES else {}
        return getattr(import_module(module), name)(options, **keywords)
    raise UserError(f"unknown command {command!r}; `vlm --help` lists them")


@cache
def _stage_cli() -> Any:
    """The LightningCLI of a stage; lightning is imported when there is something to train."""
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ProgressBar
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    import yaml

    import callbacks
    from vlm.checkpoints.published.open import find_weights
    from vlm.checkpoints.resume.single_file import AtomicCheckpointIO
    from vlm.command_line.run_entry import enter_run
    from vlm.data import VisionLanguageData
    from vlm.module import VisionLanguageModule
    from vlm.recipes.run_folder import RunFolder

    groups = {
        "stage": callbacks.StageTransition,
        "checkpoint": callbacks.ResumeCheckpoint,
        "health": callbacks.Health,
        "throughput": callbacks.ThroughputMonitor,
        "predictions": callbacks.Predictions,
        "evaluation": callbacks.Evaluation,
        "answers": callbacks.AnswerWriter,
    }
    sections = {key: Section(kind) for key, kind in groups.items()} | {
        "trainer": Section(Trainer),
        "model": Section(VisionLanguageModule, is_class=True),
        "data": Section(VisionLanguageData, is_class=True),
    }

    class StageCLI(LightningCLI):
        """One stage: `model`, `data`, `trainer`, and a group of options for each callback that every stage has.

        Args:
            command: what it does; None where nothing is to run.
            locks: of the run folder, which are held while it is open.
            tell: gets the settings of a run that begins or goes on.
        """

        def __init__(
            self,
            args: list[str] | None,
            *,
            command: str | None = None,
            locks: ExitStack | None = None,
            tell: Callable[[str], None] | None = None,
        ) -> None:
            self.command = command
            self.locks = locks
            self.tell = tell
            self.ckpt_path: Any = None
            silence()
            import_classes()
            one_line = {"exit_on_error": False}
            super().__init__(
                VisionLanguageModule,
                VisionLanguageData,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                # the data deals its own samples; the stage's banner says what the model summary would
                trainer_defaults={
                    "use_distributed_sampler": False,
                    "enable_model_summary": False,
                    "callbacks": [callbacks.BadSamples(), callbacks.OutOfMemory()],
                },
                parser_kwargs=one_line | dict.fromkeys(self.subcommands(), one_line),
                args=args,
                run=command is not None,
            )

        def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
            """The one that is asked for: parsers for all of them take four times as long to make."""
            return {name: skip for name, skip in LightningCLI.subcommands().items() if name == self.command}

        def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
            return super().init_parser(**HELP, **kwargs)

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            for key, kind in groups.items():
                parser.add_lightning_class_args(kind, key)
            help_text = f"what to look at, as in predict; {UNTRAINED}: the system as its first stage finds it"
            parser.add_argument("--weights", type=str | None, default=None, help=help_text)
            parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)
            parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            options = [str(word) for word in (sys.argv[1:] if args is None else args)]
            layers = read_layers(options)
            check_seed(layers)
            if fault := find_lost_key(layers, sections, OPTIONS):
                raise UserError(fault)
            try:
                super().parse_arguments(parser, args)
            except ArgumentError as error:
                raise UserError(find_fault(layers, sections, OPTIONS) or innermost(error)) from error

        @property
        def settings(self) -> Any:
            """The resolved options of the command."""
            return self.config if self.subcommand is None else self.config[self.subcommand]

        def before_instantiate_classes(self) -> None:
            settings = self.settings
            check_launcher(os.environ)
            check_trainer_settings(settings, trains=self.subcommand == "fit")
            settings.trainer.default_root_dir = settings.trainer.default_root_dir or f"runs/{settings.stage.name}"
            self.ckpt_path = settings.get("ckpt_path")
            if self.subcommand == "fit" and not settings.trainer.fast_dev_run:  # which leaves nothing behind
                assert self.locks is not None
                parser, folder = self._parser("fit"), RunFolder(settings.trainer.default_root_dir)
                self.ckpt_path = enter_run(
                    folder,
                    lambda: yaml.safe_load(parser.dump(settings, skip_unset=False)),
                    ckpt_path=self.ckpt_path,
                    locks=self.locks,
                )
                if self.tell is not None:
                    self.tell(parser.dump(settings, skip_default=True, skip_unset=True))
            elif self.subcommand not in ("fit", None) and settings.weights is None:
                raise UserError(
                    f"{self.subcommand} needs --weights: an artefact, run folder or published folder, or {UNTRAINED!r}"
                )

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            config, made = self.settings.trainer, self._get(self.config_init, "trainer")
            if self.subcommand not in ("fit", None) and config.logger in (None, True):
                kwargs["logger"] = False  # the table and scores.json say it; the log of the training stays as it is
            elif config.logger in (None, True):
                kwargs["logger"] = log_of_run(config.default_root_dir, self.ckpt_path)
            plugins, own = _as_list(made.plugins), _as_list(made.callbacks)
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
            own.append(callbacks.LogCadence(adapt=config.log_every_n_steps is None))
            if config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in own):
                own.append(callbacks.Progress())
            kwargs["callbacks"] = own
            kwargs["profiler"] = keep_in_run(own, made.profiler, Path(config.default_root_dir))
            if self.subcommand != "fit":
                kwargs["enable_checkpointing"] = None  # nothing is saved, and Lightning refuses `checkpoint` without it
            try:
                return super().instantiate_trainer(**kwargs)
            except (MisconfigurationException, ValueError, ModuleNotFoundError) as error:
                if user_error(error) is not None:
                    raise
                raise refused_trainer(error, config) from error

        def after_instantiate_classes(self) -> None:
            weights = self.settings.weights
            if weights is not None and weights != UNTRAINED:
                self.model.weights = find_weights(weights)

        def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
            # `Evaluation` prints its own table, `AnswerWriter` writes the answers
            own = {"fit": {}, "predict": {"return_predictions": False}}.get(subcommand, {"verbose": False})
            return super()._prepare_subcommand_kwargs(subcommand) | own | {"ckpt_path": self.ckpt_path}

    return StageCLI


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else [*value] if isinstance(value, list) else [value]


def _run_stage(command: str, options: Sequence[str], *, tell: Callable[[str], None] | None = None) -> int:
    """Runs a stage; `tell` gets its settings as YAML, those left at their defaults left out, before it starts."""
    with ExitStack() as locks, one_line_errors(), status_of_signals():
        arguments = [command, *options]
        command_line = None if arguments == sys.argv[1:] else arguments
        made = _stage_cli()(command_line, command=command, locks=locks, tell=tell)
        return 1 if made.config_init[command].answers.failed else 0


def _compare_finished(options: Sequence[str]) -> None:
    """Refuses options of `vlm fit` for a finished stage that differ from those it was trained with."""
    from vlm.command_line.run_entry import StageFinished

    with suppress(StageFinished):
        _run_stage("fit", read_options(options).options)


def _open_stage(options: Sequence[str]) -> Any:
    """Model, data and trainer of the stage that `vlm fit` would run; no run folder is entered."""
    with one_line_errors():
        return _stage_cli()(read_options(options).options)


def _describe(options: Sequence[str], *, on_gpu: bool | None = None) -> Any:
    """The stage that `vlm fit` would train with these options, as a `StageView`. Nothing is built.

    Args:
        on_gpu: where it would; None: on this machine.
    """
    from vlm.commands.check_data.stage_view import StageView

    class Description(_stage_cli()):  # type: ignore[misc]
        """The options of `fit` without a trainer."""

        def instantiate_classes(self) -> None:
            self.config_init = self.parser.instantiate(self.config)

        def after_instantiate_classes(self) -> None:
            """Weights are not looked for."""

    asked = read_options(options, on_gpu=on_gpu)
    print(*asked.summary, sep="\n", end="\n" if asked.summary else "", file=sys.stderr, flush=True)
    with one_line_errors():
        made = Description(asked.options).config_init
    for callback in made.trainer.callbacks or []:
        if (surgery := getattr(callback, "surgery", None)) is not None:
            made.model.register_surgery(surgery)
        if getattr(callback, "keeps_averages", False):
            made.model.averages = {}
    return StageView(made.model, made.stage.stage, made.data, made.trainer)


if __name__ == "__main__":
    sys.exit(main())
