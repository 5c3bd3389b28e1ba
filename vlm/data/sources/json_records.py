"""Where the records of a JSON file lie, found in one pass whose memory does not grow with the file.

A parsed list of 665,000 conversations takes many gigabytes, once per loader worker. Here a file is a numpy array of
byte offsets: workers share it and read each record by seeking.
"""

import codecs
import itertools
import json
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vlm.errors import SampleError, UserError
from vlm.sample.paths import located

CHUNK = 1 << 20
_SPACE = " \t\r\n"
_MAX_DIGITS = 4300  # Python's own limit
_TOO_DEEP = object()
_NESTING = re.compile(r'"(?:[^"\\]|\\.)*("|\Z)|[\[\]{}]', re.DOTALL)
# An error this near to the end of what has been read may only mean that the rest of the record is still unread.
_TAIL = 16


class RecordFile:
    """The objects of a JSON list, or of a file with one JSON object after another (JSONL).

    Args:
        path: the file; its form is told by its first character.
        flag: what to remember about each record besides its place.

    Attributes:
        flags: bool[n], `flag` of every record.

    Raises:
        UserError: no such file, broken JSON (with line and column), no list, no record that is an object.
    """

    def __init__(self, path: str | Path, *, flag: Callable[[dict[str, Any]], bool]) -> None:
        self.path = located(path)
        bounds, flags = array("q"), array("B")
        any_object, first = False, ""
        try:
            with self.path.open("rb") as file:
                for start, end, record in _Scanner(str(self.path), file).records():
                    is_object = isinstance(record, dict)
                    any_object |= is_object or record is _TOO_DEEP
                    first = first or type(record).__name__
                    bounds.extend((start, end))
                    flags.append(is_object and flag(record))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error}); check the path") from error
        if not flags:
            raise UserError(f"{self.path}: holds no samples; remove it from the sources or fill it")
        if not any_object:
            raise UserError(
                f"{self.path}: record 0 is a {first}; none of the {len(flags)} is a JSON object, and all must be"
            )
        self._bounds = np.frombuffer(bounds, dtype=np.int64).reshape(-1, 2)
        self.flags = np.frombuffer(flags, dtype=np.uint8).astype(bool)

    def __len__(self) -> int:
        return len(self.flags)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises `SampleError` for a record that is no object, or too deep to be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, asked for number {index}")
        start, end = self._bounds[index].tolist()
        try:
            with self.path.open("rb") as file:  # opened anew: a handle does not survive the way to a worker
                file.seek(start)
                record = _decode(file.read(end - start).decode())[0]
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: changed or vanished while in use (record {index}); start again") from error
        except RecursionError:
            record = _TOO_DEEP
        if not isinstance(record, dict):
            found = "is nested too deeply" if record is _TOO_DEEP else f"is a {type(record).__name__}"
            reason = f"record {index} {found}; every record must be a JSON object, drop it"
            raise SampleError(reason, sample_id=str(index), source=str(self.path))
        return record


def first_records(path: str | Path, count: int) -> list[Any]:
    """Records at the beginning of a file, of any type.

    Raises:
        UserError: as `RecordFile`, of the part that is read.
    """
    path = located(path)
    try:
        with path.open("rb") as file:
            return [record for _, _, record in itertools.islice(_Scanner(str(path), file).records(), count)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def _decode(text: str, start: int = 0) -> tuple[Any, int]:
    """A value and where it ends. Whole numbers that are too long for Python become floats."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _LONG_NUMBERS.raw_decode(text, start)


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) < _MAX_DIGITS else float(digits)


_DECODER = json.JSONDecoder()
_LONG_NUMBERS = json.JSONDecoder(parse_int=_whole)


class _Scanner:
    """Decodes one record after another from a window of text that slides over the file."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.text = ""
        self.pos = 0
        self.byte = 0  # byte offset of text[pos]
        self.ended = False
        self.utf8 = codecs.getincrementaldecoder("utf-8")()
        if file.read(3) == codecs.BOM_UTF8:
            self.byte = 3
        else:
            file.seek(0)

    def records(self) -> Iterator[tuple[int, int, Any]]:
        """Yields (first byte, byte after the last, value) of every record."""
        first = self.peek()
        if first == "[":
            yield from self._list()
        elif first == "{":
            while self.peek():
                yield self._value()
        elif first:
            raise self.error("the top level must be a list of records (or one JSON object per line)")

    def _list(self) -> Iterator[tuple[int, int, Any]]:
        self._take(1)
        if self.peek() == "]":
            self._take(1)
        else:
            while True:
                yield self._value()
                mark = self.peek()
                if mark not in (",", "]"):
                    raise self.error("expected ',' or ']' after a record" if mark else "the list is never closed")
                self._take(1)
                if mark == "]":
                    break
        if self.peek():
            raise self.error("unexpected text after the end of the list")

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            end = self.pos
            while end < len(self.text) and self.text[end] in _SPACE:
                end += 1
            self._take(end - self.pos)
            if end < len(self.text):
                return self.text[end]
            if self.ended:
                return ""
            self._read()

    def _value(self) -> tuple[int, int, Any]:
        if not self.peek():
            raise self.error("the list is never closed")
        start = self.byte
        while True:
            try:
                value, end = _decode(self.text, self.pos)
            except RecursionError:
                self._skip()
                return start, self.byte, _TOO_DEEP
            except json.JSONDecodeError as error:
                unread = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _TAIL
                if self.ended or not unread:
                    self._take(error.pos - self.pos)
                    raise self.error(f"broken JSON: {error.msg}") from None
                self._read()
            else:
                if end == len(self.text) and not self.ended and not isinstance(value, (dict, list, str)):
                    self._read()  # a number may go on
                    continue
                self._take(end - self.pos)
                return start, self.byte, value

    def _skip(self) -> None:
        """Passes a list or object that is nested too deeply to be decoded."""
        while True:
            depth = 0
            for found in _NESTING.finditer(self.text, self.pos):
                if found[1] == "":
                    break  # inside of a string
                depth += (found[0] in "[{") - (found[0] in "]}")
                if depth == 0:
                    self._take(found.end() - self.pos)
                    return
            if self.ended:
                raise self.error("nested too deeply, and never closed")
            self._read()

    def _take(self, count: int) -> None:
        self.byte += len(self.text[self.pos : self.pos + count].encode())
        self.pos += count

    def _read(self) -> None:
        # as much again as a record already takes: a long record is not decoded more than a few times
        data = self.file.read(max(CHUNK, len(self.text) - self.pos))
        self.ended = not data
        try:
            self.text = self.text[self.pos :] + self.utf8.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: not UTF-8 ({error.reason}); save it as UTF-8") from error
        self.pos = 0

    def error(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}, at {_place(self.path, self.byte)}; mend the file")


def _place(path: str, byte: int) -> str:
    """Line and column of a byte, counted only when there is something to say about it."""
    line, last, read = 1, b"", 0
    with located(path).open("rb") as file:
        while read < byte and (data := file.read(min(CHUNK, byte - read))):
            read += len(data)
            line += data.count(b"\n")
            last = data.rsplit(b"\n", 1)[-1] if b"\n" in data else last + data
    return f"line {line} column {len(last.decode('utf-8', errors='replace')) + 1}"
