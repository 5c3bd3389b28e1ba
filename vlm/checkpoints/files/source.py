"""Somewhere weights come from, whatever container they lie in."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


class Change(Protocol):
    """What becomes of a tensor after it is read, such as an adapter that is merged into it."""

    def __call__(self, tensor: Tensor) -> Tensor: ...

    def content(self, of: str) -> str:
        """Identity of the changed tensor, from that of the tensor: `CHANGED` and a hash."""


@dataclass(frozen=True)
class WeightSource:
    """Somewhere weights come from.

    Attributes:
        label: for the load report: `base weights of language (folder)`, `artefact 1_align`.
        names: our names of the tensors it provides.
        items: streams (our name, tensor), one at a time.
        dropped: names of what is left out on purpose.
        carried: our names of what is there and never computed with.
        covers: patterns of our names of what is expected to come whole, from here or from another source.
        fresh: patterns of what may start new all the same.
        changes: {our name: what becomes of its tensor}, in order; of tensors that the source does not provide, those of
            the sources before it.
    """

    label: str
    names: frozenset[str]
    items: Callable[[], Iterator[tuple[str, Tensor]]]
    dropped: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    covers: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    changes: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
