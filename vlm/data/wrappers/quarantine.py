"""Lists of bad samples: what `vlm check-data` and a run write, and what a run leaves out.

::

    {"source": "mix665k", "id": "000000033471", "index": 17, "reason": "image 'a.png' does not exist ..."}

One JSON object a line. `source` is the name of a source, `index` counts its samples from 0, and `id` guards the list
against a file that has changed since. Other keys are left alone.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.sampling.order import Blocks
from vlm.data.sources.base import Source
from vlm.data.wrappers.wrapped import Wrapped
from vlm.errors import SampleError, UserError
from vlm.sample import Sample


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be trained on.

    Attributes:
        source: name of its source.
        id: its own.
        index: its place in the source, counted from 0.
        reason: what is wrong with it.
    """

    source: str
    id: str
    index: int
    reason: str


@dataclass(frozen=True)
class LeftOut(BadSample):
    """A bad sample that a run met, and the optimizer step of the epoch that went on without it."""

    epoch: int
    step: int


def as_lines(samples: Iterable[BadSample]) -> bytes:
    """The content of a list; see the module's drawing."""
    return "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples).encode()


def read_quarantine(path: Path) -> list[BadSample]:
    """The entries of a list; a sample that is named twice counts once.

    Raises:
        UserError: no such file, or a line that is no entry.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.quarantine: {path} cannot be read ({error}); `vlm check-data` writes such a list"
        ) from error
    found: dict[tuple[str, int, str], BadSample] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            source, index, identity = entry["source"], entry["index"], entry["id"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: line {number} is no entry ({type(error).__name__}: {error}); a line is "
                '{"source": ..., "id": ..., "index": ..., "reason": ...}'
            ) from error
        if not isinstance(source, str) or type(index) is not int or index < 0:
            raise UserError(f"{path}: line {number}: 'source' must be a name and 'index' a number from 0")
        found[source, index, str(identity)] = BadSample(source, str(identity), index, str(entry.get("reason", "")))
    return list(found.values())


class Quarantine:
    """A list, and where its samples lie in some sources. The sources are opened when something first asks.

    Args:
        path: the list.
        sources: all that it may speak of; see `kept`.
    """

    def __init__(self, path: str | Path, sources: Sequence[Source]) -> None:
        self.path = Path(path)
        self.sources = list(sources)
        self._left_out: list[np.ndarray] | None = None

    def kept(self) -> list["Kept"]:
        """The sources without their samples of the list."""
        return [Kept(source, self, number) for number, source in enumerate(self.sources)]

    def left_out(self, number: int) -> np.ndarray:
        """int64[k], ascending: indices of source `number` that the list names.

        Raises:
            UserError: an entry that fits no sample, or two files under the name of its source.
        """
        if self._left_out is None:
            self._left_out = self._find()
        return self._left_out[number]

    def _find(self) -> list[np.ndarray]:
        found: list[set[int]] = [set() for _ in self.sources]
        by_name: defaultdict[str, list[int]] = defaultdict(list)
        for number, source in enumerate(self.sources):
            by_name[source.name].append(number)
        for entry in read_quarantine(self.path):
            where = f"{self.path}: sample {entry.id!r} (number {entry.index}) of source {entry.source!r}"
            if entry.source not in by_name:
                raise UserError(
                    f"{where}: there is no such source, there are {', '.join(by_name)}; "
                    "name it so, or make the list again with `vlm check-data`"
                )
            files = set()
            for number in by_name[entry.source]:
                identity, file = _at(self.sources[number], entry.index)
                if identity == entry.id:
                    found[number].add(entry.index)
                    files.add(file)
            if not files:
                raise UserError(
                    f"{where} is not there, the data has changed since the list was written; make it again with "
                    "`vlm check-data`"
                )
            if len(files) > 1:
                raise UserError(
                    f"{where}: {len(files)} sources have this name and such a sample ({', '.join(sorted(files))}); "
                    "give them different names with 'name', then make the list again with `vlm check-data`"
                )
        for source, indices in zip(self.sources, found, strict=True):
            if len(indices) == len(source):
                raise UserError(f"{self.path} names every sample of source {source.name!r}; remove the source")
        return [np.array(sorted(indices), dtype=np.int64) for indices in found]


def _at(source: Source, index: int) -> tuple[str | None, str]:
    """Id and file of a sample, read or not; no id beyond the end."""
    if index >= len(source):
        return None, ""
    try:
        sample: Sample = source[index]
    except SampleError as error:
        return error.sample_id, error.source
    return sample.id, sample.source


class Kept(Wrapped):
    """A source without the samples that a list names. It remembers these alone, however large the source is."""

    def __init__(self, source: Source, quarantine: Quarantine, number: int) -> None:
        super().__init__(source)
        self._quarantine: Quarantine | None = quarantine
        self._number = number
        self._left_out: np.ndarray | None = None

    @property
    def left_out(self) -> np.ndarray:
        """int64[k], ascending: indices of the source that are left out."""
        if self._left_out is None:
            assert self._quarantine is not None
            self._left_out = self._quarantine.left_out(self._number)
            # sample i stands behind as many of them as have at most i kept ones before them
            self._before = self._left_out - np.arange(len(self._left_out))
        return self._left_out

    def __getstate__(self) -> dict[str, Any]:
        self.left_out  # noqa: B018  (a worker gets what was found, not the list and the other sources)
        return self.__dict__ | {"_quarantine": None}

    def place(self, index: int) -> tuple[str, int]:
        return self.source.place(self._original(index))

    def _original(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, asked for number {index}")
        return index + int(np.searchsorted(self._before, index, side="right"))

    def __len__(self) -> int:
        return len(self.source) - len(self.left_out)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self._original(index)]

    def has_image(self, index: int) -> bool:
        return self.source.has_image(self._original(index))

    def image_mask(self) -> np.ndarray:
        return np.delete(self.source.image_mask(), self.left_out)

    def blocks(self) -> Blocks | None:
        found = self.source.blocks()
        return None if found is None else found._replace(ends=found.ends - np.searchsorted(self.left_out, found.ends))


def fingerprint(sources: Iterable[Kept]) -> str | None:
    """What the sources leave out, as one word; None where it is nothing."""
    places = [f"{number}/{index}" for number, source in enumerate(sources) for index in source.left_out.tolist()]
    if not places:
        return None
    return f"{len(places)} samples, {hashlib.blake2b(' '.join(places).encode(), digest_size=6).hexdigest()}"
