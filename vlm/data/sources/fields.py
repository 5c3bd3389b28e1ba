"""Records and JSON files, checked: errors name the file, the sample and the key."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.errors import Fault, SampleError, UserError

Record = Mapping[str, Any]


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
        self.record: Record = record

    def error(self, message: str, *, kind: Fault | None = None) -> SampleError:
        return SampleError(message, sample_id=self.identity, source=self.source, kind=kind)

    def has(self, key: str) -> bool:
        """Whether there is something under a key."""
        return bool(self.record.get(key))

    def value(self, key: str) -> Any:
        if key not in self.record:
            raise self.error(f"key {key!r} is missing; found {sorted(map(str, self.record))}")
        return self.record[key]

    def need(self, key: str, kind: type | tuple[type, ...], what: str) -> Any:
        value = self.value(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(f"{key!r} must be {what}, found {value!r}")
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
            raise self.error(f"{key!r} must be a text, found {value!r}")
        return value or ""

    def texts(self, key: str) -> list[str]:
        values = self.need(key, list, "a list of texts")
        if not values or not all(isinstance(value, str) and value.strip() for value in values):
            raise self.error(f"{key!r} must be a list of at least one text and none of them empty, found {values!r}")
        return values

    def number(self, key: str) -> int:
        value: int = self.need(key, int, "a whole number")
        return value

    def numbers(self, key: str, count: int) -> list[float]:
        values = self.need(key, list, f"a list of {count} numbers")
        if len(values) != count or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            raise self.error(f"{key!r} must be a list of {count} numbers, found {values!r}")
        return [float(value) for value in values]

    def objects(self, key: str) -> list["Fields"]:
        values = self.need(key, list, "a list of objects")
        for at, value in enumerate(values):
            if not isinstance(value, Mapping):
                raise self.error(f"{key}[{at}] must be an object, found {value!r}")
        return [Fields(value, identity=self.identity, source=self.source) for value in values]

    def file_name(self, pattern: str, key: str) -> str:
        """The file name that a pattern such as `COCO_val2014_{:012d}.jpg` makes of a value."""
        value = self.value(key)
        try:
            return pattern.format(value)
        except (IndexError, KeyError, ValueError) as error:
            raise self.error(
                f"image_pattern {pattern!r} makes no file name of {value!r} ({error}); give another pattern"
            ) from error

    def answers(self, key: str) -> list[str]:
        """Answers of several people, as texts or as {"answer": text}."""
        entries = self.need(key, list, "a list of answers")
        if not entries:
            raise self.error(f"{key!r} must be a list of answers, found {entries!r}")
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
                f"found {answer!r}"
            )
        return choices, letters[answer]


def read_object(path: Path) -> dict[str, Any]:
    """A file that is one JSON object.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except ValueError as error:
        raise UserError(f"{path}: broken JSON ({error}); fetch it again") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply; fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object, found a {type(content).__name__}")
    return content


def read_list(path: Path, key: str) -> list[Any]:
    """The list under a key of a file that is one JSON object.

    Raises:
        UserError: it cannot be read, or there is no list.
    """
    content = read_object(path)
    if not isinstance(content.get(key), list):
        raise UserError(f"{path}: key {key!r} must hold a list; found keys {sorted(content)[:8]}")
    return content[key]
