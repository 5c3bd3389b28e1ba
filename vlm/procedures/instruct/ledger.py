"""Everything that models have said so far, line by line in a file: what was paid for once is never asked again.

::

    {"settings": {...}}
    {"id": "7", "of": "3f...", "attempt": 0, "step": "answer", "text": "...", "end": "stop", "tokens": 112}

A line is on the disk before anything is made of it. A line that a killed process left half written is cut off. A start
that heard nothing leaves no file, so that options that were wrong can be corrected.
"""

import fcntl
import json
import os
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from vlm.checkpoints.files.atomic import explain_full_disk
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

    Attributes:
        num_tokens: that models wrote, where they say so.
        attempts: begun so far, by record.

    Raises:
        UserError: another process writes it; other settings or records; no such file.
    """

    def __init__(self, path: str | Path, *, settings: Mapping[str, Any], records: Mapping[str, str]) -> None:
        self.path = Path(path)
        self.num_tokens = 0
        self.attempts: Counter[str] = Counter()
        self._settings = json.loads(json.dumps(settings))  # as they will be read back
        self._records = records
        self._places: dict[Key, int] = {}
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")  # noqa: SIM115  (open as long as the ledger is)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); give another --out") from error
        try:
            self._take_lock()
            self._open()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._places:
            self.path.unlink(missing_ok=True)
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
            if not self._places:
                self._append({"settings": self._settings})
            self._note(key, entry, at=self._append(entry))

    def _append(self, entry: Mapping[str, Any]) -> int:
        with explain_full_disk(self.path.parent):
            at = self._file.seek(0, os.SEEK_END)
            # ASCII: a text from outside may hold what is no character, and every reader splits lines alike
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        return at

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # it may have been removed by its last owner after it was opened here
            is_free = os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except (BlockingIOError, FileNotFoundError):
            is_free = False
        except OSError as error:
            raise UserError(f"{self.path}: cannot be locked ({error.strerror}); write to another disk") from error
        if not is_free:
            raise UserError(f"{self.path}: another process writes this file; wait for it or give another --out")

    def _open(self) -> None:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                if number == 1:
                    settings = dict(entry["settings"])
                else:
                    self._take(Key(entry["id"], entry["attempt"], entry["step"]), entry, at=end)
            except (ValueError, TypeError, KeyError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"{self.path}: line {number} is none of this procedure's; give another --out"
                ) from error
            end += len(line)
        self._file.truncate(end if self._places else 0)
        if self._places and (changed := differences(settings, self._settings)):
            raise UserError(
                f"{self.path}: begun with other settings ({'; '.join(changed)}); give those, or another --out"
            )

    def _take(self, key: Key, entry: Mapping[str, Any], *, at: int) -> None:
        if self._records.get(key.id) != entry["of"]:
            what = "is another one now" if key.id in self._records else "is no longer there"
            raise UserError(f"{self.path}: record {key.id!r} of the input {what}; restore it or give another --out")
        self._note(key, entry, at=at)

    def _note(self, key: Key, entry: Mapping[str, Any], *, at: int) -> None:
        self._places[key] = at
        self.attempts[key.id] = max(self.attempts[key.id], key.attempt + 1)
        self.num_tokens += entry.get("tokens") or 0


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` of everything that differs."""
    keys = sorted(old.keys() | new.keys())
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]
