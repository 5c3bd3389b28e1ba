"""Files and folders that are either complete or not there.

Everything is written under a temporary name in the *same* directory (a rename across filesystems is a copy, and a copy
shows half a file under the final name), flushed to disk, renamed, and the directory flushed after it.
"""

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vlm.errors import UserError

TEMPORARY = ".tmp-"
"""Prefix of names that a killed process may leave behind; no reader ever looks at them."""
_OLD = ".old-"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_active: set[Path] = set()


@contextlib.contextmanager
def atomic_file(path: str | Path, *, num_bytes: int | None = None, durable: bool = True) -> Iterator[BinaryIO]:
    """A file opened for writing that appears at `path` when the block ends, and never when it fails.

    Args:
        num_bytes: how much will be written, for the message when it does not fit.
        durable: it also outlives a machine that loses its power; False where whoever reads it sees whether it is whole.

    Raises:
        UserError: the disk is full; what stood at `path` before is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    with explain_full_disk(path.parent, num_bytes), _cleaned_up(temporary):
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            _sync_directory(path.parent)


@contextlib.contextmanager
def atomic_files(folder: str | Path) -> Iterator[Path]:
    """A temporary folder inside `folder`; the files written to it move up, in the order of their names, at the end.

    For files that belong together and have no folder of their own: a name that sorts last (an index) appears last.

    Raises:
        UserError: the disk is full; nothing in `folder` has changed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder / "files")
    with explain_full_disk(folder), _cleaned_up(temporary):
        temporary.mkdir()
        yield temporary
        files = sorted(temporary.iterdir())
        for file in files:
            _sync_file(file)
        for file in files:
            os.replace(file, folder / file.name)
        _sync_directory(folder)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends, and vanishes when it fails.

    A folder that stood at `path` is replaced in one step where the filesystem can exchange two names. Elsewhere it is
    moved aside for a moment; `remove_leftovers` puts it back if the process dies in that moment.

    Raises:
        UserError: the disk is full, or a file stands at `path`.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file where a folder has to be written; move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers_of(path)
    temporary = _temporary(path)
    with explain_full_disk(path.parent), _cleaned_up(temporary):
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync_file(Path(folder, name))
            _sync_directory(Path(folder))
        _move_into_place(temporary, path)
        _sync_directory(path.parent)


def remove(path: str | Path) -> None:
    """Removes a file or folder so that a kill halfway leaves no half folder under its name. Nothing there: no error."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        os.replace(path, temporary)
    except FileNotFoundError:
        return
    _delete(temporary)


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Removes what killed processes left in `folder`; returns the removed paths.

    Only for a folder that belongs to one run (the run's lock guards it): another process's write in progress would be
    removed as well.
    """
    folder = Path(folder)
    for old in folder.glob(_OLD + "*"):
        _restore(old)
    leftovers = [path for path in folder.glob(TEMPORARY + "*") if path.absolute() not in _active]
    for path in leftovers:
        _delete(path)
    return leftovers


@contextlib.contextmanager
def explain_full_disk(folder: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turns a full disk (or quota) into a `UserError` that names the folder and how much is needed and free."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save turns the system's error into one of its own
        if not _is_full_disk(error):
            raise
        needed = f"{num_bytes:,} bytes are needed, " if num_bytes is not None else ""
        raise UserError(
            f"no space left in {folder}: {needed}{shutil.disk_usage(folder).free:,} bytes are free; "
            "free some or write to another disk. What was saved before is intact."
        ) from error


def _is_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")


@contextlib.contextmanager
def _cleaned_up(temporary: Path) -> Iterator[None]:
    _active.add(temporary.absolute())
    try:
        yield
    finally:
        _active.discard(temporary.absolute())
        _delete(temporary)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_leftovers_of(path: Path) -> None:
    old = path.with_name(_OLD + path.name)
    if old.exists():
        _restore(old)
    # eight hexadecimal digits, so that the leftovers of `a-b` are not taken for those of `a`
    for leftover in path.parent.glob(f"{TEMPORARY}{path.name}-" + "[0-9a-f]" * 8):
        if leftover.absolute() not in _active:
            _delete(leftover)


def _move_into_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.rename(temporary, path)
    elif not _exchange(temporary, path):  # after an exchange the temporary name holds the old folder
        old = path.with_name(_OLD + path.name)
        os.rename(path, old)
        os.rename(temporary, path)
        _delete(old)


def _restore(old: Path) -> None:
    path = old.with_name(old.name.removeprefix(_OLD))
    if path.exists():
        _delete(old)
    else:
        os.rename(old, path)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step; False where the system or the filesystem cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
