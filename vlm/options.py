"""Command lines of tools."""

import argparse
from typing import Any, NoReturn

from vlm.errors import UserError


class OptionParser(argparse.ArgumentParser):
    """A parser whose errors are those of the user, in one line.

    Args:
        command: how a line names it.
        remedy: what a line ends in.
    """

    def __init__(self, *, command: str, remedy: str = "", **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.command, self.remedy = command, remedy

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.command}: {message}{self.remedy}")
