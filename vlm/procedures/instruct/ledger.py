"""Everything that models have said so far, line by line in a file: what was paid for once is never asked again.

::

    {"settings": {...}}
    {"id": "7", "of": "3f...", "attempt": 0, "step": "answer", "text": "...", "end": "stop", "tokens": 112}

A line is on the disk before anything is made of it. A line that a killed process left half written is cut off.
"""

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from vlm.checkpoints.atomic import explain_full_disk
from vlm.errors import UserError


class Key(NamedTuple):
    """Which request.

    Attributes:
        id: of the record.
        attempt: at a usable answer, from 0.
        step: of the procedure.
    """

    id: str
    attempt: int
    step: str


class Ledger:
    """The file, locked for this process.

    Args:
        settings: that decide what is asked. A ledger that was begun with others is refused.
        records: {id: digest of what the record brings} of this start.

    Raises:
        UserError: another process writes it; other settings or records; no such file.
    """

    def __init__(self, path: str | Path, *, settings: Mapping[str, Any], records: Mapping[str, str]) -> None:
        self.path = Path(path)
        self.num_tokens = 0
        self._records = records
        self._places: dict[Key, int] = {}
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115  (open as long as the ledger is)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._open(json.loads(json.dumps(settings)))
        except BlockingIOError as error:
            self._file.close()
            raise UserError(
                f"{self.path}: another process writes this file; wait for it or give another --out"
            ) from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def __getitem__(self, key: Key) -> dict[str, Any]:
        with self._lock:
            self._file.seek(self._places[key])
            return json.loads(self._file.readline())

    def add(self, key: Key, said: Mapping[str, Any]) -> None:
        """Writes what came back; it is on the disk when this returns."""
        entry = {**key._asdict(), "of": self._records[key.id], **said}
        with self._lock:
            self._places[key] = self._append(entry)
            self.num_tokens += said.get("tokens") or 0

    def _append(self, entry: Mapping[str, Any]) -> int:
        with explain_full_disk(self.path.parent):
            at = self._file.seek(0, os.SEEK_END)
            # ASCII: a text from outside may hold what is no character, and every reader splits lines alike
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        return at

    def _open(self, settings: dict[str, Any]) -> None:
        self._file.seek(0)
        end = number = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            self._take(line, number, at=end, settings=settings)
            end += len(line)
        self._file.truncate(end)
        if end == 0:
            self._append({"settings": settings})

    def _take(self, line: bytes, number: int, *, at: int, settings: dict[str, Any]) -> None:
        try:
            entry = json.loads(line)
            if number == 1:
                old = dict(entry["settings"])
            else:
                key, of = Key(entry["id"], entry["attempt"], entry["step"]), entry["of"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.path}: line {number} is none of this procedure's; give another --out") from error
        if number == 1:
            if changed := differences(old, settings):
                raise UserError(
                    f"{self.path}: begun with other settings ({'; '.join(changed)}); give those, or another --out"
                )
            return
        if self._records.get(key.id) != of:
            what = "is another one now" if key.id in self._records else "is no longer there"
            raise UserError(f"{self.path}: record {key.id!r} of the input {what}; restore it or give another --out")
        self._places[key] = at
        self.num_tokens += entry.get("tokens") or 0


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` of everything that differs."""
    keys = sorted(old.keys() | new.keys())
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]
