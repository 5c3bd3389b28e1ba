"""What is wrong with a configuration: the file, the key, and the nearest one that there is.

The configuration parser refuses what it does not know, but says so by all types that a value could have had. Here the
same configuration is walked along the same types, to name the first key that does not fit.
"""

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from vlm.command_line.config_types import (
    Accepted,
    accepts,
    find_class,
    names_of,
    nearest,
    parameters,
    show,
    some,
    words_of,
)
from vlm.command_line.layers import CLASS_KEYS, Layer, merged


class Section(NamedTuple):
    """A key at the top of a configuration.

    Attributes:
        kind: the class whose arguments stand there, or whose subclasses are named there.
        is_class: a class is named.
    """

    kind: type
    is_class: bool = False


class Fault(NamedTuple):
    """Attributes:

    text: the key, what is wrong with it, and what to do.
    is_lost: nobody knows the key, and the parser drops it because nothing stands below.
    """

    text: str
    is_lost: bool = False


def find_fault(layers: Sequence[Layer], sections: Mapping[str, Section], others: Iterable[str]) -> str | None:
    """The first key that does not fit, in one line.

    Args:
        others: keys at the top that are no sections.
    """
    return next((text for text, _ in _faults(layers, sections, others)), None)


def find_lost_key(layers: Sequence[Layer], sections: Mapping[str, Section], others: Iterable[str]) -> str | None:
    """The first key that the parser would drop in silence: nobody knows it, and nothing stands below."""
    if not any(_has_empty(layer.content) for layer in layers):
        return None
    return next((text for text, is_lost in _faults(layers, sections, others) if is_lost), None)


