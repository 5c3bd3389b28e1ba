"""Errors of libraries as errors of the user, where they are: one line that names key and remedy."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlm.errors import UserError, is_lost_rank, is_out_of_memory


def user_error(error: BaseException | None) -> UserError | None:
    """The error of the user behind an exception: the configuration parser and the trainer's clean-up wrap it."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def memory_error(error: BaseException) -> UserError | None:
    """What a device without memory says, with what would take less; None for any other error."""
    if not is_out_of_memory(error):
        return None
    said = " ".join(str(error).split()).split(" If reserved but unallocated")[0].split(" See documentation")[0]
    return UserError("; ".join([f"out of memory: {said.rstrip('.')}", *getattr(error, "__notes__", ())]))


def lost_rank_error(error: BaseException) -> UserError | None:
    """What a rank says whose peer has gone; None for any other error."""
    if not is_lost_rank(error):
        return None
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    said = re.sub(r"^\[[^]]*\] ?", "", str(error).split("\n")[0]).split(". This ")[0].rstrip(".")
    return UserError(
        f"rank {rank}: another rank has ended or does not answer "
        f"({said}); its own last lines say why. The same command goes on from the newest checkpoint"
    )


def innermost(error: BaseException) -> str:
    """What the configuration parser found at the bottom of what it says, behind the key at the top."""
    key, reason = str(error).partition(":")[0], " ".join(str(_bottom(error)).split())
    return reason if reason.startswith(key) else f"{key}: {reason}"


def refused_trainer(error: Exception, settings: Any) -> UserError:
    """What Lightning's trainer refuses to be made with, and what it was given."""
    given = ", ".join(f"{key}={settings[key]}" for key in ("accelerator", "devices", "strategy"))
    reason = " ".join(str(error).split()).rstrip(".!")
    return UserError(f"trainer ({given}): {reason}; correct it, or leave it at auto")


_SETTINGS = ("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "lightning.pytorch.tuner")
"""Modules of Lightning that raise where a setting of the user does not fit."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What the configuration parser, the trainer and Lightning's callbacks and loggers refuse."""
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except Exception as error:
        if (cause := user_error(error)) is not None:
            raise cause from error
        bottom = _bottom(error)
        if isinstance(bottom, ModuleNotFoundError) and bottom is not error:
            raise UserError(_missing_package(error, bottom)) from error
        if isinstance(error, (ArgumentError, MisconfigurationException)) or _raised_in(error).startswith(_SETTINGS):
            raise UserError(" ".join(str(error).split())) from error
        raise


def _bottom(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _missing_package(error: BaseException, missing: ModuleNotFoundError) -> str:
    """Lightning's `Requirement 'wandb>=0.12.10' not met`, and which class wants it."""
    package = re.search(r"Requirement '([\w-]+)", str(missing)) or re.search(r"`pip install ([\w\[\]-]+)", str(missing))
    name = package[1] if package else str(missing.name or missing)
    wanted = re.findall(r"class_path '[\w.]*\.(\w+)'", str(error))
    return f"{wanted[-1] if wanted else 'a class of the configuration'} needs the package {name}: pip install {name}"


def _raised_in(error: BaseException) -> str:
    """Name of the module that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""


@contextmanager
def status_of_signals() -> Iterator[None]:
    """Lightning ends a terminated training with status 0, as if it were finished, and an interrupted one with 1."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    try:
        yield
    except SIGTERMException as stop:
        number = stop.args[0] if stop.args else signal.SIGTERM
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        print(f"vlm: stopped by {name}; the same command goes on", file=sys.stderr)
        sys.exit(128 + number)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # before or after the training, in a validation or test
            raise stop.__context__ from None
        raise
