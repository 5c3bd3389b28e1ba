"""Data by its name on the Hugging Face hub, read by the `datasets` library."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.sampling.order import Blocks
from vlm.data.sources.base import Source
from vlm.data.sources.messages import IMAGE_KEYS
from vlm.data.sources.parquet import Parquet
from vlm.data.sources.rows import Rows, check_columns
from vlm.errors import UserError
from vlm.sample import MAX_PIXELS, Sample
from vlm.sample.paths import located

_STATE = "state.json"
"""What `Dataset.save_to_disk` leaves in a folder; `DatasetDict.save_to_disk` leaves the other."""
_SPLITS = "dataset_dict.json"


class HubDataset(Source):
    """Rows of a dataset of the hub, or of a folder in one of the layouts that `datasets` reads or writes.

    ::

        class_path: vlm.data.HubDataset
        init_args: {path: HuggingFaceM4/the_cauldron, config: ai2d}

    Rows are those of `vlm.data.Parquet`: `messages`, `conversations` (LLaVA-OneVision) or `texts` (the_cauldron) beside
    `images` or `image`, or a column of captions. A whole dataset is downloaded once into the cache of `datasets` and
    read from there in any order. With `streaming` nothing is downloaded before it is trained on: rows are fetched from
    the parquet files of the hub by row groups, in the order of `Parquet.groups_at_once`. A stopped run goes on exactly
    in both cases.

    Args:
        path: id on the hub; or a folder that `save_to_disk` wrote, or one of files that `load_dataset` reads.
        config: the part of a dataset that has several.
        split: also a slice, `train[:5000]`, where nothing is streamed.
        revision: commit, tag or branch; a run that should be repeatable names a commit.
        streaming: fetch rows when they are needed.
        name: by default the last word of the id, with the config.
        caption: column of the caption.
        prompt: the user's text beside a captioned image.
        groups_at_once: row groups that are shuffled together while streaming; each worker keeps so many.
        max_pixels: limit on decode.

    Raises:
        UserError: at first use; `datasets` is missing, no such dataset, config or split, or no such columns.
    """

    def __init__(
        self,
        path: str,
        config: str | None = None,
        split: str = "train",
        revision: str | None = None,
        streaming: bool = False,
        name: str | None = None,
        caption: str | None = None,
        prompt: str = "",
        groups_at_once: int = 4,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if streaming and "[" in split:
            raise UserError(f"{path}: split {split!r}: a slice is of a dataset that is there; leave streaming out")
        self.path = str(path)
        self.config, self.split, self.revision = config, split, revision
        self.streaming = streaming
        last = self.path.rstrip("/").rsplit("/", 1)[-1]
        self.name = name if name is not None else f"{last}_{config}" if config else last
        self.caption, self.prompt = caption, prompt
        self.groups_at_once = groups_at_once
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self._rows[index]

    def has_image(self, index: int) -> bool:
        return self._rows.has_image(index)

    def image_mask(self) -> np.ndarray:
        return self._rows.image_mask()

    def blocks(self) -> Blocks | None:
        return self._rows.blocks()

    @cached_property
    def _rows(self) -> Rows:
        label = " ".join(filter(None, (self.path, self.config, self.split)))
        words: dict[str, Any] = {"caption": self.caption, "prompt": self.prompt, "max_pixels": self.max_pixels}
        if self.streaming and not is_saved(self.path):
            files = [located(file) for file in _explained(self, _find_files)]
            other = next((file for file in files if Path(str(file).partition("?")[0]).suffix != ".parquet"), None)
            if other is not None or not files:
                raise UserError(
                    f"{label}: streaming fetches rows of parquet files, found {other or 'none'}; leave streaming out, "
                    "or take revision: refs/convert/parquet, where the hub keeps the same as parquet"
                )
            return _Files(label, files, name=self.name, groups_at_once=self.groups_at_once, **words)
        return _Table(label, _explained(self, _open), name=self.name, **words)


class _Files(Parquet):
    """Parquet files that are listed already."""

    def __init__(self, label: str, files: list[Path], **options: Any) -> None:
        super().__init__(label, **options)
        self._listed = files

    def files(self) -> list[Path]:
        return self._listed


class _Table(Rows):
    """A table of `datasets`, which lies in its cache and is mapped into memory."""

    def __init__(self, label: str, table: Any, *, name: str, max_pixels: int, caption: str | None, prompt: str) -> None:
        super().__init__(None, name, max_pixels, caption, prompt)
        self.label = label
        check_columns(label, table.column_names, caption)
        if not len(table):
            raise UserError(f"{label}: holds no samples; remove it from the sources or take another split")
        self._table = table.with_format("arrow")  # rows as they are stored: nothing is decoded
        self._key = next((key for key in IMAGE_KEYS if key in table.column_names), None)
        self._has_bytes = self._key is not None and "Image(" in repr(table.features[self._key])
        kept = [column for column in table.column_names if column != self._key]
        self._text = self._table.select_columns(kept) if self._has_bytes else self._table

    def __len__(self) -> int:
        return len(self._table)

    def text(self, index: int) -> tuple[dict[str, Any], str, int]:
        record = self._text[index].to_pylist()[0]
        if self._has_bytes:
            (value,) = _without_bytes(self._column(index)).to_pylist()
            record[self._key] = value
        return record, self.label, index

    def image_key(self, index: int) -> str | None:
        return self._key if self._has_bytes else None

    def images(self, index: int) -> Any:
        return self._column(index).to_pylist()[0]

    def root(self, index: int) -> Path | None:
        return None

    def image_mask(self) -> np.ndarray:
        return self._mask

    @cached_property
    def _mask(self) -> np.ndarray:
        if self._key is None:
            return np.zeros(len(self), dtype=bool)
        steps = range(0, len(self), 1000)
        return np.concatenate([_are_filled(self._table[at : at + 1000].column(self._key)) for at in steps])

    def _column(self, index: int) -> Any:
        """The images of one row, as arrow's array of one value."""
        return self._table[index].column(self._key).combine_chunks()


