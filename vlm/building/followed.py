"""What a stage starts from, artefacts and published folders, and how its own artefact refers to them.

An entry of `follows` in `stage.json` is {path, fingerprint, parts, leave_out}. `path` is relative to the artefact. That
of a published folder has `published` besides: `folder`, or `hub`, whose `path` is the hub id.
"""

import os
from pathlib import Path
from typing import Any

from vlm.checkpoints.artefact import Artefact, read_artefact
from vlm.checkpoints.files.weights import fingerprint_of_files
from vlm.checkpoints.published.open import find_weights, is_artefact, is_hub_id, weight_files
from vlm.errors import UserError
from vlm.stages import InitFrom


def open_followed(path: str | Path) -> Artefact | str:
    """An artefact, or the published folder or hub id that a stage starts from.

    Raises:
        UserError: it is neither.
    """
    if not Path(path).exists() and not is_hub_id(path):
        return read_artefact(path)  # says which stage comes first
    found = find_weights(path)
    return read_artefact(found) if is_artefact(found) else found


def refer_to(follow: InitFrom, folder: Path) -> dict[str, Any]:
    """An entry of `follows` in the `stage.json` of an artefact that will lie in `folder`."""
    found = open_followed(follow.artefact)
    taken = {"parts": dict(follow.parts), "leave_out": list(follow.leave_out)}
    if isinstance(found, Artefact):
        return {"path": os.path.relpath(found.folder, folder), "fingerprint": found.fingerprint, **taken}
    kind = "folder" if Path(found).is_dir() else "hub"
    path = os.path.relpath(found, folder) if kind == "folder" else found
    return {"path": path, "published": kind, "fingerprint": fingerprint_of_files(weight_files(found)), **taken}


def open_reference(artefact: Artefact, reference: dict[str, Any]) -> Artefact | str:
    """What an entry of `follows` refers to.

    Raises:
        UserError: it is not there, or is not what it was.
    """
    changed = "{0}: it follows {1}, whose content has changed since; restore it or train this stage again"
    if "published" not in reference:
        earlier = read_artefact(artefact.folder / reference["path"])
        if earlier.fingerprint != reference["fingerprint"]:
            raise UserError(changed.format(artefact.folder, earlier.folder))
        return earlier
    path = reference["path"]
    if reference["published"] == "folder":
        path = str((artefact.folder / path).resolve())
        if not Path(path).is_dir():
            raise UserError(
                f"{artefact.folder}: it follows the published folder {path}, which is not there; put it back, or "
                f"correct its path under follows in {artefact.folder / 'stage.json'}"
            )
    if fingerprint_of_files(weight_files(path)) != reference["fingerprint"]:
        raise UserError(changed.format(artefact.folder, path))
    return path