def _has_empty(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not value or any(map(_has_empty, value.values()))
    return isinstance(value, list) and any(map(_has_empty, value))


def _faults(layers: Sequence[Layer], sections: Mapping[str, Section], others: Iterable[str]) -> Iterator[Fault]:
    below: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.content.items():
            for fault in _of_key(key, value, below.get(key), sections, others):
                yield fault._replace(text=f"{layer.origin}: {fault.text}")
        below = merged(below, layer.content)
    for key, section in sections.items():
        origins = [f"{layer.origin}: " for layer in layers if key in layer.content]
        for text in _missing_in_section(below.get(key), section, key):
            yield Fault(f"{origins[-1] if origins else ''}{text}")


def _of_key(
    key: str, value: Any, below: Any, sections: Mapping[str, Section], others: Iterable[str]
) -> Iterator[Fault]:
    if key not in sections:
        if key not in others:
            yield _unknown(key, value, [*sections, *others], of="a configuration")
    elif sections[key].is_class:
        yield from _of_class(value, [sections[key].kind], key, below)
    elif isinstance(value, Mapping):
        yield from _of_arguments(value, sections[key].kind, key, below)
    elif value is not None and not isinstance(value, str):  # text: a file of this section
        yield Fault(f"{key}: expects keys such as {some(parameters(sections[key].kind))}; found {show(value)}")


def _of_value(value: Any, hint: Any, key: str, below: Any) -> Iterator[Fault]:
    accepted = Accepted.by(hint)
    if value is None or not accepted.members or Any in accepted.members:
        return
    if isinstance(value, list) and accepted.items is not None:
        kept = below if isinstance(below, list) else []
        for n, item in enumerate(value):
            yield from _of_value(item, accepted.items, f"{key}[{n}]", kept[n] if n < len(kept) else None)
    elif isinstance(value, Mapping) and accepted.values is not None and "class_path" not in value:
        for name, item in value.items():
            old = below.get(name) if isinstance(below, Mapping) else None
            yield from _of_value(item, accepted.values, f"{key}.{name}", old)
    elif isinstance(value, Mapping) and isinstance(below, (list, str)) and "class_path" not in value:
        return  # an option of the last entry, as in --trainer.callbacks.patience
    elif accepted.classes and (isinstance(value, Mapping) or (isinstance(value, str) and not accepts(hint, value))):
        yield from _of_class(value, accepted.classes, key, below)
    elif accepts(hint, value):
        return
    elif accepted.items is not None and isinstance(value, Mapping):
        yield Fault(f"{key}: is a list; put a dash before each entry")
    else:
        choices = [str(one) for member in accepted.members if get_origin(member) is Literal for one in get_args(member)]
        yield Fault(f"{key}: expects {words_of(accepted.members)}, found {show(value)}{nearest(value, choices)}")


def _of_class(value: Any, classes: Sequence[type], key: str, below: Any) -> Iterator[Fault]:
    """A value that names a class, or holds the arguments of one."""
    if value is None:
        return
    if not isinstance(value, (str, Mapping)):
        wanted = " or ".join(kind.__name__ for kind in classes)
        yield Fault(f"{key}: expects {wanted} by class_path and init_args, found {show(value)}")
        return
    value, below = ({"class_path": one} if isinstance(one, str) else one for one in (value, below))
    below = below if isinstance(below, Mapping) else {}
    kind = _class_of(value, classes, default=below.get("class_path"))
    if isinstance(kind, str):
        yield Fault(f"{key}.class_path: {kind}")
        return
    if kind is None:
        yield Fault(f"{key}: has no class_path; name one of {some(names_of(classes))}")
        return
    if "class_path" in value and (stray := [name for name in value if name not in CLASS_KEYS]):
        yield Fault(f"{key}.{stray[0]}: stands beside class_path; arguments of {kind.__name__} go below init_args")
        return
    inner = value.get("init_args") or {}
    if not isinstance(inner, Mapping):
        yield Fault(f"{key}.init_args: expects the arguments of {kind.__name__} as keys, found {show(inner)}")
        return
    yield from _of_arguments(_arguments(value), kind, _place(value, key), below.get("init_args", below))


def _of_arguments(arguments: Mapping[str, Any], kind: type, key: str, below: Any) -> Iterator[Fault]:
    known, below = parameters(kind), below if isinstance(below, Mapping) else {}
    for written, value in arguments.items():
        name = str(written).removesuffix("+")
        if name in known:
            yield from _of_value(value, known[name].hint, f"{key}.{name}", below.get(name))
        else:
            yield _unknown(f"{key}.{name}", value, known, of=kind.__name__)


# -- what has to be there


def _missing_in_section(value: Any, section: Section, key: str) -> Iterator[str]:
    if not section.is_class:
        yield from _missing_arguments(value if isinstance(value, Mapping) else {}, section.kind, key)
    elif value is None:
        yield f"{key}: is not given; name one of {some(names_of([section.kind]))}, in a file or by --{key}"
    else:
        yield from _missing_in_class(value, [section.kind], key)


def _missing_in_class(value: Any, classes: Sequence[type], key: str) -> Iterator[str]:
    value = {"class_path": value} if isinstance(value, str) else value
    if isinstance(value, Mapping) and isinstance(kind := _class_of(value, classes), type):
        yield from _missing_arguments(_arguments(value), kind, _place(value, key))


def _missing_arguments(arguments: Mapping[str, Any], kind: type, key: str) -> Iterator[str]:
    for name, parameter in parameters(kind).items():
        value, accepted = arguments.get(name), Accepted.by(parameter.hint)
        if value is None and parameter.is_required:
            yield f"{key}.{name}: is not given; {kind.__name__} needs it"
        elif isinstance(value, list) and accepted.items is not None:
            for n, item in enumerate(value):
                yield from _missing_in_class(item, Accepted.by(accepted.items).classes, f"{key}.{name}[{n}]")
        elif isinstance(value, (str, Mapping)) and accepted.classes:
            yield from _missing_in_class(value, accepted.classes, f"{key}.{name}")


# -- a class as it is written


def _class_of(value: Mapping[str, Any], classes: Sequence[type], *, default: Any = None) -> type | str | None:
    """The class that is named, or the one there can be; text: what is wrong with the name."""
    if (path := value.get("class_path", default)) is not None:
        return find_class(str(path), classes)
    kinds = [kind for kind in classes if not inspect.isabstract(kind)]
    is_spelled = any(name in value for name in CLASS_KEYS)
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind) or not is_spelled), None)


def _arguments(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if name not in CLASS_KEYS} | (value.get("init_args") or {})


def _place(value: Mapping[str, Any], key: str) -> str:
    return f"{key}.init_args" if any(name in value for name in CLASS_KEYS) else key


def _unknown(key: str, value: Any, known: Iterable[str], *, of: str) -> Fault:
    """The key as it is written, and the nearest one that there is."""
    close = nearest(key.rpartition(".")[2], known) or f"; {of} has {some(known)}"
    return Fault(f"{key}: unknown key{close}", is_lost=value == {})
