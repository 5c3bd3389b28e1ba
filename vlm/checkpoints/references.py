"""Finding again what an artefact refers to: the artefacts it follows, base weights, tokenizers.

What lies under one root may be moved together (a folder `runs`, a disk), and what an artefact follows may be copied
beside it. So a path is written down twice, relative to the artefact and absolute, and an artefact is known by its
fingerprint, wherever it lies.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm.checkpoints.artefact import STAGE_FILE, Artefact, read_artefact
from vlm.errors import UserError

_PATH_KEYS = ("path", "weights")
_PROJECT = Path(__file__).parents[2]
"""Where paths of the embedded parts (`vlm/demo/assets`) start."""


def refer_to(path: str | Path, base: str | Path) -> dict[str, str]:
    """How something on this disk is written down in `base`."""
    return {"path": os.path.relpath(path, base), "absolute": os.path.abspath(path)}


def followed(artefact: Artefact, reference: Mapping[str, Any]) -> Artefact:
    """An artefact that another one follows: where it was, or beside it.

    Args:
        reference: an entry of `follows`.

    Raises:
        UserError: it is not there, or what is there has changed since.
    """
    recorded = recorded_places(artefact, reference)
    found = [place for place in recorded if (place / STAGE_FILE).is_file()]
    for place in found:
        earlier = read_artefact(place)
        if earlier.fingerprint == reference["fingerprint"]:
            return earlier
    for place in _beside(artefact):
        try:
            earlier = read_artefact(place)
        except UserError:  # of another format, or half of one: not what is looked for
            continue
        if earlier.fingerprint == reference["fingerprint"]:
            return earlier
    if found:
        raise UserError(
            f"{artefact.folder}: it follows {found[0]}, whose content has changed since; "
            "restore it or train this stage again"
        )
    raise UserError(
        f"{artefact.folder}: the stage it follows is missing: it is neither in {' nor in '.join(map(str, recorded))} "
        f"nor beside it in {artefact.run.parent}; copy that stage's folder beside this one's"
    )


def recorded_places(artefact: Artefact, reference: Mapping[str, Any]) -> list[Path]:
    """Where an entry of `follows` says that something is, the nearest first."""
    return _recorded(artefact, reference["path"], reference.get("absolute"))


def local_paths(model: Any, base: str | Path) -> dict[str, dict[str, str]]:
    """{path as it is written: how it is referred to} of all that a description of a system takes from this disk."""
    return {
        path: refer_to(Path(path).expanduser(), base)
        for path in dict.fromkeys(_paths(model))
        if Path(path).expanduser().exists()
    }


def relocated(model: Any, artefact: Artefact) -> Any:
    """The description of an artefact's system, every path of `local_paths` where it lies now.

    Raises:
        UserError: something is nowhere.
    """
    paths = artefact.meta.get("paths", {})
    if isinstance(model, list):
        return [relocated(item, artefact) for item in model]
    if not isinstance(model, Mapping):
        return model
    return {
        key: locate(artefact, item)
        if key in _PATH_KEYS and isinstance(item, str) and item in paths
        else relocated(item, artefact)
        for key, item in model.items()
    }


def locate(artefact: Artefact, path: str) -> str:
    """Where a path that an artefact names lies now; itself where it was not on the disk.

    Raises:
        UserError: it is nowhere.
    """
    reference = artefact.meta.get("paths", {}).get(path)
    if reference is None:
        return path
    places = [*_recorded(artefact, reference["path"], reference["absolute"]), Path(path).expanduser(), _PROJECT / path]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        looked = ", ".join(dict.fromkeys(map(str, places)))
        raise UserError(f"{artefact.folder}: it needs {path}, which is missing; looked for {looked}; put it back there")
    return path if found == Path(path) else str(found)


def _recorded(artefact: Artefact, relative: str, absolute: str | None) -> list[Path]:
    """Places that were written down, the nearest first."""
    base = artefact.base
    places = [Path(os.path.normpath(base / relative)), base / relative, *([Path(absolute)] if absolute else [])]
    return list(dict.fromkeys(places))


def _beside(artefact: Artefact) -> Iterator[Path]:
    """Artefacts beside an artefact or beside its run."""
    run = artefact.run.absolute()
    for root in (run, run.parent):
        for file in sorted((*root.glob(f"*/{STAGE_FILE}"), *root.glob(f"*/artefact/{STAGE_FILE}"))):
            yield file.parent


def _paths(model: Any) -> Iterator[str]:
    if isinstance(model, list):
        for item in model:
            yield from _paths(item)
    elif isinstance(model, Mapping):
        for key, item in model.items():
            if key in _PATH_KEYS and isinstance(item, str):
                yield item
            else:
                yield from _paths(item)
