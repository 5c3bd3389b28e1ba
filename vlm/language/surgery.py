"""Changes to a network, as data: stored with every artefact and replayed by whoever loads it.

Surgery never renames pretrained weights, and a new path starts as the identity.
"""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from torch import nn

from vlm.errors import UserError


class Surgery(ABC):
    """One change to the network; subclasses are frozen dataclasses, so that they can be written down and compared."""

    @abstractmethod
    def find_layers(self, module: nn.Module) -> list[str]:
        """Names of the layers that `apply` would change; empty where the network has none of them.

        Args:
            module: the whole system, before any surgery.
        """

    @abstractmethod
    def apply(self, module: nn.Module) -> None:
        """Changes `module` in place.

        Args:
            module: the whole system, its parts still without weights.

        Raises:
            UserError: it has no place for the change.
        """

    def check_trained(self, module: nn.Module, *, is_new: bool) -> None:  # noqa: B027  (most allow any stage)
        """Refuses a stage that cannot be meant.

        Args:
            module: changed, with gradients for what the stage trains.
            is_new: this stage makes the change; it inherits it otherwise.

        Raises:
            UserError: the stage trains too much, or nothing, of what was changed.
        """

    def summary(self, module: nn.Module) -> list[str]:
        """What was done to a module, for people."""
        return [str(self)]

    def unquantized(self) -> "Surgery":
        """The same change, with every weight kept as it is published."""
        return self

    def has_changed(self, module: nn.Module) -> bool:
        """Whether a network that went through `apply` is another than before."""
        return True

    @property
    def cannot_shard(self) -> str | None:
        """Why a changed network cannot be sharded, and what to do instead; None: it can."""
        return None

    def lies_over(self, other: "Surgery") -> bool:
        """Whether it may change a layer that `other` changed before."""
        return False

    @property
    def cannot_merge(self) -> str | None:
        """Why no weights of the unchanged network compute the same; None: there are such weights."""
        return "what it adds is no part of the published network"


def combine(module: nn.Module, inherited: Sequence[tuple[str, Surgery]], own: Sequence[Surgery]) -> list[Surgery]:
    """What is done to a network, in order: what its weights were trained with, then what was asked for besides.

    Args:
        module: the whole system, before any surgery.
        inherited: (artefact, what was done there).
        own: registered by the system and by callbacks; what is inherited already happens once.

    Raises:
        UserError: two of them change one layer.
    """
    combined: list[Surgery] = []
    owner: dict[str, tuple[str, Surgery]] = {}
    for origin, operation in [*inherited, *(("this run", operation) for operation in own)]:
        if operation in combined:
            continue
        for name in operation.find_layers(module):
            if name in owner and not operation.lies_over(owner[name][1]):
                raise UserError(_explain_conflict(name, *owner[name], origin, operation))
            owner[name] = origin, operation
        combined.append(operation)
    return combined


def _explain_conflict(layer: str, first_origin: str, first: Surgery, origin: str, second: Surgery) -> str:
    if type(first) is not type(second):
        return (
            f"surgery: {layer} is changed by {first} ({first_origin}) and by {second} ({origin}); one layer takes one "
            "change, so give one of them other targets"
        )
    fields = [field.name for field in dataclasses.fields(first)]  # type: ignore[arg-type]
    pairs = {name: (getattr(first, name), getattr(second, name)) for name in fields}
    differing = ", ".join(f"{name}: {a} and {b}" for name, (a, b) in pairs.items() if a != b)
    return (
        f"surgery: {layer} is changed twice by {type(first).__name__}, in {first_origin} and in {origin}, with other "
        f"settings ({differing}); use the same ones, or give one of them other targets"
    )


def names_of(module: nn.Module, layers: Iterable[nn.Module]) -> list[str]:
    """The full names of layers somewhere in `module`."""
    wanted = {id(layer) for layer in layers}
    return [name for name, child in module.named_modules() if id(child) in wanted]


def find_linears(module: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """{name: layer} of the linear layers whose full name one of the regular expressions matches as a whole."""
    compiled = [re.compile(target) for target in targets]
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and any(pattern.fullmatch(name) for pattern in compiled)
    }


def targeted_linears(module: nn.Module, targets: Sequence[str], *, operation: Surgery) -> dict[str, nn.Linear]:
    """`find_linears`, of which every target has to find some.

    Raises:
        UserError: a target matches no linear layer.
    """
    for target in targets:
        if not find_linears(module, [target]):
            raise UserError(f"surgery {type(operation).__name__}: target {target!r} matches no linear layer")
    return find_linears(module, targets)


def refuse_changed(operations: Sequence[Surgery], source: object) -> None:
    """Refuses to write a changed network into a published layout, which has no place for the change.

    Raises:
        UserError: there is a change.
    """
    if operations:
        names = ", ".join(type(operation).__name__ for operation in operations)
        reasons = {reason for operation in operations if (reason := operation.cannot_merge) is not None}
        because = f" ({'; '.join(sorted(reasons))})" if reasons else ""
        raise UserError(
            f"{source}: was changed by {names}, which published files have no place for{because}; use the artefact "
            "itself: `vlm predict --weights`, or `vlm.load` in Python"
        )


def plain(linear: nn.Linear) -> nn.Linear:
    """A layer over the same tensors that computes `W x + b` alone."""
    made = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    made._parameters = linear._parameters
    return made


class Up(nn.Linear):
    """The second half of a low-rank path, float[..., rank] -> float[..., out]; zero, the identity, at the start."""

    def initialise_new(self) -> None:
        nn.init.zeros_(self.weight)
