"""Chats in parquet files, images among the columns: what the `datasets` library writes and the hub serves.

Images are read when they are decoded, not with the text: every rank looks at the text of a whole step, but only at
the images of its own packs.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm.data.sources.base import Source
from vlm.data.sources.messages import IMAGE_KEYS, TURN_KEYS, chat_record
from vlm.errors import Fault, SampleError, UserError, quoted
from vlm.sample import MAX_PIXELS, ImageFile, Sample, parse_image, parse_sample
from vlm.sample.paths import located

MAX_GROUP_BYTES = 1 << 30
"""Largest row group that is read: it is what one image costs in memory and time."""
_CACHED_GROUPS = 2


class Parquet(Source):
    """Rows with `messages` or `conversations`, and `images` or `image`; the forms of `MessagesJson`. Or,
    with `caption`, rows of an image and its caption (web pairs).

    An image is bytes, a path, or `{bytes, path}`. Memory holds two row groups of text and two of images, whatever
    the size of the files. A row group is read as a whole to get at one row, so files with small row groups are faster:
    100 rows, as `datasets` writes them where there are images, not the 1,000,000 of other writers.

    Args:
        path: a file, a folder with `*.parquet` files, or a pattern (`data/train-*.parquet`).
        image_root: folder that image paths start at and that none may leave; by default the folder of the file.
        name: by default the file's or folder's name without its ending.
        max_pixels: limit on decode.
        caption: column of the caption.
        prompt: the user's text beside a captioned image.

    Raises:
        UserError: at first use; pyarrow is missing, no such file, not parquet, no such columns, or row groups beyond
            memory.
    """

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        name: str | None = None,
        max_pixels: int = MAX_PIXELS,
        caption: str | None = None,
        prompt: str = "",
    ) -> None:
        self.caption, self.prompt = caption, prompt
        self.path = located(path)
        self.image_root = located(image_root) if image_root is not None else None
        self.name = name if name is not None else self.path.stem
        self.max_pixels = max_pixels

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_groups"}

    def __len__(self) -> int:
        return int(self._index.ends[-1])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, asked for number {index}")
        group = int(np.searchsorted(self._index.ends, index, side="right"))
        row = index - (int(self._index.ends[group - 1]) if group else 0)
        file, first_row, number = self._index.groups[group]
        columns = self._index.columns[file]
        record = self._read(file, number, columns.text).slice(row, 1).to_pylist()[0]
        position = first_row + row

        def error(message: str, *, kind: Fault | None = None) -> SampleError:
            identity = record.get("id")
            name = position if identity is None else identity
            return SampleError(f"row {position}: {message}", sample_id=str(name), source=str(file), kind=kind)

        if columns.pictures:
            key = columns.pictures[0].split(".")[0]
            entries = record.get(key)
            places = [None] if isinstance(entries, dict) else range(len(entries or []))
            record[key] = []
            for place in places if entries is not None else []:
                path = (entries if place is None else entries[place])["path"]
                name = f"{path or key} of row {position}"
                load = partial(self._picture, file, number, row, place, name, error)
                record[key].append(RowImage(name=name, max_pixels=self.max_pixels, load=load))
        if self.caption is not None:
            record = self._captioned(record, error)
        chat = chat_record(record, position, error=error, max_pixels=self.max_pixels)
        try:
            return parse_sample(
                chat,
                source=str(file),
                position=position,
                image_root=self._root(file),
                max_pixels=self.max_pixels,
            )
        except SampleError as found:
            raise error(found.reason, kind=found.kind) from found

    def _captioned(self, record: dict[str, Any], error: Callable[..., SampleError]) -> dict[str, Any]:
        assert self.caption is not None
        caption = record.get(self.caption)
        if not isinstance(caption, str) or not caption.strip():
            raise error(f"column {self.caption!r} must hold a caption, found {quoted(caption)}")
        question = f"<image>\n{self.prompt}" if self.prompt else "<image>"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": caption.strip()}]
        return {key: record[key] for key in ("id", *IMAGE_KEYS) if key in record} | {
            "messages": turns,
            "task": "caption",
        }

    def has_image(self, index: int) -> bool:
        return bool(self.image_mask()[index])

    def image_mask(self) -> np.ndarray:
        return self._mask

    @cached_property
    def _mask(self) -> np.ndarray:
        masks = []
        for file, _, number in self._index.groups:
            columns = self._index.columns[file]
            table = self._read(file, number, columns.marks, cached=False)
            mask = np.zeros(table.num_rows, dtype=bool)
            for column in table.columns:
                mask |= np.fromiter((bool(value) for value in column.to_pylist()), dtype=bool, count=len(mask))
            masks.append(mask)
        return np.concatenate(masks)

    @cached_property
    def _index(self) -> "_Index":
        return _Index(self.path, TURN_KEYS if self.caption is None else (self.caption,))

    def _root(self, file: Path) -> Path:
        return self.image_root if self.image_root is not None else file.parent

    @cached_property
    def _groups(self) -> OrderedDict[tuple, Any]:
        """Row groups read last; a table is a process's own and does not travel."""
        return OrderedDict()

    def _read(self, file: Path, number: int, columns: tuple[str, ...], *, cached: bool = True) -> Any:
        key = (file, number, columns)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        table = _explained(file, lambda parquet: parquet.read_row_group(number, columns=columns, use_threads=False))
        if cached:
            self._groups[key] = table
            same = [other for other in self._groups if other[2] == columns]
            for old in same[:-_CACHED_GROUPS]:
                del self._groups[old]
        return table

    def _picture(
        self, file: Path, number: int, row: int, place: int | None, name: str, error: Callable[..., SampleError]
    ) -> ImageFile:
        columns = self._index.columns[file].pictures
        value = self._read(file, number, columns).column(0)[row].as_py()
        entry = value if place is None else value[place]
        if entry["bytes"] is None:
            if entry["path"] is None:
                raise error("an image has neither 'bytes' nor 'path'", kind="image")
            found = parse_image(entry["path"], error=error, image_root=self._root(file), max_pixels=self.max_pixels)
            return replace(found, name=name)
        return ImageFile(name=name, data=entry["bytes"], max_pixels=self.max_pixels)


