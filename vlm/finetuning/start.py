"""What a fine-tuning starts from."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm import registry
from vlm.errors import UserError


@dataclass(frozen=True)
class Start:
    """Weights, and what they say about themselves.

    Attributes:
        given: as the command line has them.
        path: what a stage follows.
        model: `class_path` and `init_args` of their system.
        system: its name.
        stage: what they were trained in; `published` for a published folder.
        name: short name for run folders.
        has_adapter: whether they were trained with LoRA or its kin.
    """

    given: str
    path: str
    model: dict[str, Any]
    system: str
    stage: str
    name: str
    has_adapter: bool = False

    def follow(self, *, merge: bool = False) -> dict[str, Any]:
        """An entry of `stage.follows`; `merge` makes its adapter part of the weights."""
        return {"artefact": self.path, **({"merge": True} if merge else {})}


def open_start(given: str) -> Start:
    """The system in an artefact, a run, a checkpoint of a run, a published folder or a repository of the hub.

    Raises:
        UserError: it is none of these.
    """
    from vlm.building.instantiate import model_of
    from vlm.checkpoints.published.open import describe_published, find_weights, is_artefact
    from vlm.checkpoints.resume.opened import read_trained

    path = find_weights(given)
    has_adapter = False
    if is_artefact(path):
        artefact = read_trained(path)
        model, system, stage = model_of(artefact), artefact.meta["system"], artefact.meta["stage"]
        has_adapter = any(change["class_path"].endswith(".PeftAdapter") for change in artefact.meta["surgery"])
        run = artefact.run.resolve()
        name = run.name if _number(run.name) is None else f"{run.parent.name}_{run.name}"
    else:
        model, stage = describe_published(path).model, "published"
        system = next((n for n, s in registry.SYSTEMS.items() if model["class_path"] in s.class_paths), None)
        if system is None:
            raise UserError(f"{given}: is a {model['class_path']}, which has no recipe here")
        name = Path(path).expanduser().name
    model["init_args"].pop("seed", None)
    return Start(given, path, model, system, stage, re.sub(r"[^\w.-]+", "_", name), has_adapter)


def _number(stage: str) -> int | None:
    """Of the form `2_finetune`."""
    head = stage.split("_")[0]
    return int(head) if head.isdecimal() else None


def is_before(stage: str, other: str) -> bool:
    """Whether one stage of a recipe is at an earlier place than another one (`1_align`, `2_finetune`)."""
    first, second = _number(stage), _number(other)
    return first is not None and second is not None and first < second
