"""The base weights of one part, as the description of that part reads them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.tables.table import Table


@dataclass(frozen=True)
class BaseWeights:
    """Tensors of one part under our names, without the name of the part itself.

    Attributes:
        names: those it provides.
        items: streams (our name, tensor), one at a time; what is not among `names` is passed over.
        dropped: names in the files of what is left out on purpose.
        fresh: patterns of tensors that may start new beside them; any other that the files lack is an error.
    """

    names: frozenset[str]
    items: Callable[[], Iterable[tuple[str, Tensor]]]
    dropped: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()


def read_same_names(network: Any, files: WeightFiles) -> BaseWeights:
    """Of a part whose files have its own names; its description has no `read_base`."""
    return BaseWeights(frozenset(files.keys()), files.items)


def read_with_table(table: Table, files: WeightFiles, *, part: str = "", fresh: Iterable[str] = ()) -> BaseWeights:
    """What a table makes of files; what it drops or carries is dropped.

    Args:
        part: what stands before our names in the table, with its dot.
        fresh: see `BaseWeights`.

    Raises:
        UserError: names the table does not know, or tensors it needs that are not there.
    """
    made = table.check(files.shapes(), side="theirs")
    carried = {name for name in made if table.is_carried(name)}
    return BaseWeights(
        names=frozenset(name.removeprefix(part) for name in made.keys() - carried),
        items=lambda: ((name.removeprefix(part), tensor) for name, tensor in table.stream_to_ours(files.items())),
        dropped=(*(name for name in files.keys() if table.is_dropped(name)), *sorted(carried)),  # noqa: SIM118
        fresh=tuple(fresh),
    )
