"""The surgery that a network's weights were trained with."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vlm.building.followed import open_followed
from vlm.building.instantiate import instantiate
from vlm.checkpoints.artefact import Artefact
from vlm.checkpoints.published.open import describe_published
from vlm.language import PeftAdapter, Surgery
from vlm.stages import matches


class PlannedSurgery(NamedTuple):
    """What a stage will have done to the weights that a later one starts from.

    Attributes:
        origin: the stage.
        operations: in order.
        parts: of the later stage's network, that start from it; empty: all of it.
    """

    origin: str
    operations: Sequence[Surgery]
    parts: Collection[str]


def inherited_surgery(module: Any) -> list[tuple[str, Surgery]]:
    """(artefact or published folder, what was done there) of everything a module's weights come from.

    Of an artefact of which a stage takes some parts, what changes those; of one that is merged, all but its adapters.

    Args:
        module: its parts built, before any surgery.
    """
    if module.weights is not None:
        return _surgery_of(module, open_followed(module.weights), {})
    follows = module.stage.sources if module.stage is not None else ()
    inherited: list[tuple[str, Surgery]] = []
    for follow in follows:
        found = _surgery_of(module, open_followed(follow.artefact), follow.parts)
        inherited += [pair for pair in found if not (follow.merge and isinstance(pair[1], PeftAdapter))]
    return inherited


def _surgery_of(module: Any, followed: Artefact | str, parts: Mapping[str, str]) -> list[tuple[str, Surgery]]:
    if isinstance(followed, str):
        origin, described = followed, describe_published(followed).surgery
    else:
        origin, described = str(followed.folder), followed.meta["surgery"]
    return of_parts(module, origin, instantiate(described), parts)


def of_parts(
    module: Any, origin: str, operations: Iterable[Surgery], parts: Collection[str]
) -> list[tuple[str, Surgery]]:
    """(`origin`, operation) of the operations that change one of these parts of `module`; no parts: all of it."""
    return [
        (origin, operation)
        for operation in operations
        if not parts or any(_touches(layer, part) for layer in operation.find_layers(module) for part in parts)
    ]


def _touches(layer: str, part: str) -> bool:
    return matches(part, layer) or part.startswith(f"{layer}.")