def _without_bytes(images: Any) -> Any:
    """`{path}` of images of `{bytes, path}`, or lists of them; no bytes are copied."""
    import pyarrow as pa

    if pa.types.is_struct(images.type):
        return pa.StructArray.from_arrays([images.field("path")], ["path"], mask=images.is_null())
    paths = pa.StructArray.from_arrays([images.flatten().field("path")], ["path"])
    return pa.array([paths.to_pylist() if images.is_valid()[0].as_py() else None])


def _are_filled(column: Any) -> np.ndarray:
    """bool[rows]: whether there is an image, of a column of structs, of lists or of paths."""
    import pyarrow as pa
    from pyarrow import compute

    if pa.types.is_struct(column.type):
        return np.asarray(column.is_valid())
    of_lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    lengths = compute.list_value_length(column) if of_lists else compute.binary_length(column)
    return np.asarray(lengths.fill_null(0)) > 0


def _open(source: HubDataset, datasets: Any) -> Any:
    if not is_saved(source.path):
        return datasets.load_dataset(source.path, source.config, split=source.split, revision=source.revision)
    found = datasets.load_from_disk(source.path)
    if not isinstance(found, datasets.DatasetDict):
        return found
    if source.split not in found:
        raise UserError(f"{source.path}: no split {source.split!r}; there are {', '.join(found)}")
    return found[source.split]


def _find_files(source: HubDataset, datasets: Any) -> list[str]:
    made = datasets.load_dataset_builder(source.path, source.config, revision=source.revision)
    files = made.config.data_files or {}
    if source.split not in files:
        raise UserError(f"{source.path}: no split {source.split!r}; there are {', '.join(map(str, files)) or 'none'}")
    return list(files[source.split])


def is_saved(path: str) -> bool:
    return any((Path(path) / file).is_file() for file in (_STATE, _SPLITS))


def _explained(source: HubDataset, use: Callable[[HubDataset, Any], Any]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source.path}: data of the hub needs datasets; pip install 'vlm[hub]'") from error
    try:
        return use(source, datasets)
    except UserError:
        raise
    except Exception as error:  # of the library, of the hub and of the network, which have no class in common
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{source.path}: datasets cannot open it as config {source.config!r}, split {source.split!r} "
            f"({type(error).__name__}: {reason}); check the id, config and split, and the network"
        ) from error
