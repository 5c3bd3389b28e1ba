"""`vlm run`: a procedure by hand, or as the node of a recipe, which has a run folder.

::

    <run>/<node>/config.yaml     the procedure and its options, the record of the run
                 <writes>        the file or folder that it makes
                 finished.json   there when it has ended well
                 .lock           pid and host of the process that works here
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from vlm import procedures
from vlm.checkpoints.files.atomic import atomic_file
from vlm.errors import UserError
from vlm.options import OptionParser
from vlm.recipes.run_folder import RunFolder

HOW_IT_RUNS = (
    "node",
    "device.*",
    "endpoint.*",
    "key_env.*",
    "num_workers.*",
    "parallel.*",
    "requests_per_minute.*",
    "timeout.*",
    "tries.*",
)
"""Options of procedures that may differ between the starts of one node."""


class ProcedureFolder(RunFolder):
    """The folder of a procedure's run (see the module's drawing)."""

    @property
    def mark(self) -> Path:
        return self.path / "finished.json"

    @property
    def finished(self) -> bool:
        """Whether the procedure ended well."""
        return self.mark.is_file()


def main(arguments: list[str]) -> int:
    """`vlm run [--node FOLDER --writes NAME] PROCEDURE ...`; returns the procedure's exit status.

    Raises:
        UserError: there is no such procedure; of a node: it is finished, another process works on it, or it was
            started with other options.
    """
    if not arguments or not arguments[0].startswith("--node"):
        return procedures.main(arguments)
    parser = OptionParser(command="vlm run --node", prog="vlm run")
    parser.add_argument("--node", type=Path, required=True, metavar="FOLDER", help="its run folder in a recipe")
    parser.add_argument("--writes", required=True, metavar="NAME", help="what it makes in this folder")
    parser.add_argument("procedure", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    return _run_node(ProcedureFolder(options.node), options.writes, options.procedure)


def compare_finished(folder: ProcedureFolder, procedure: Sequence[str]) -> None:
    """Refuses a command line for a finished node that differs from the one it was run with."""
    folder.check_config(_settings(folder, procedure), how_it_runs=HOW_IT_RUNS)


def _run_node(folder: ProcedureFolder, writes: str, procedure: list[str]) -> int:
    if folder.finished:
        raise UserError(f"{folder.path}: this node is finished; choose another run folder to run it again")
    if rank() != "0":  # of several processes one keeps the folder
        return procedures.main(procedure)
    with folder.lock():
        settings = _settings(folder, procedure)
        folder.check_config(settings, how_it_runs=HOW_IT_RUNS)
        folder.save_config(settings)
        status = procedures.main(procedure)
        if status != 0:
            return status
        if not (folder.path / writes).exists():
            raise UserError(f"{folder.path / writes}: the procedure ended without it; is it what the procedure writes?")
        with atomic_file(folder.mark) as file:
            file.write((json.dumps({"run": procedure[0], "writes": writes}) + "\n").encode())
    return 0


def rank() -> str:
    """Which process of torchrun or SLURM this is."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))


def _settings(folder: ProcedureFolder, procedure: Sequence[str]) -> dict[str, str | list[str]]:
    """The folder, and the words of a command line by option, so that a change is named."""
    name, *words = procedure
    settings: dict[str, list[str]] = {"arguments": []}
    option = "arguments"
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.removeprefix("--").partition("=")
            option = option.replace("-", "_")
            settings.setdefault(option, []).extend([value] if equals else [])
        else:
            settings[option].append(word)
    return {"node": str(folder.path), "run": name, **settings}
