"""The configuration as the user wrote it: files and options, one after another."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vlm.errors import UserError
from vlm.recipes.unique_keys import UniqueKeys

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


class Layer(NamedTuple):
    """A file, or the options of the command line.

    Attributes:
        origin: the file, or "command line".
        content: as nested keys.
    """

    origin: str
    content: dict[str, Any]


def read_layers(options: Sequence[str]) -> list[Layer]:
    """Files and options in the order in which they come over each other.

    Raises:
        UserError: a file that is not there, is no YAML, or holds no keys.
    """
    layers: list[Layer] = []
    for name, value in _pairs(options):
        if name in ("-c", "--config") and value.lstrip().startswith("{"):  # the settings themselves
            layers.append(Layer("command line", _parsed(value)))
        elif name in ("-c", "--config"):
            layers.append(Layer(value, _read_file(Path(value).expanduser())))
        elif name.startswith("--") and not name.endswith((".help", "--help")):
            layers.append(Layer("command line", _nested(name[2:].removesuffix("+"), _parsed(value))))
    return layers


def _pairs(options: Sequence[str]) -> Iterable[tuple[str, str]]:
    at = 0
    while at < len(options):
        name, is_joined, value = options[at].partition("=")
        follows = options[at + 1] if at + 1 < len(options) else "--"
        if name.startswith("-") and not is_joined and not follows.startswith("--") and follows != "-c":
            at += 1
            value = follows
        at += 1
        yield name, value


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; correct the path after -c") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{path}: {where}is no YAML ({reason}); correct it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); -c takes a YAML file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no keys; a configuration has model, data, trainer or stage at its top")
    return content


def _parsed(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merged(below: Any, above: Any) -> Any:
    """One value over another, key by key, and entry by entry.

    Another class keeps the arguments of the one before it, as jsonargparse keeps those that it has too.
    """
    if isinstance(below, list) and isinstance(above, list):
        return [merged(below[n] if n < len(below) else None, item) for n, item in enumerate(above)]
    if isinstance(below, str) and isinstance(above, Mapping):
        below = {"class_path": below}
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    below = dict(below)
    named = {key.removesuffix("+"): value for key, value in above.items()}
    return below | {key: merged(below.get(key), value) for key, value in named.items()}
