"""Errors of libraries as errors of the user, where they are: one line that names key and remedy."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from vlm.errors import UserError, is_out_of_memory


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


def innermost(error: BaseException) -> str:
    """What the configuration parser found at the bottom of what it says, behind the key at the top."""
    key = str(error).partition(":")[0]
    while error.__cause__ is not None:
        error = error.__cause__
    reason = " ".join(str(error).split())
    return reason if reason.startswith(key) else f"{key}: {reason}"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What the configuration parser and the trainer refuse."""
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except (ArgumentError, MisconfigurationException) as error:
        if (cause := user_error(error)) is not None:
            raise cause from error
        raise UserError(" ".join(str(error).split())) from error


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
