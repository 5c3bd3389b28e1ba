"""Looking at every sample, in worker processes: what is wrong with it, and a few numbers about it.

Good samples leave numbers in arrays and nothing else, about 70 bytes each, so that memory stays flat however large the
data is. An image that many samples show is decoded once.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vlm.codec import Codec
from vlm.commands.check_data.facts import SCRIPTS, content_of, encode, file_key, hashed, script_of, sizes_of
from vlm.commands.check_data.parts import Part, locate
from vlm.data.loading.workers import worker_context
from vlm.errors import SampleError, UserError
from vlm.prompts.documents import CUT
from vlm.sample import Sample

CHUNK = 64


class Finding(NamedTuple):
    """Something wrong with a sample: its number among all that are looked at, its id, one of `KINDS`, and why."""

    sample: int
    id: str
    kind: str
    reason: str


@dataclass
class Texts:
    """Numbers of n samples with k images.

    Attributes:
        tokens: int32[n], 0 where it could not be encoded; so are labels and visual.
        labels: int32[n] trained tokens.
        visual: int32[n] tokens of images.
        scripts: int8[n], of the text; an index of `SCRIPTS`.
        pictures: int32[n], how many.
        cut: int8[n], 1 for a document whose end did not fit into the limit of tokens.
        text: uint64[n], hash of the messages; 0 where the sample could not be read.
        ids: uint64[n], hash of the id.
        keys: uint64[k], a hash for each picture: the same file has the same.
    """

    tokens: np.ndarray
    labels: np.ndarray
    visual: np.ndarray
    scripts: np.ndarray
    pictures: np.ndarray
    cut: np.ndarray
    text: np.ndarray
    ids: np.ndarray
    keys: np.ndarray


_TYPES = (np.int32, np.int32, np.int32, np.int8, np.int32, np.int8, np.uint64, np.uint64, np.uint64)


class Pictures(NamedTuple):
    """Numbers of m different pictures: int32[m] width and height (0: unreadable), uint64[m] hash of the content."""

    width: np.ndarray
    height: np.ndarray
    content: np.ndarray


class _TextChunks(Dataset):
    """`CHUNK` samples at a time."""

    def __init__(self, parts: Sequence[Part], *, epochs: int, max_tokens: int | None) -> None:
        self.parts = parts
        self.epochs = epochs
        self.max_tokens = max_tokens
        self.bounds = np.cumsum([0, *(len(part.indices) for part in parts)])

    def __len__(self) -> int:
        return -(-int(self.bounds[-1]) // CHUNK)

    def __getitem__(self, chunk: int) -> tuple[Texts, list[Finding]] | UserError:
        numbers = range(chunk * CHUNK, min((chunk + 1) * CHUNK, int(self.bounds[-1])))
        rows: list[tuple[int, ...]] = []
        keys: list[int] = []
        findings: list[Finding] = []
        try:
            for number in numbers:
                row, files = self._look(number, findings)
                rows.append(row)
                keys += files
        except UserError as error:  # raised in a worker it would arrive as the text of a traceback
            return error
        columns = [*zip(*rows, strict=True), keys]
        return Texts(*(np.array(c, dtype=kind) for c, kind in zip(columns, _TYPES, strict=True))), findings

    def _look(self, number: int, findings: list[Finding]) -> tuple[tuple[int, ...], list[int]]:
        part, index = locate(self.parts, number)
        try:
            sample = part.samples[index]
        except SampleError as error:
            findings.append(Finding(number, error.sample_id, error.kind or "schema", error.reason))
            return (0, 0, 0, len(SCRIPTS) - 1, 0, 0, 0, hashed(error.sample_id)), []
        sizes, is_cut = (0, 0, 0), 0
        try:
            for epoch in range(self.epochs if part.encoder.training else 1):
                item = encode(part.encoder, index, epoch=epoch)
                if epoch == 0:
                    sizes, is_cut = sizes_of(item), int(CUT in item.counts)
                if self.max_tokens is not None and item.num_tokens > self.max_tokens:
                    over = f"{item.num_tokens} tokens, over data.max_tokens={self.max_tokens}"
                    raise sample.error(over, kind="too long")
        except SampleError as error:
            findings.append(Finding(number, sample.id, error.kind or "encoding", error.reason))
        texts = [part.text for message in sample.messages for part in message.content if hasattr(part, "text")]
        keys = [file_key(file, number, at) for at, file in enumerate(sample.images)]
        numbers = (
            script_of("".join(texts)),
            len(keys),
            is_cut,
            hashed(*map(content_of, sample.messages)),
            hashed(sample.id),
        )
        return (*sizes, *numbers), keys


class _PictureChunks(Dataset):
    """Pictures, each given by a sample that shows it: its number, and which of its images."""

    def __init__(self, parts: Sequence[Part], owners: np.ndarray, places: np.ndarray, *, headers_only: bool) -> None:
        self.parts = parts
        self.owners = owners
        self.places = places
        self.headers_only = headers_only

    def __len__(self) -> int:
        return -(-len(self.owners) // CHUNK)

    def __getitem__(self, chunk: int) -> tuple[np.ndarray, list[tuple[int, str]]] | UserError:
        numbers = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.owners)))
        found = np.zeros((len(numbers), 3), dtype=np.uint64)
        failures: list[tuple[int, str]] = []
        try:
            for at, picture in enumerate(numbers):
                part, index = locate(self.parts, int(self.owners[picture]))
                sample = part.samples[index]
                try:
                    found[at] = self._look(sample, int(self.owners[picture]), int(self.places[picture]))
                except SampleError as error:
                    failures.append((picture, error.reason))
        except UserError as error:
            return error
        return found, failures

    def _look(self, sample: Sample, owner: int, place: int) -> tuple[int, int, int]:
        file = sample.images[place]
        if self.headers_only:
            return (*file.size(sample), file_key(file, owner, place))
        image = file.read(sample)
        return (*image.size, hashed(str(image.size), image.tobytes()))


@dataclass
class Scan:
    """What was found.

    Attributes:
        first: int64[n + 1], per sample its first entry in `shown`; the last one is the length of `shown`.
        shown: int64[k], per image of a sample its number in `pictures`.
        findings: in the order of the samples.
    """

    parts: list[Part]
    texts: Texts
    first: np.ndarray
    shown: np.ndarray
    pictures: Pictures
    findings: list[Finding]

    @property
    def source_of(self) -> np.ndarray:
        """int64[n], number of the source of each sample, counted over all parts."""
        found, offset = [], 0
        for part in self.parts:
            found.append(np.searchsorted(part.samples.ends, part.indices, side="right") + offset)
            offset += len(part.samples.sources)
        return np.concatenate(found)

    @property
    def source_names(self) -> list[tuple[str, str]]:
        """(part, source) in the order of `source_of`."""
        return [(part.name, source.name) for part in self.parts for source in part.samples.sources]

    def place(self, number: int) -> tuple[str, int]:
        """Source of a sample and its number there."""
        part, index = locate(self.parts, number)
        return part.samples.place(index)

    def sample(self, number: int) -> Sample:
        """Read anew; raises `SampleError` where it cannot be."""
        part, index = locate(self.parts, number)
        return part.samples[index]

    def id_of(self, number: int) -> str:
        try:
            return self.sample(number).id
        except SampleError as error:
            return error.sample_id

    def content(self) -> np.ndarray:
        """uint64[n], a hash of messages and images; 0 where the sample could not be read."""
        found = self.texts.text.copy()
        counts = np.diff(self.first)
        for place in range(int(counts.max(initial=0))):
            has = np.flatnonzero(counts > place)
            mixed = found[has] * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)
            found[has] = mixed ^ self.pictures.content[self.shown[self.first[has] + place]]
        return found


def scan(
    parts: list[Part],
    *,
    workers: int = 0,
    epochs: int = 1,
    max_tokens: int | None = None,
    headers_only: bool = False,
) -> Scan:
    """Looks at all samples and their images.

    Args:
        workers: processes; 0: this one.
        epochs: how often a training sample is encoded, each time with other random choices.
        max_tokens: limit of a pack.
        headers_only: read the pictures' sizes and decode none.

    Raises:
        UserError: a file of samples cannot be read at all.
    """
    codec = parts[0].encoder.codec
    findings: list[Finding] = []
    collected: list[Texts] = []
    chunks = _TextChunks(parts, epochs=epochs, max_tokens=max_tokens)
    for texts, found in _results(chunks, "texts", int(chunks.bounds[-1]), workers=workers, codec=codec):
        collected.append(texts)
        findings += found
    names = [field.name for field in fields(Texts)]
    whole = Texts(**{name: np.concatenate([getattr(texts, name) for texts in collected]) for name in names})
    first = np.concatenate([[0], np.cumsum(whole.pictures, dtype=np.int64)])
    _, where, shown = np.unique(whole.keys, return_index=True, return_inverse=True)
    by_place = np.argsort(where)  # in the order of the samples, which is that of the files
    rank = np.empty_like(by_place)
    rank[by_place] = np.arange(len(by_place))
    where, shown = where[by_place], rank[shown]
    owners = np.searchsorted(first, where, side="right") - 1
    pictures = _PictureChunks(parts, owners, where - first[owners], headers_only=headers_only)
    rows = [np.zeros((0, 3), dtype=np.uint64)]
    failures: list[tuple[int, str]] = []
    for found_rows, failed in _results(pictures, "pictures", len(owners), workers=workers, codec=codec):
        rows.append(found_rows)
        failures += failed
    table = np.concatenate(rows)
    numbers = Pictures(table[:, 0].astype(np.int32), table[:, 1].astype(np.int32), table[:, 2])
    result = Scan(parts, whole, first, shown, numbers, findings)
    known = {(finding.sample, finding.reason) for finding in findings}
    uses = np.argsort(shown, kind="stable")
    ends = np.searchsorted(shown, np.arange(len(owners) + 1), sorter=uses)
    for picture, reason in failures:
        for use in uses[ends[picture] : ends[picture + 1]].tolist():
            number = int(np.searchsorted(first, use, side="right")) - 1
            if (number, reason) not in known:
                known.add((number, reason))
                part, index = locate(parts, number)
                findings.append(Finding(number, part.samples[index].id, "image", reason))
    findings.sort(key=lambda finding: finding.sample)
    return result


def _results(chunks: Dataset, name: str, total: int, *, workers: int, codec: Codec) -> Iterator[Any]:
    if not total:
        return
    loader = DataLoader(
        chunks,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        multiprocessing_context=worker_context(workers, codec),
        generator=torch.Generator(),
    )
    with tqdm(total=total, desc=name, unit="", disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
        for result in loader:
            if isinstance(result, UserError):
                raise result
            yield result
            bar.update(min(CHUNK, total - bar.n))


def _as_it_is(value: Any) -> Any:
    return value  # numpy stays numpy
