"""Files of captions: a JSON list or JSONL whose records name an image and say something about it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm.checkpoints.files.atomic import atomic_file
from vlm.data.sources.json_records import RecordFile
from vlm.errors import SampleError, UserError


class CaptionFile:
    """Records in the file's order, each read when asked.

    Args:
        path: the file.
        key: where a record has its caption (`caption`; LLaVA's metadata.json also has `blip_caption`).
    """

    def __init__(self, path: str | Path, *, key: str = "caption") -> None:
        self.path = Path(path)
        self.key = key
        self._records = RecordFile(path, flag=bool)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self._records[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[index]

    def captions(self) -> Iterator[str]:
        """Raises `SampleError` for a record without a caption."""
        for index, record in enumerate(self):
            yield self.text(record, index, self.key)

    def text(self, record: Mapping[str, Any], index: int, key: str) -> str:
        """A text that a record must have; raises `SampleError`."""
        value = record.get(key)
        if not isinstance(value, str) or not value.strip():
            name = str(record.get("id", index))
            found = f"found keys {sorted(map(str, record))}" if key not in record else f"found {value!r}"
            raise SampleError(f"{key!r} must be a text, {found}", sample_id=name, source=str(self.path))
        return value


def write_records(path: str | Path, records: Iterable[Mapping[str, Any]], *, replace: bool = False) -> int:
    """Writes a JSON list, or JSONL where the name ends in `.jsonl`; returns how many records.

    The file is complete or not there.

    Args:
        replace: whether it may take the place of an older one.

    Raises:
        UserError: it is there already.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise UserError(f"{path}: exists already; remove it or give another name")
    lines = path.suffix == ".jsonl"
    count = 0
    with atomic_file(path) as file:
        for record in records:
            mark = ("" if lines else ",\n") if count else ("" if lines else "[\n")
            end = "\n" if lines else ""
            file.write((mark + json.dumps(record, ensure_ascii=False) + end).encode())
            count += 1
        if not lines:
            file.write(b"\n]\n" if count else b"[]\n")
    return count