@dataclass(frozen=True)
class RowImage(ImageFile):
    """An image that still lies in its row; `load` fetches it."""

    _: KW_ONLY
    load: Callable[[], ImageFile]

    def _open(self, sample: Sample) -> Image.Image:
        return self.load()._open(sample)


@dataclass(frozen=True)
class _Columns:
    """Leaves of a file's schema.

    Attributes:
        text: all but the bytes of images.
        pictures: bytes and paths of the images; empty where bytes have no column of their own to be left out.
        marks: the smallest that tell whether a row has an image.
    """

    text: tuple[str, ...]
    pictures: tuple[str, ...]
    marks: tuple[str, ...]


class _Index:
    """Where the rows of some files lie: a line per row group.

    Attributes:
        groups: (file, its first row within the file, number within the file) of every row group that has rows.
        ends: int64[groups], rows up to and with each of them.
        columns: of each file.
    """

    def __init__(self, path: Path, needed: Sequence[str]) -> None:
        self.columns: dict[Path, _Columns] = {}
        self.groups: list[tuple[Path, int, int]] = []
        counts: list[int] = []
        for file in _files(path):
            schema, sizes = _explained(file, _describe)
            self.columns[file] = _columns(file, schema, needed)
            start = 0
            for number, (rows, num_bytes) in enumerate(sizes):
                if num_bytes > MAX_GROUP_BYTES:
                    raise UserError(
                        f"{file}: row group {number} has {rows:,} rows and {num_bytes:,} bytes, which are read for "
                        "every picture; write the file again with row_group_size=100"
                    )
                if rows:
                    self.groups.append((file, start, number))
                    counts.append(rows)
                start += rows
        if not counts:
            raise UserError(f"{path}: holds no samples; remove it from the sources or fill it")
        self.ends = np.cumsum(counts)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
    elif any(mark in path.name for mark in "*?["):
        files = sorted(path.parent.glob(path.name))
    else:
        files = [path]
    if not files:
        raise UserError(f"{path}: no parquet file there; check the path")
    return files


def _describe(parquet: Any) -> tuple[list[str], list[tuple[int, int]]]:
    metadata = parquet.metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    leaves = [parquet.schema.column(at).path for at in range(len(parquet.schema))]
    return leaves, [(group.num_rows, group.total_byte_size) for group in groups]


def _columns(file: Path, leaves: Sequence[str], needed: Sequence[str]) -> _Columns:
    names = list(dict.fromkeys(leaf.split(".")[0] for leaf in leaves))
    if not any(key in names for key in needed):
        wanted = " nor ".join(map(repr, needed)) if len(needed) > 1 else repr(needed[0])
        missing = f"neither a column {wanted}" if len(needed) > 1 else f"no column {wanted}"
        raise UserError(f"{file}: has {missing}; found {', '.join(names)}")
    for key in IMAGE_KEYS:
        mine = [leaf for leaf in leaves if leaf.split(".")[0] == key]
        ends = {leaf.rsplit(".", 1)[-1]: leaf for leaf in mine if "." in leaf}
        if {"bytes", "path"} <= ends.keys():
            text = tuple(leaf for leaf in leaves if leaf != ends["bytes"])
            return _Columns(text, (ends["bytes"], ends["path"]), (ends["path"],))
    return _Columns(tuple(leaves), (), tuple(leaf for leaf in leaves if leaf.split(".")[0] in IMAGE_KEYS))


def read_table(file: Path, columns: Sequence[str]) -> Any:
    """A whole file's columns as a pyarrow table; those it does not have are left out.

    Raises:
        UserError: pyarrow is missing, no such file, not parquet.
    """
    return _explained(file, lambda parquet: parquet.read(columns=list(columns), use_threads=False))


def _explained(file: Path, use: Callable[[Any], Any]) -> Any:
    """What `use` makes of the opened file; opened anew, because a handle does not survive the way to a worker."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{file}: parquet files need pyarrow; pip install 'vlm[data]'") from error
    try:
        with file.open("rb") as opened, ParquetFile(opened) as parquet:
            return use(parquet)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0]}); check or fetch it again") from error
