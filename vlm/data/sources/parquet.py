"""Chats in parquet files, images among the columns: what the `datasets` library writes and the hub serves."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.sampling.order import Blocks
from vlm.data.sources.messages import IMAGE_KEYS
from vlm.data.sources.rows import Rows, check_columns
from vlm.errors import UserError
from vlm.sample import MAX_PIXELS
from vlm.sample.paths import located

MAX_GROUP_BYTES = 1 << 30
"""Largest row group that is read: it is what one image costs in memory and time."""
_CACHED_GROUPS = 2


class Parquet(Rows):
    """Rows with `messages`, `conversations` or `texts`, and `images` or `image`; the forms of `MessagesJson`, and
    `the_cauldron`'s. Or, with `caption`, rows of an image and its caption (web pairs).

    An image is bytes, a path, or `{bytes, path}`. Memory holds a few row groups of text and of images, whatever the
    size of the files. A row group is read as a whole to get at one row, so files with small row groups are faster: 100
    rows, as `datasets` writes them where there are images, not the 1,000,000 of other writers.

    Args:
        path: a file, a folder with `*.parquet` files, or a pattern (`data/train-*.parquet`); URLs too.
        image_root: folder that image paths start at and that none may leave; by default the folder of the file.
        name: by default the file's or folder's name without its ending.
        max_pixels: limit on decode.
        caption: column of the caption.
        prompt: the user's text beside a captioned image.
        groups_at_once: for files that are far away: an epoch goes through the row groups in random order and shuffles
            the rows of so many of them together, so that each is fetched once by a worker. By default all rows are
            shuffled.

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
        groups_at_once: int | None = None,
    ) -> None:
        if groups_at_once is not None and groups_at_once < 1:
            raise UserError(f"groups_at_once must be at least 1, found {groups_at_once}")
        self.path = located(path)
        root = located(image_root) if image_root is not None else None
        super().__init__(root, name if name is not None else self.path.stem, max_pixels, caption, prompt)
        self.groups_at_once = groups_at_once

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_groups"}

    def __len__(self) -> int:
        return int(self._index.ends[-1])

    def files(self) -> list[Path]:
        """The files in order.

        Raises:
            UserError: there are none.
        """
        return _files(self.path)

    def image_key(self, index: int) -> str | None:
        columns = self._columns_of(index).pictures
        return columns[0].split(".")[0] if columns else None

    def root(self, index: int) -> Path | None:
        return self.image_root if self.image_root is not None else self._index.groups[self._place(index)[0]][0].parent

    def text(self, index: int) -> tuple[dict[str, Any], str, int]:
        group, row = self._place(index)
        file, first_row, number = self._index.groups[group]
        record = self._read(file, number, self._index.columns[file].text).slice(row, 1).to_pylist()[0]
        return record, str(file), first_row + row

    def images(self, index: int) -> Any:
        group, row = self._place(index)
        file, _, number = self._index.groups[group]
        return self._read(file, number, self._index.columns[file].pictures).column(0)[row].as_py()

    def image_mask(self) -> np.ndarray:
        return self._mask

    def blocks(self) -> Blocks | None:
        return None if self.groups_at_once is None else Blocks(self._index.ends, self.groups_at_once)

    def _place(self, index: int) -> tuple[int, int]:
        """Row group and row in it."""
        group = int(np.searchsorted(self._index.ends, index, side="right"))
        return group, index - (int(self._index.ends[group - 1]) if group else 0)

    def _columns_of(self, index: int) -> "_Columns":
        return self._index.columns[self._index.groups[self._place(index)[0]][0]]

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
        return _Index(self.path, self.files(), self.caption)

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
            for old in same[: -max(_CACHED_GROUPS, self.groups_at_once or 0)]:
                del self._groups[old]
        return table


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

    def __init__(self, path: Path, files: Sequence[Path], caption: str | None) -> None:
        self.columns: dict[Path, _Columns] = {}
        self.groups: list[tuple[Path, int, int]] = []
        counts: list[int] = []
        for file in files:
            schema, sizes = _explained(file, _describe)
            self.columns[file] = _columns(file, schema, caption)
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


def _columns(file: Path, leaves: Sequence[str], caption: str | None) -> _Columns:
    check_columns(file, list(dict.fromkeys(leaf.split(".")[0] for leaf in leaves)), caption)
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
