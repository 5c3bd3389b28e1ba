"""The surgery that a network's weights were trained with."""

from collections.abc import Mapping
from typing import Any

from vlm.building.instantiate import instantiate
from vlm.checkpoints.artefact import Artefact, read_artefact
from vlm.checkpoints.published.open import describe_published, is_artefact
from vlm.checkpoints.resume.opened import read_trained
from vlm.language import Surgery
from vlm.stages import matches


def inherited_surgery(module: Any) -> list[tuple[str, Surgery]]:
    """(artefact or published folder, what was done there) of everything a module's weights come from.

    Of an artefact of which a stage takes some parts, what changes those.

    Args:
        module: its parts built, before any surgery.
    """
    if module.weights is not None:
        if is_artefact(module.weights):
            return _surgery_of(module, read_trained(module.weights), {})
        return [(module.weights, operation) for operation in instantiate(describe_published(module.weights).surgery)]
    follows = module.stage.sources if module.stage is not None else ()
    return [found for follow in follows for found in _surgery_of(module, read_artefact(follow.artefact), follow.parts)]


def _surgery_of(module: Any, artefact: Artefact, parts: Mapping[str, str]) -> list[tuple[str, Surgery]]:
    operations: list[Surgery] = instantiate(artefact.meta["surgery"])
    return [
        (str(artefact.folder), operation)
        for operation in operations
        if not parts or any(_touches(layer, part) for layer in operation.find_layers(module) for part in parts)
    ]


def _touches(layer: str, part: str) -> bool:
    return matches(part, layer) or part.startswith(f"{layer}.")
