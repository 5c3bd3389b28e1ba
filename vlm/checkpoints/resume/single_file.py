"""Checkpoints of a running training: complete or not there, and loadable without running any code of theirs."""

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from vlm.checkpoints.files.atomic import atomic_file, remove, remove_leftovers
from vlm.checkpoints.resume.plain import check_plain
from vlm.checkpoints.resume.pointer import LAST, point_last
from vlm.errors import UserError


def read_file(path: str | Path, *, map_location: Any = None, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint of one file.

    Args:
        mmap: leave the tensors on the disk until they are looked at.

    Raises:
        UserError: no such file, a damaged one, or one with other objects in it.
    """
    try:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint; see the file {LAST!r} of its folder for the newest") from error
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: holds more than tensors and plain data, so it is not opened ({reason})") from error
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: is damaged or no checkpoint ({reason}); take another one") from error


class AtomicCheckpointIO(CheckpointIO):
    """Single-file checkpoints for Lightning that survive `kill -9` and a full disk.

    A file is written under a temporary name in its own folder, flushed, renamed, and only then does `last` name it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves, and points `last` at the file.

        Raises:
            UserError: the disk is full (earlier checkpoints are intact), or the state holds something else than tensors
                and plain data, which a resume would refuse to read.
        """
        assert storage_options is None, "no storage options: checkpoints go to a mounted filesystem"
        path = Path(path)
        remove_leftovers(path.parent)
        num_bytes = check_plain(checkpoint)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, num_bytes=num_bytes) as file:
            torch.save(checkpoint, file)
        point_last(path)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict:
        """Tensors and plain data only, whatever Lightning asks for; a sharded one is put together on the CPU.

        The tensors of a file stay on the disk until they are copied to where they belong, so that a rank needs no host
        memory for a checkpoint. While one of them is in use, the file takes its place on the disk, removed or not.

        Raises:
            UserError: no such file, a damaged one, or one with other objects in it.
        """
        if Path(path).is_dir():
            from vlm.checkpoints.resume.sharded import read_sharded

            return read_sharded(path)
        return read_file(path, map_location=map_location, mmap=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a file or folder; when `last` names it, `last` goes to the newest that remains."""
        path = Path(path)
        pointer = path.parent / LAST
        if pointer.exists() and pointer.read_text().strip() == path.name:
            others = (other for other in path.parent.glob(f"*{path.suffix}") if other not in (path, pointer))
            newest = max(others, key=lambda other: other.stat().st_mtime_ns, default=None)
            if newest is None:
                remove(pointer)
            else:
                point_last(newest)
        remove(path)
