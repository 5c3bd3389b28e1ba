"""Conversion between a published layout and ours as a table that is read in both directions.

A table is a list of rules (`vlm.checkpoints.tables.rules` has the kinds). A rule names tensors on both sides
with patterns and knows how contents change; nothing else in the project renames a weight. In a pattern `{i}` stands
for a layer index, `{p}` for `weight` or `bias`, `{rest}` for all that follows; `{i>=23}` (in `Table.unused` only) for
an index from 23 on.

What a published layout has and our computation never uses gets a name of ours too and is *carried*: kept aside and put
back bit-equal. Names of ours are the common tongue of all layouts, so what one layout carries another can take in.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from vlm.checkpoints.files.locate import preview
from vlm.checkpoints.tables.rules import Part, Rule, Side
from vlm.errors import UserError


@dataclass(frozen=True)
class Table:
    """Two-way conversion of one published layout.

    Attributes:
        layout: its name, for messages.
        rules: the first rule that knows a name takes it.
        unused: patterns in our names of tensors the computation never uses; they are carried.
        may_lack: parts (first component of our names) that published checkpoints may leave out as a whole.
        sparse: patterns in our names of tensors that not every layer of a stack has.
    """

    layout: str
    rules: tuple[Rule, ...]
    unused: tuple[str, ...] = ()
    may_lack: tuple[str, ...] = ()
    sparse: tuple[str, ...] = ()

    def to_ours(self, items: Iterable[tuple[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(ours, carried) of a published checkpoint; `stream_to_ours` does the same one tensor at a time.

        Raises:
            UserError: names the table does not know, or tensors it needs that are not there.
        """
        ours: dict[str, Tensor] = {}
        carried: dict[str, Tensor] = {}
        for name, tensor in self.stream_to_ours(items):
            (carried if self.is_carried(name) else ours)[name] = tensor
        return ours, carried

    def from_ours(self, ours: Mapping[str, Tensor], carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published checkpoint of our tensors and the carried ones.

        Raises:
            UserError: names the layout has no place for, or tensors it needs that are not there.
        """
        return dict(self.stream_from_ours([*ours.items(), *carried.items()]))

    def stream_to_ours(self, items: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """(our name, tensor), carried ones among them; holds only what a rule still waits for. Errors come at the end:
        `check` finds them before any data is read."""
        return self._convert(items, "theirs")

    def stream_from_ours(self, items: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """(published name, tensor) of our tensors and carried ones in any order."""
        return self._convert(items, "ours")

    def check(self, shapes: Mapping[str, tuple[int, ...]], *, side: Side) -> dict[str, tuple[int, ...]]:
        """Shapes on the other side of a checkpoint on `side`; nothing is computed.

        Raises:
            UserError: as `to_ours` or `from_ours` would, but before any tensor is read.
        """
        meta = ((name, torch.empty(shape, device="meta")) for name, shape in shapes.items())
        return {name: tuple(tensor.shape) for name, tensor in self._convert(meta, side)}

    def is_carried(self, our_name: str) -> bool:
        """Whether a tensor of this name is kept aside instead of being part of the network."""
        return any(_match(pattern, our_name) is not None for pattern in self.unused)

    def is_dropped(self, their_name: str) -> bool:
        """Whether a published tensor is left out on purpose, for good."""
        found = self._find(their_name, "theirs")
        return found is not None and not self.rules[found[0]].ours

    def has_place(self, our_name: str) -> bool:
        """Whether the published layout can hold this tensor of ours."""
        return self._find(our_name, "ours") is not None

    def _convert(self, items: Iterable[tuple[str, Tensor]], side: Side) -> Iterator[tuple[str, Tensor]]:
        waiting: dict[tuple[int, tuple], list[Part]] = {}
        seen: set[int] = set()
        unknown: list[str] = []
        layers: set[str] = set()
        for name, tensor in items:
            found = self._find(name, side)
            if found is None:
                unknown.append(name)
                continue
            number, position, binding = found
            seen.add(number)
            if not any(_match(pattern, name) for pattern in self.sparse):
                layers.add(name)
            rule = self.rules[number]
            parts = waiting.setdefault((number, binding), [None] * len(getattr(rule, side)))
            parts[position] = tensor
            if all(part is not None for part in parts):
                del waiting[number, binding]
                yield from self._emit(rule, parts, binding, side)
            del tensor, parts
        missing: list[str] = []
        for (number, binding), parts in waiting.items():
            rule = self.rules[number]
            lost = {position for position, part in enumerate(parts) if part is None}
            if lost <= rule.spare(side):
                yield from self._emit(rule, parts, binding, side)
            else:
                missing += [_fill(getattr(rule, side)[position], binding) for position in sorted(lost)]
        self._refuse(unknown, missing + self._never_seen(seen, side) + missing_layers(layers), side)

    def _emit(self, rule: Rule, parts: list[Part], binding: tuple, side: Side) -> Iterator[tuple[str, Tensor]]:
        if side == "theirs":
            made, names = rule.to_ours(parts) if rule.ours else [], rule.ours
        else:
            made, names = rule.from_ours(parts), rule.theirs
        for name, tensor in zip(names, made, strict=True):
            if tensor is not None:
                yield _fill(name, binding), tensor

    def _find(self, name: str, side: Side) -> tuple[int, int, tuple] | None:
        for number, rule in enumerate(self.rules):
            for position, pattern in enumerate(getattr(rule, side)):
                binding = _match(pattern, name)
                if binding is not None:
                    return number, position, binding
        return None

    def _never_seen(self, seen: set[int], side: Side) -> list[str]:
        present = {part for number in seen for part in self._parts[number]}
        return [
            pattern
            for number, rule in enumerate(self.rules)
            if number not in seen and not rule.optional
            if not (self._parts[number] <= set(self.may_lack) - present)
            for position, pattern in enumerate(getattr(rule, side))
            if position not in rule.spare(side)
        ]

    @cached_property
    def _parts(self) -> list[frozenset[str]]:
        return [frozenset(name.split(".")[0] for name in rule.ours) for rule in self.rules]

    def _refuse(self, unknown: list[str], missing: list[str], side: Side) -> None:
        where = f"the {self.layout} layout" if side == "theirs" else "our names"
        if unknown:
            place = where if side == "theirs" else f"the {self.layout} layout"
            raise UserError(f"{preview(unknown)}: no place in {place}; is it another system or layout?")
        if missing:
            raise UserError(f"{preview(missing)}: missing, and {where} needs it; the checkpoint is incomplete")


def missing_layers(names: Iterable[str]) -> list[str]:
    """Names that stacked layers lack: every layer of a stack has the same tensors, and the indices start at 0."""
    stacks: dict[str, dict[str, set[int]]] = {}
    for name in names:
        found = re.match(r"(.*\b(?:layers|blocks|resblocks|h)\.)(\d+)(\..+)", name)
        if found:
            stacks.setdefault(found[1], {}).setdefault(found[3], set()).add(int(found[2]))
    return [
        f"{stack}{index}{suffix}"
        for stack, suffixes in stacks.items()
        for suffix, indices in sorted(suffixes.items())
        for index in range(1 + max(max(some_indices) for some_indices in suffixes.values()))
        if index not in indices
    ]


_PLACEHOLDER = re.compile(r"\{(\w+)(?:>=(\d+))?\}")
_MEANING = {"i": r"\d+", "p": "weight|bias", "rest": ".+"}


@cache
def _compiled(pattern: str) -> tuple[re.Pattern[str], int]:
    least = 0
    text, end = "", 0
    for found in _PLACEHOLDER.finditer(pattern):
        text += re.escape(pattern[end : found.start()]) + f"(?P<{found[1]}>{_MEANING[found[1]]})"
        least, end = int(found[2] or least), found.end()
    return re.compile(text + re.escape(pattern[end:])), least


def _match(pattern: str, name: str) -> tuple[tuple[str, Any], ...] | None:
    compiled, least = _compiled(pattern)
    found = compiled.fullmatch(name)
    if found is None or ("i" in found.groupdict() and int(found["i"]) < least):
        return None
    return tuple(sorted(found.groupdict().items()))


def _fill(pattern: str, binding: tuple[tuple[str, Any], ...]) -> str:
    return _PLACEHOLDER.sub(lambda found: dict(binding)[found[1]], pattern)
