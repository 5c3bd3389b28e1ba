"""Records and JSON files, checked: errors name the file, the sample and the key."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm.data.sources.forms import reader_of
from vlm.errors import Fault, SampleError, UserError, quoted, shorten
from vlm.sample.keys import check_record

Record = Mapping[str, Any]
_LARGEST = 1e9  # of a number that counts pixels or samples


class _Noted(Mapping[str, Any]):
    """A record that notes which of its keys were looked at."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return self.record[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.record)

    def __len__(self) -> int:
        return len(self.record)


class Fields:
    """Values of a record, checked.

    Args:
        record: a JSON object.
        identity: the sample's id, or its place in the file.
        source: the file.

    Raises:
        SampleError: it is no object.
    """

    def __init__(self, record: Any, *, identity: Any, source: str | Path) -> None:
        self.identity, self.source = str(identity), str(source)
        if not isinstance(record, Mapping):
            raise self.error(f"expected a JSON object, found {type(record).__name__}")
        self.record = _Noted(record)

    def check_unread(self, *, has_images: bool) -> None:
        """Refuses keys that mean something and that nobody looked at (`vlm.sample.keys`)."""
        read = self.record.read | {"id"}
        check_record(self.record.record, read=read, has_images=has_images, error=self.error)

    def error(self, message: str, *, kind: Fault | None = None) -> SampleError:
        return SampleError(message, sample_id=self.identity, source=self.source, kind=kind)

    def has(self, key: str) -> bool:
        """Whether there is something under a key."""
        return bool(self.record.get(key))

    def value(self, key: str) -> Any:
        if key not in self.record:
            raise self.error(f"key {key!r} is missing; found {quoted(sorted(map(str, self.record)))}")
        return self.record[key]

    def need(self, key: str, kind: type | tuple[type, ...], what: str) -> Any:
        value = self.value(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(f"{key!r} must be {what}, found {quoted(value)}")
        return value

    def text(self, key: str) -> str:
        value: str = self.need(key, str, "a text")
        if not value.strip():
            raise self.error(f"{key!r} is empty; fill it in or remove the record")
        return value

    def words(self, key: str) -> str:
        """A text that may be empty, missing or null."""
        value = self.record.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(f"{key!r} must be a text, found {quoted(value)}")
        return value or ""

    def texts(self, key: str) -> list[str]:
        values = self.need(key, list, "a list of texts")
        if not values or not all(isinstance(value, str) and value.strip() for value in values):
            raise self.error(
                f"{key!r} must be a list of at least one text and none of them empty, found {quoted(values)}"
            )
        return values

    def number(self, key: str) -> int:
        value: int = self.need(key, int, "a whole number")
        return value

    def length(self, key: str) -> float:
        """A number of pixels, above 0."""
        value = self.value(key)
        if not _is_number(value) or value <= 0:
            raise self.error(f"{key!r} must be a number of pixels above 0, found {quoted(value)}")
        return float(value)

    def numbers(self, key: str, count: int) -> list[float]:
        values = self.need(key, list, f"a list of {count} numbers")
        if len(values) != count or not all(_is_number(value) for value in values):
            raise self.error(f"{key!r} must be a list of {count} numbers, found {quoted(values)}")
        return [float(value) for value in values]

    def objects(self, key: str) -> list["Fields"]:
        values = self.need(key, list, "a list of objects")
        for at, value in enumerate(values):
            if not isinstance(value, Mapping):
                raise self.error(f"{key}[{at}] must be an object, found {quoted(value)}")
        return [Fields(value, identity=self.identity, source=self.source) for value in values]

    def file_name(self, pattern: str, key: str) -> str:
        """The file name that a pattern such as `COCO_val2014_{:012d}.jpg` makes of a value."""
        value = self.value(key)
        try:
            return pattern.format(value)
        except (IndexError, KeyError, ValueError) as error:
            raise self.error(
                f"image_pattern {pattern!r} makes no file name of {quoted(value)} ({error}); give another pattern"
            ) from error

    def answers(self, key: str) -> list[str]:
        """Answers of several people, as texts or as {"answer": text}."""
        entries = self.need(key, list, "a list of answers")
        if not entries:
            raise self.error(f"{key!r} must be a list of answers, found {quoted(entries)}")
        return [
            entry
            if isinstance(entry, str)
            else Fields(entry, identity=self.identity, source=self.source).text("answer")
            for entry in entries
        ]

    def choice(self, letters: str) -> tuple[list[Any], str]:
        """The options under `choices`, and the letter of the one whose place stands under `answer`."""
        choices, answer = self.need("choices", list, "a list of options"), self.value("answer")
        if type(answer) is not int or not 0 <= answer < min(len(choices), len(letters)):
            raise self.error(
                f"'answer' must be the place of one of the {len(choices)} 'choices' (at most {len(letters)}), "
                f"found {quoted(answer)}"
            )
        return choices, letters[answer]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def read_object(path: Path) -> dict[str, Any]:
    """A file that is one JSON object.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except ValueError as error:
        remedy = "fetch it again"
        if "Extra data" in str(error) and (reader := _reader_of_lines(text)):
            remedy = f"its lines have the form that vlm.data.{reader} reads"
        raise UserError(f"{path}: broken JSON ({shorten(str(error))}); {remedy}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply; fetch it again") from error
    if not isinstance(content, dict):
        reader = reader_of(content[0]) if isinstance(content, list) and content else None
        remedy = f"; its records have the form that vlm.data.{reader} reads" if reader else ""
        raise UserError(f"{path}: must be a JSON object, found a {type(content).__name__}{remedy}")
    return content


def _reader_of_lines(text: str) -> str | None:
    try:
        return reader_of(json.loads(text.lstrip().partition("\n")[0]))
    except ValueError:
        return None


def read_list(path: Path, key: str) -> list[Any]:
    """The list under a key of a file that is one JSON object.

    Raises:
        UserError: it cannot be read, or there is no list.
    """
    content = read_object(path)
    found = content.get(key)
    reader = reader_of(content)
    if not isinstance(found, list) or (reader and found and not isinstance(found[0], Mapping)):
        remedy = f"; the file has the form that vlm.data.{reader} reads" if reader else ""
        raise UserError(
            f"{path}: key {key!r} must hold a list of objects; found keys {quoted(sorted(content))}{remedy}"
        )
    return found
