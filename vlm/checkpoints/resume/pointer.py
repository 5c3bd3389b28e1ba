"""Which checkpoint of a folder is the newest complete one, and which one a name like `RUN@200` means."""

from pathlib import Path

from vlm.checkpoints.files.atomic import atomic_file
from vlm.errors import UserError

BEST = "best"
"""Folder in the checkpoint folder: the checkpoint that `checkpoint.monitor` found best."""

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


def find_checkpoint(run: Path, which: str) -> Path:
    """A checkpoint of a stage's run by what stands behind the `@`.

    Args:
        which: a step, `last` or `best`.

    Raises:
        UserError: there is none of this name.
    """
    folder = run / "checkpoints"
    if which == LAST:
        found = read_last(folder)
    elif which == BEST:
        found = read_last(folder / BEST)
    else:
        places = (folder / f"step={which}.ckpt", folder / BEST / f"step={which}.ckpt")
        found = next((place for place in places if place.exists()), None)
    if found is not None:
        return found
    names = [file.stem.removeprefix("step=") for file in folder.glob("step=*.ckpt")]
    names = [*sorted(names, key=lambda name: (len(name), name)), *([BEST] if (folder / BEST).is_dir() else [])]
    there = f"there are {', '.join(names)}" if names else "there is none"
    raise UserError(f"{run}@{which}: no such checkpoint in {folder}; {there}")
