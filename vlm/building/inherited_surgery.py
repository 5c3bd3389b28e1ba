"""The surgery that a network's weights were trained with."""

from collections.abc import Mapping
from typing import Any

from vlm.building.instantiate import instantiate
from vlm.checkpoints.artefact import Artefact, read_artefact
from vlm.checkpoints.published.open import describe_published, is_artefact
from vlm.language import PeftAdapter, Surgery
from vlm.stages import matches


def inherited_surgery(module: Any) -> list[tuple[str, Surgery]]:
    """(artefact or published folder, what was done there) of everything a module's weights come from.

    Of an artefact of which a stage takes some parts, what changes those; of one that is merged, all but its adapters.

    Args:
        module: its parts built, before any surgery.
    """
    if module.weights is not None:
        if is_artefact(module.weights):
            return _surgery_of(module, read_artefact(module.weights), {})
        return [(module.weights, operation) for operation in instantiate(describe_published(module.weights).surgery)]
    follows = module.stage.sources if module.stage is not None else ()
    inherited: list[tuple[str, Surgery]] = []
    for follow in follows:
        found = _surgery_of(module, read_artefact(follow.artefact), follow.parts)
        inherited += [pair for pair in found if not (follow.merge and isinstance(pair[1], PeftAdapter))]
    return inherited


def _surgery_of(module: Any, artefact: Artefact, parts: Mapping[str, str]) -> list[tuple[str, Surgery]]:
    operations: list[Surgery] = instantiate(artefact.meta["surgery"])
    return [
        (str(artefact.folder), operation)
        for operation in operations
        if not parts or any(_touches(layer, part) for layer in operation.find_layers(module) for part in parts)
    ]


def _touches(layer: str, part: str) -> bool:
    return matches(part, layer) or part.startswith(f"{layer}.")
