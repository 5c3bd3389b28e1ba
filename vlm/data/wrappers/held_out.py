"""A share of the training data held out as validation: whole groups of samples that show the same images."""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from vlm.data.sources.base import Source
from vlm.data.sources.rows import RowImage
from vlm.data.wrappers.wrapped import Wrapped
from vlm.errors import SampleError, UserError
from vlm.sample import ImageFile, Sample

Side = Literal["training", "validation"]


class HoldOut:
    """Which samples of some sources are held out.

    Samples with an image in common are on one side, as are samples of one `group`. Images are the same if they are one
    file, or the same bytes. Groups are ordered by a hash of their content's names and held out until the share is
    reached, so the sides depend on neither seed, ranks nor the order of the samples. The sources are opened when
    something first asks.

    Args:
        share: of all samples, between 0 and 1.
        sources: all that are trained on.
    """

    def __init__(self, share: float, sources: Sequence[Source]) -> None:
        if not 0 < share < 1:
            raise UserError(f"data.val_split must be between 0 and 1, found {share}")
        self.share = share
        self.sources = list(sources)
        self._masks: list[np.ndarray] | None = None

    def parts(self, side: Side) -> list["Part"]:
        """The sources, each with its samples of one side, of which there may be none."""
        return [Part(source, self, number, side) for number, source in enumerate(self.sources)]

    def indices(self, number: int, side: Side) -> np.ndarray:
        """int64[k], ascending: the samples of source `number` that are on a side.

        Raises:
            UserError: one side would be empty.
        """
        if self._masks is None:
            self._masks = self._hold_out()
        mask = self._masks[number]
        return np.flatnonzero(mask if side == "validation" else ~mask)

    def _hold_out(self) -> list[np.ndarray]:
        """bool[samples of the source] each: whether a sample is held out."""
        names: list[list[str]] = []  # what each sample has in common with others
        for source in self.sources:
            if source.blocks() is not None:
                raise UserError(
                    f"data.val_split looks at every sample before the first step, and {source.name!r} is streamed; "
                    "name other data in data.val_sources, or leave streaming, groups_at_once and streams out"
                )
            names += [_names(source, index) for index in range(len(source))]
        groups = _connected(names)
        members: dict[int, list[int]] = {}
        for sample, group in enumerate(groups):
            members.setdefault(group, []).append(sample)
        ordered = sorted(members.values(), key=lambda samples: min(_hash(name) for s in samples for name in names[s]))
        wanted = max(1, round(self.share * len(names)))
        held = np.zeros(len(names), dtype=bool)
        for samples in ordered[:-1]:  # one group is always trained on
            if held.sum() >= wanted:
                break
            held[samples] = True
        if not held.any():
            raise UserError(
                f"data.val_split={self.share}: all {len(names)} samples have an image or group in common, so none can "
                "be held out; leave it out, or name other data in data.val_sources"
            )
        return np.split(held, np.cumsum([len(source) for source in self.sources])[:-1])


class Part(Wrapped):
    """The samples of a source that are on one side."""

    def __init__(self, source: Source, held_out: HoldOut, number: int, side: Side) -> None:
        super().__init__(source)
        self._held_out: HoldOut | None = held_out
        self._number, self._side = number, side
        self._found: np.ndarray | None = None

    @property
    def indices(self) -> np.ndarray:
        """int64[len(self)], ascending: the samples in the source."""
        if self._found is None:
            assert self._held_out is not None
            self._found = self._held_out.indices(self._number, self._side)
        return self._found

    def __getstate__(self) -> dict[str, Any]:
        self.indices  # noqa: B018  (a worker gets what was found, not the other sources)
        return self.__dict__ | {"_held_out": None}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self._original(index)]

    def has_image(self, index: int) -> bool:
        return self.source.has_image(self._original(index))

    def place(self, index: int) -> tuple[str, int]:
        return self.source.place(self._original(index))

    def image_mask(self) -> np.ndarray:
        return self.source.image_mask()[self.indices]

    def _original(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples for {self._side}, asked for number {index}")
        return int(self.indices[index])


def _names(source: Source, index: int) -> list[str]:
    """What a sample may have in common with others: its group and images, or else its text."""
    try:
        sample = source[index]
    except SampleError as error:  # told by the loader that comes to it
        return [f"bad {error.source} {error.sample_id} {index}"]
    if sample.group is not None:
        return [f"group {sample.group}", *(_name(file, sample) for file in sample.images)]
    if sample.images:
        return [_name(file, sample) for file in sample.images]
    return [f"text {sample.id} {sample.messages!r}"]


def _name(file: ImageFile, sample: Sample) -> str:
    if isinstance(file, RowImage):
        try:
            file = file.load()
        except SampleError:
            return f"bad {file.name} {sample.id}"
    if type(file) is ImageFile and file.path is not None:  # others lie inside of a larger file
        return f"file {file.path}"
    if type(file) is ImageFile and file.data is not None:
        return f"bytes {hashlib.blake2b(file.data, digest_size=16).hexdigest()}"
    try:
        return f"pixels {hashlib.blake2b(file.read(sample).tobytes(), digest_size=16).hexdigest()}"
    except SampleError:
        return f"bad {file.name} {sample.id}"


def _connected(names: Sequence[Sequence[str]]) -> list[int]:
    """The number of each sample's group: samples with a name in common, over others too, are in one."""
    parent = list(range(len(names)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    first: dict[str, int] = {}
    for sample, shared in enumerate(names):
        for name in shared:
            parent[root(sample)] = root(first.setdefault(name, sample))
    return [root(sample) for sample in range(len(names))]


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
