"""Descriptions as plain data in files, and instances of them."""

import copy
import dataclasses
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import FSDPModule

from vlm.checkpoints.artefact import Artefact
from vlm.checkpoints.references import relocated
from vlm.errors import UserError


def describe(value: Any) -> Any:
    """A value as plain data that `instantiate` turns back; descriptions become `class_path` and `init_args`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        arguments = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class_path": public_path(type(value)), "init_args": arguments}
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def public_path(kind: type) -> str:
    """The path under which a class is exported (`vlm.language.CausalLM`), so that files outlive a move of its module.

    A class of ours has one; that of another package is named by its module.
    """
    if kind.__module__.split(".")[0] != "vlm":
        return f"{kind.__module__}.{kind.__qualname__}"
    package = kind.__module__.rpartition(".")[0]
    exported = getattr(importlib.import_module(package), kind.__name__, None)
    assert exported is kind, f"{package} has to export {kind.__name__}: it is written to files"
    return f"{package}.{kind.__name__}"


def system_class(module: Any) -> type:
    """The class of a system as it is written in the code, also when it is sharded (torch makes a subclass then)."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def describe_module(module: Any) -> dict[str, Any]:
    """`class_path` and `init_args` of a system."""
    system = system_class(module)
    return {"class_path": public_path(system), "init_args": describe(module.arguments)}


def instantiate(value: Any) -> Any:
    """The inverse of `describe`.

    Raises:
        UserError: a class outside this package that the caller has not imported: a file must not choose what code runs.
    """
    if isinstance(value, list):
        return [instantiate(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if set(value) != {"class_path", "init_args"}:
        return {key: instantiate(item) for key, item in value.items()}
    module_name, _, name = value["class_path"].rpartition(".")
    if not module_name.startswith("vlm.") and module_name not in sys.modules:
        raise UserError(f"the artefact was made by {value['class_path']}; import {module_name} before loading it")
    factory = getattr(importlib.import_module(module_name), name)
    return factory(**{key: instantiate(item) for key, item in value["init_args"].items()})


def model_of(artefact: Artefact) -> dict[str, Any]:
    """`class_path` and `init_args` of the system an artefact belongs to, with its files where they lie now.

    Its own tokenizer comes before any other.

    Raises:
        UserError: some are nowhere.
    """
    model = relocated(copy.deepcopy(artefact.meta["model"]), artefact)
    if any((artefact.folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        model["init_args"]["tokenizer"]["init_args"]["path"] = str(artefact.folder)
    return model
