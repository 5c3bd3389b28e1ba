"""What a stage starts from, artefacts and published systems, and how its own artefact refers to them.

An entry of `follows` in `stage.json` is {path, absolute, fingerprint, parts, leave_out, merge}; see
`vlm.checkpoints.references`. That of a published system has `published` besides: `folder`, or `hub`, whose `path` is
the hub id.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.checkpoints.artefact import Artefact, read_artefact
from vlm.checkpoints.files.identity import fingerprint_of_files
from vlm.checkpoints.published.open import find_weights, is_artefact, is_hub_id, weight_files
from vlm.checkpoints.references import followed, recorded_places, refer_to
from vlm.checkpoints.resume.opened import is_checkpoint, read_trained
from vlm.errors import UserError
from vlm.stages import InitFrom


def open_followed(path: str | Path) -> Artefact | str:
    """An artefact (or a checkpoint as one), or the published folder or hub id that a stage starts from.

    Raises:
        UserError: it is neither.
    """
    is_ours = Path(path).name == "artefact"  # of a stage that is not finished, and no hub id
    if not Path(path).exists() and "@" not in str(path) and (is_ours or not is_hub_id(path)):
        return read_artefact(path)  # says which stage comes first
    found = find_weights(path)
    return read_trained(found) if is_artefact(found) else found


def reference_to(follow: InitFrom, base: str | Path) -> dict[str, Any]:
    """An entry of `follows` in the `stage.json` of an artefact whose paths start at `base`."""
    found = open_followed(follow.artefact)
    taken = {"parts": dict(follow.parts), "leave_out": list(follow.leave_out), "merge": follow.merge}
    if isinstance(found, Artefact):
        return {**refer_to(found.folder, base), "fingerprint": found.fingerprint, **taken}
    place = (
        {**refer_to(found, base), "published": "folder"}
        if Path(found).is_dir()
        else {"path": found, "published": "hub"}
    )
    return {**place, "fingerprint": fingerprint_of_files(weight_files(found)), **taken}


def open_reference(artefact: Artefact, reference: Mapping[str, Any]) -> Artefact | str:
    """What an entry of `follows` refers to.

    Raises:
        UserError: it is not there, or is not what it was.
    """
    if reference.get("published") == "hub":
        return _unchanged(artefact, [reference["path"]], reference)
    places = recorded_places(artefact, reference)
    if "published" in reference:
        found = [str(place) for place in places if place.is_dir()]
        if not found:
            looked = ", ".join(map(str, places))
            raise UserError(
                f"{artefact.folder}: the published folder it follows is missing; looked for {looked}; put it back, or "
                f"correct its path under follows in {artefact.folder / 'stage.json'}"
            )
        return _unchanged(artefact, found, reference)
    for place in places:
        if is_checkpoint(place) and (earlier := read_trained(place)).fingerprint == reference["fingerprint"]:
            return earlier
    return followed(artefact, reference)


def _unchanged(artefact: Artefact, places: list[str], reference: Mapping[str, Any]) -> str:
    for place in places:
        if fingerprint_of_files(weight_files(place)) == reference["fingerprint"]:
            return place
    raise UserError(
        f"{artefact.folder}: it follows {places[0]}, whose content has changed since; "
        "restore it or train this stage again"
    )
