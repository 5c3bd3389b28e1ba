"""A published folder (official, or of Hugging Face's tools), opened as one of our systems as it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.checkpoints.artefact import STAGE_FILE
from vlm.checkpoints.files.locate import find_files, refuse_peft_folder
from vlm.checkpoints.files.source import WeightSource
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.published.family import Family, find_family, look_into
from vlm.checkpoints.published.vila import PartFolders, has_part_folders
from vlm.checkpoints.resume.opened import is_checkpoint
from vlm.checkpoints.resume.pointer import BEST, LAST, find_checkpoint
from vlm.errors import UserError


@dataclass(frozen=True)
class PublishedSystem:
    """The system in a published folder, as plain data.

    Attributes:
        model: its `class_path` and `init_args`.
        surgery: the same of each change to its network.
    """

    model: dict[str, Any]
    surgery: list[dict[str, Any]]


def find_weights(path: str | Path) -> str:
    """What `--weights` may name: an artefact, a run folder (its last finished stage), a published folder or hub id.

    And checkpoints: `RUN@200`, `RUN@last`, `RUN@best`, or the path of one.

    Raises:
        UserError: nothing of that kind is there, or several last stages (`2_chat`, `2_science_qa`).
    """
    folder = Path(path).expanduser()
    if is_checkpoint(folder):
        return str(folder)
    run, at, which = str(path).rpartition("@")
    if at and (which in (LAST, BEST) or which.isdecimal()) and not folder.exists():
        return _find_checkpoint(Path(run).expanduser(), which)
    for candidate in (folder, folder / "artefact"):
        if (candidate / STAGE_FILE).is_file():
            return str(candidate)
    kinds = "an artefact, a run folder with a finished stage, or a published folder"
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give the folder it lies in: {kinds}")
    if not folder.exists():
        if is_hub_id(path):
            return str(path)
        raise UserError(f"{folder}: no such folder; give {kinds}")
    if finished := sorted(folder.glob(f"*/artefact/{STAGE_FILE}")):
        stages = [file.parent.parent for file in finished]
        last = [stage for stage in stages if stage.name.split("_")[0] == stages[-1].name.split("_")[0]]
        if len(last) > 1:
            raise UserError(f"{folder}: ends in several stages; name one of them: {', '.join(map(str, last))}")
        return str(finished[-1].parent)
    if begun := sorted(file.parent for file in (*folder.glob("config.yaml"), *folder.glob("*/config.yaml"))):
        raise UserError(
            f"{begun[-1]}: this stage is not finished (no artefact); start its `vlm fit` again to go on, or look "
            f"at its newest checkpoint as {begun[-1]}@{LAST}"
        )
    if has_part_folders(folder):
        return str(folder)
    refuse_peft_folder(folder)
    try:
        find_files(folder)
    except UserError as error:
        raise UserError(f"{folder}: neither {STAGE_FILE} nor weight files in it; give {kinds}") from error
    return str(folder)


def is_hub_id(path: str | Path) -> bool:
    """Whether a path that does not exist may be the name of a repository on the hub."""
    folder = Path(path)
    return len(folder.parts) == 2 and not folder.is_absolute() and not folder.parent.exists()


def _find_checkpoint(run: Path, which: str) -> str:
    if not run.is_dir():
        raise UserError(f"{run}@{which}: there is no folder {run}; give the run folder of a stage")
    begun = sorted(file.parent for file in run.glob("*/config.yaml"))
    stage = begun[-1] if begun and not (run / "config.yaml").exists() else run
    is_done = (stage / "artefact" / STAGE_FILE).is_file() and not (stage / "checkpoints" / LAST).exists()
    if which == LAST and is_done:
        return str(stage / "artefact")
    return str(find_checkpoint(stage, which))


def is_artefact(path: str | Path) -> bool:
    """Whether these are weights of ours: an artefact or a checkpoint, which `read_trained` opens."""
    return (Path(path) / STAGE_FILE).is_file() or is_checkpoint(path)


def family_of(path: str | Path) -> Family:
    """The family that a folder or hub id belongs to.

    Raises:
        UserError: none of them claims it, or several do.
    """
    return find_family(look_into(path, _open_files(path)))


def weight_files(path: str | Path) -> list[Path]:
    """The files of a published folder or hub id that hold tensors."""
    return _open_files(path).files()


def _open_files(path: str | Path) -> WeightFiles:
    return PartFolders(path) if has_part_folders(path) else WeightFiles(path)


def describe_published(path: str) -> PublishedSystem:
    """The system in a published folder, all of its weights to come from there."""
    family = family_of(path)
    opened = family.open_complete(path)
    return PublishedSystem(family.describe(opened), family.surgery(opened))


def published_source(path: str) -> WeightSource:
    """Every tensor of a published folder that the network computes with, under our names."""
    family = family_of(path)
    opened = family.open_complete(path)
    is_carried = family.carried(opened)
    names = frozenset(name for name in opened.shapes if not is_carried(name))
    carried = tuple(sorted(opened.shapes.keys() - names))
    return WeightSource(f"published weights {path}", names, lambda: iter(opened.stream()), carried=carried)
