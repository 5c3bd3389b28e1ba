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
def status_of_sigterm() -> Iterator[None]:
    """Lightning ends a terminated training with status 0, as if it were finished."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    try:
        yield
    except SIGTERMException:
        print("vlm: stopped by SIGTERM; the same command goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
