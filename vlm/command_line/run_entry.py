"""Entering a run folder: one process at a time, on from the newest checkpoint, with the settings it began with."""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.recipes.run_folder import RunFolder

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
"""What torchrun, SLURM and Lightning's own launcher tell a process about its place; the first one has 0 in all."""


class StageFinished(UserError):
    """A stage is finished, with the settings that are asked for."""


def is_first_process() -> bool:
    return all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES)


def enter_run(
    folder: RunFolder, settings: Callable[[], Mapping[str, Any]], *, ckpt_path: Path | None, locks: ExitStack
) -> Path | None:
    """Locks the run folder, finds where to go on, and refuses to go on with other settings.

    Args:
        settings: the resolved ones.
        ckpt_path: where the user wants to go on; None: at the newest checkpoint.
        locks: keeps the folder locked.

    Returns:
        The checkpoint to go on from; None at a start.

    Raises:
        StageFinished: there is nothing to do.
        UserError: other settings, or another process works in the folder.
    """
    if folder.finished:
        folder.check_config(settings())
        raise StageFinished(
            f"{folder.path}: this stage is finished; choose another trainer.default_root_dir to train it again"
        )
    if is_first := is_first_process():
        locks.enter_context(folder.lock())
    ckpt_path = ckpt_path or folder.last_checkpoint()
    if is_first:
        resolved = settings()
        if ckpt_path is not None:
            folder.check_config(resolved)
        folder.save_config(resolved)
    return ckpt_path
