"""Classes and types as configurations name them."""

import inspect
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

_SHOWN = 12
_SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


class Parameter(NamedTuple):
    """An argument of a class."""

    hint: Any
    is_required: bool


class Accepted(NamedTuple):
    """What a type hint accepts.

    Attributes:
        members: of a union, None left out.
        classes: those that are named by `class_path`, or given by their arguments.
        items: hint of the entries of a list, if one is accepted.
        values: likewise of what stands under free keys.
    """

    members: list[Any]
    classes: list[type]
    items: Any
    values: Any

    @classmethod
    def by(cls, hint: Any) -> "Accepted":
        members = _members(hint)
        items = [get_args(member)[0] for member in members if _is_sequence(member)]
        values = [get_args(member)[1] for member in members if _is_mapping(member) and len(get_args(member)) == 2]
        return cls(
            members,
            [member for member in members if _is_named_class(member)],
            Union[tuple(items)] if items else None,  # noqa: UP007  (of a list)
            Union[tuple(values)] if values else None,  # noqa: UP007
        )


@cache
def parameters(kind: type) -> dict[str, Parameter]:
    """What the configuration parser takes for a class, those of its bases among them."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    names = [name.split(".")[0] for name in parser.add_class_arguments(kind, fail_untyped=False)]
    found: dict[str, Parameter] = {}
    for owner in kind.__mro__:
        constructor = vars(owner).get("__init__")
        if constructor is None:
            continue
        try:
            hints = get_type_hints(constructor)
        except (NameError, TypeError, AttributeError):  # names that are imported for the type checker alone
            hints = {}
        for name, parameter in inspect.signature(constructor).parameters.items():
            if name in names:
                is_required = parameter.default is inspect.Parameter.empty
                found.setdefault(name, Parameter(hints.get(name, Any), is_required))
    return {name: found.get(name, Parameter(Any, False)) for name in dict.fromkeys(names)}


def find_class(path: str, classes: Sequence[type]) -> type | str:
    """The class of a path or short name, or what is wrong with it."""
    names = names_of(classes)
    wanted = " or ".join(kind.__name__ for kind in classes)
    if "." not in path:
        return names.get(path) or f"no {wanted} is called {path!r}{nearest(path, names)}"
    module_name, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module_name), name)
    except ModuleNotFoundError as error:
        return f"there is no module {error.name!r}{nearest(name, names)}"
    except AttributeError:
        return f"{module_name} has no {name}{nearest(name, names)}"
    if isinstance(kind, type) and not issubclass(kind, tuple(classes)):
        return f"{path} is no {wanted}; there are {some(names)}"
    return kind


def names_of(classes: Sequence[type]) -> dict[str, type]:
    """{short name: class} of everything that may be named for these."""

    def below(kind: type) -> Iterator[type]:
        yield kind
        subclasses: list[type] = kind.__subclasses__()
        for subclass in subclasses:
            yield from below(subclass)

    every = (kind for base in classes for kind in below(base))
    return {
        kind.__name__: kind
        for kind in every
        if not inspect.isabstract(kind) and not kind.__name__.startswith("_") and "<locals>" not in kind.__qualname__
    }


def _members(hint: Any) -> list[Any]:
    if isinstance(hint, TypeVar):
        return [Any]
    if get_origin(hint) in (Union, types.UnionType):
        return [inner for member in get_args(hint) for inner in _members(member)]
    return [] if hint is type(None) else [hint]


def _is_named_class(member: Any) -> bool:
    builtin = getattr(member, "__module__", "") in ("builtins", "pathlib", "datetime", "typing", "collections.abc")
    return isinstance(member, type) and not builtin and not isinstance(member, types.GenericAlias)


def _is_sequence(member: Any) -> bool:
    origin, arguments = get_origin(member), get_args(member)
    if origin is tuple:
        return len(arguments) == 2 and arguments[1] is Ellipsis
    return isinstance(origin, type) and issubclass(origin, Iterable) and not _is_mapping(member) and len(arguments) == 1


def _is_mapping(member: Any) -> bool:
    origin = get_origin(member)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def accepts(hint: Any, value: Any) -> bool:
    """Whether the configuration parser takes a value for a type."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
    except ValueError:
        return True
    try:
        parser.parse_object({"value": value})
    except ArgumentError:
        if not isinstance(value, str):
            return False
        try:
            parser.parse_args([f"--value={value}"])
        except ArgumentError:
            return False
    return True


def words_of(members: Sequence[Any]) -> str:
    """What the members of a union are, for people."""
    found: list[str] = []
    for member in members:
        if get_origin(member) is Literal:
            found += map(str, get_args(member))
        elif _is_sequence(member) or get_origin(member) is tuple:
            found.append("a list")
        elif _is_mapping(member) or member is dict:
            found.append("keys")
        else:
            found.append(_SCALARS.get(member, getattr(member, "__name__", str(member))))
    *others, last = dict.fromkeys(found)
    return f"{', '.join(others)} or {last}" if others else last


def nearest(name: Any, known: Iterable[str]) -> str:
    """The end of a sentence that names the likeliest one; empty where none is close."""
    lower = {str(one).lower(): str(one) for one in known}
    close = get_close_matches(str(name).lower(), list(lower), n=1, cutoff=0.6)
    return f"; did you mean {lower[close[0]]}?" if close else ""


def some(names: Iterable[str]) -> str:
    """The first of them, and how many more there are."""
    listed = sorted(names)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


def show(value: Any) -> str:
    """A value, cut off where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
