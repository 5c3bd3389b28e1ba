"""`${NAME}` in a recipe's files: the data or artefact of another node, wherever it lies."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from vlm.checkpoints.files.atomic import atomic_file
from vlm.errors import UserError

_PLACE = re.compile(r"\$\{([^{}]*)\}")


def places(text: str) -> list[str]:
    """The names in `${NAME}`, in their order."""
    return _PLACE.findall(text)


def fill_places(text: str, paths: Mapping[str, Path]) -> str:
    """The text with each path in its place."""
    return _PLACE.sub(lambda place: str(paths[place[1]]), text)


def fill_configs(files: Iterable[Path], needs: Mapping[str, Path], folder: Path, *, write: bool = True) -> list[Path]:
    """The configuration files of a stage, those with places filled in and kept under `folder`.

    Args:
        needs: data by the name of its node.
        write: whether filled files are written; without, they are only named.

    Raises:
        UserError: a file names what the stage does not need, or no file names what it does.
    """
    filled: list[Path] = []
    named: set[str] = set()
    for file in files:
        text = file.read_text(encoding="utf-8")
        found = set(places(text))
        if unknown := sorted(found - needs.keys()):
            known = ", ".join(needs) or "nothing"
            raise UserError(f"{file}: ${{{unknown[0]}}} is not what this stage needs ({known}); list it in `needs`")
        named |= found
        if not found:
            filled.append(file)
            continue
        # `demo/model.yaml` lies beside `model.yaml`
        copy = folder / ("demo" if file.parent.name == "demo" else "") / file.name
        if write:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(copy) as out:
                out.write(fill_places(text, needs).encode())
        filled.append(copy)
    if missing := sorted(needs.keys() - named):
        raise UserError(f"{filled[-1]}: no configuration file of this stage names ${{{missing[0]}}}, which it needs")
    return filled
