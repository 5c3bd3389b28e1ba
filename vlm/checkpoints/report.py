"""What happened to every tensor when a network was loaded, for a person and for a check."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from vlm.checkpoints.files.locate import preview


class Resized(NamedTuple):
    """A tensor that was brought to another shape, and how."""

    old: tuple[int, ...]
    new: tuple[int, ...]
    method: str


@dataclass
class LoadReport:
    """Names by what happened to them; the first component of a name (`vision`, `connector`, ...) is its part.

    Attributes:
        loaded: taken as they were.
        resized: taken in another shape.
        new: in the network and in no source: freshly initialised.
        copied: in no source either, and begun as a copy of another tensor of the network.
        dropped: in the source and left out on purpose.
        carried: in the source, never computed with, kept for writing back.
        sources: per source, how many tensors came from it.
        notes: what a person should know besides.
    """

    loaded: list[str] = field(default_factory=list)
    resized: dict[str, Resized] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def render(self) -> str:
        """A short table: a row per part with counts, then each resized tensor and the first dropped and new ones."""
        columns: dict[str, Iterable[str]] = {
            "loaded": self.loaded,
            "resized": self.resized,
            "new": self.new,
            "copied": self.copied,
            "dropped": self.dropped,
            "carried": self.carried,
        }
        counts = {column: _by_part(names) for column, names in columns.items()}
        shown = [column for column in columns if counts[column] or column == "loaded"]
        parts = sorted({part for column in shown for part in counts[column]})
        width = max([len("part"), *map(len, parts)])
        lines = ["  ".join(["part".ljust(width), *(column.rjust(7) for column in shown)])]
        for part in parts:
            cells = [str(counts[column].get(part, 0) or "-").rjust(max(7, len(column))) for column in shown]
            lines.append("  ".join([part.ljust(width), *cells]))
        lines += [f"from {source}: {count}" for source, count in self.sources.items()]
        lines += [f"resized: {name} {_size(r.old)} -> {_size(r.new)}, {r.method}" for name, r in self.resized.items()]
        lines += [
            f"{label}: {preview(names)}"
            for label, names in (("dropped on purpose", self.dropped), ("new", self.new))
            if names
        ]
        return "\n".join([*lines, *self.notes])


def _by_part(names: Iterable[str]) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + 1
    return counts


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
