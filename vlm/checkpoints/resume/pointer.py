"""Which checkpoint of a folder is the newest complete one."""

from pathlib import Path

from vlm.checkpoints.files.atomic import atomic_file
from vlm.errors import UserError

LAST = "last"
"""Small text file in the checkpoint folder: name of the newest complete checkpoint."""


def point_last(path: str | Path) -> None:
    """Makes `last` name this complete checkpoint (a file or a folder) in one step."""
    path = Path(path)
    with atomic_file(path.parent / LAST) as file:
        file.write(f"{path.name}\n".encode())


def read_last(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a folder, None where none was ever completed.

    Raises:
        UserError: the pointer names a checkpoint that somebody removed.
    """
    pointer = Path(folder) / LAST
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    path = pointer.with_name(name) if name and Path(name).name == name else None
    if path is None or not path.exists():
        raise UserError(
            f"{pointer}: names the checkpoint {name!r}, which is not in {folder}; put it back, write the name of "
            "another one into the file, or remove the file to start from step 0"
        )
    return path
