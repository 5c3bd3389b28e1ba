"""The rows of a conversion table: what happens to names and contents, in both directions."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlm.errors import UserError

Side = Literal["theirs", "ours"]
Part = Tensor | None
"""`None`: the tensor a rule can do without is not there."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row of a table.

    Attributes:
        theirs: published names.
        ours: our names; empty when the tensor is dropped on purpose.
        optional: published checkpoints exist without it.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    optional: bool = False

    def to_ours(self, parts: list[Part]) -> list[Part]:
        return parts

    def from_ours(self, parts: list[Part]) -> list[Part]:
        return parts

    def spare(self, side: Side) -> frozenset[int]:
        """Positions on a side that may be absent while the others are there."""
        return frozenset()


def rename(theirs: str, ours: str | None, *, optional: bool = False) -> Rule:
    """The same tensor under another name; `ours=None` drops it on purpose (and nothing can bring it back)."""
    return Rule(theirs=(theirs,), ours=() if ours is None else (ours,), optional=optional or ours is None)


@dataclass(frozen=True, kw_only=True)
class Same(Rule):
    """One tensor that one side or both have under several names; published files may leave out all but the first."""

    def to_ours(self, parts: list[Part]) -> list[Part]:
        return self._copies(parts, self.theirs, len(self.ours))

    def from_ours(self, parts: list[Part]) -> list[Part]:
        return self._copies(parts, self.ours, len(self.theirs))

    def spare(self, side: Side) -> frozenset[int]:
        return frozenset(range(1, len(self.theirs))) if side == "theirs" else frozenset()

    @staticmethod
    def _copies(parts: list[Part], names: tuple[str, ...], count: int) -> list[Part]:
        given = [(name, part) for name, part in zip(names, parts, strict=True) if part is not None]
        (first, tensor), *others = given
        for name, other in others:
            if not tensor.is_meta and not torch.equal(tensor, other):
                raise UserError(f"tensors {first!r} and {name!r} differ, but they are one in this layout")
        return [tensor] * count


@dataclass(frozen=True, kw_only=True)
class Fused(Rule):
    """Equal parts (q, k and v) that lie one after another along dimension 0 of one tensor of ours."""

    def to_ours(self, parts: list[Part]) -> list[Part]:
        return [torch.cat([part for part in parts if part is not None])]

    def from_ours(self, parts: list[Part]) -> list[Part]:
        (whole,) = parts
        assert whole is not None
        assert len(whole) % len(self.theirs) == 0, (self.ours, whole.shape)
        return list(whole.chunk(len(self.theirs)))


@dataclass(frozen=True, kw_only=True)
class Split(Rule):
    """One tensor whose equal parts along dimension 0 (q, k and v) are tensors of their own with us."""

    def to_ours(self, parts: list[Part]) -> list[Part]:
        (whole,) = parts
        assert whole is not None
        if len(whole) % len(self.ours):
            raise UserError(f"tensor {self.theirs[0]!r} has {len(whole)} rows, which are not {len(self.ours)} parts")
        return list(whole.chunk(len(self.ours)))

    def from_ours(self, parts: list[Part]) -> list[Part]:
        return [torch.cat([part for part in parts if part is not None])]


@dataclass(frozen=True, kw_only=True)
class PerHead(Rule):
    """q, k and v of one head after another (Megatron), where ours has all of q, then k, then v.

    Attributes:
        num_heads: of the attention.
    """

    num_heads: int

    def to_ours(self, parts: list[Part]) -> list[Part]:
        (rows,) = parts
        assert rows is not None
        if len(rows) % (3 * self.num_heads):
            raise UserError(
                f"tensor {self.theirs[0]!r} has {len(rows)} rows, which {self.num_heads} heads do not share"
            )
        return [rows.unflatten(0, (self.num_heads, 3, -1)).transpose(0, 1).flatten(0, 2).contiguous()]

    def from_ours(self, parts: list[Part]) -> list[Part]:
        (rows,) = parts
        assert rows is not None
        return [rows.unflatten(0, (3, self.num_heads, -1)).transpose(0, 1).flatten(0, 2).contiguous()]


@dataclass(frozen=True, kw_only=True)
class Stacked(Fused):
    """Parts that lie one after another, as many rows in each of `count` layers of one tensor of ours (experts).

    Attributes:
        count: layers; the parts are those of the first one, then those of the second.
    """

    count: int

    def to_ours(self, parts: list[Part]) -> list[Part]:
        (whole,) = super().to_ours(parts)
        assert whole is not None
        return [whole.unflatten(0, (self.count, -1))]

    def from_ours(self, parts: list[Part]) -> list[Part]:
        (layers,) = parts
        assert layers is not None
        return super().from_ours([layers.flatten(0, 1)])


@dataclass(frozen=True, kw_only=True)
class Axes(Rule):
    """Axes in another order, or axes of length 1 added or left out.

    Attributes:
        form: published axes and ours, `"O I -> I O"` or `"N D -> 1 N D"`; a letter stands for one axis.
    """

    form: str

    def to_ours(self, parts: list[Part]) -> list[Part]:
        (tensor,) = parts
        theirs, ours = (side.split() for side in self.form.split("->"))
        assert tensor is not None
        if tensor.ndim != len(theirs):
            raise UserError(f"tensor {self.theirs[0]!r} has shape {tuple(tensor.shape)}, not the axes {self.form!r}")
        return [_arranged(tensor, theirs, ours)]

    def from_ours(self, parts: list[Part]) -> list[Part]:
        (tensor,) = parts
        theirs, ours = (side.split() for side in self.form.split("->"))
        assert tensor is not None
        assert tensor.ndim == len(ours), (self.ours, tensor.shape)
        return [_arranged(tensor, ours, theirs)]


def _arranged(tensor: Tensor, given: list[str], wanted: list[str]) -> Tensor:
    tensor = tensor.squeeze([position for position, axis in enumerate(given) if axis == "1"])
    named = [axis for axis in given if axis != "1"]
    tensor = tensor.permute([named.index(axis) for axis in wanted if axis != "1"])
    for position in (position for position, axis in enumerate(wanted) if axis == "1"):
        tensor = tensor.unsqueeze(position)
    return tensor.contiguous()


@dataclass(frozen=True, kw_only=True)
class Rows(Rule):
    """A vocabulary table that the published side pads with rows (the second of our names: the rows above ours).

    Attributes:
        rows: size of our vocabulary.
        published_rows: rows the published side has when we have to make them ourselves. New rows are the mean of the
            old ones: no token of ours reads them, and their logits stay ordinary.
    """

    rows: int
    published_rows: int

    def to_ours(self, parts: list[Part]) -> list[Part]:
        (table,) = parts
        assert table is not None
        if len(table) < self.rows:
            raise UserError(f"tensor {self.theirs[0]!r} has {len(table)} rows, but the vocabulary has {self.rows}")
        return [table[: self.rows], table[self.rows :] if len(table) > self.rows else None]

    def from_ours(self, parts: list[Part]) -> list[Part]:
        table, above = parts
        assert table is not None
        if above is None:
            mean = table.mean(0, dtype=torch.float32, keepdim=True).to(table.dtype)
            above = mean.expand(self.published_rows - len(table), -1)
        return [torch.cat([table, above])]

    def spare(self, side: Side) -> frozenset[int]:
        return frozenset({1}) if side == "ours" else frozenset()
