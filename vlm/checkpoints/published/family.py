"""Systems that are published as one folder with all of their parts: what to know of each, and how to open one.

LLaVA and its kin, whose towers may lie elsewhere and whose layouts are many, have `llava_reading` beside this.
"""

import importlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from vlm.checkpoints.files.locate import CARRIED
from vlm.checkpoints.files.weights import WeightFiles, WeightSource
from vlm.checkpoints.published.llava_reading import Stream, chained
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError


class Family(ABC):
    """What a system's published folders look like.

    Attributes:
        system: its name.
        marks: {layout: a tensor that no other system and no other layout has}; the first layout is the published one.
        files: what lies beside the weights, copied along.
        is_known_to_transformers: its library opens the first layout without the release's own code.
    """

    system: ClassVar[str]
    marks: ClassVar[Mapping[str, str]]
    files: ClassVar[tuple[str, ...]]
    is_known_to_transformers: ClassVar[bool] = False

    @abstractmethod
    def table(self, layout: str, config: Mapping[str, Any]) -> Table:
        """Names and contents, there and back.

        Args:
            layout: a key of `marks`.
            config: the published `config.json`.
        """

    @abstractmethod
    def describe(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """`class_path` and `init_args` of the network that computes what the folder's files say.

        Raises:
            UserError: files that do not fit together.
        """

    @abstractmethod
    def config(self, module: Any, layout: str) -> dict[str, Any]:
        """`config.json` of a system of ours that was not published before."""

    def write_files(self, folder: Path, module: Any) -> None:
        """What lies beside the weights, of a system of ours that was not published before."""
        module.codec.tokenizer.save(folder)

    def translated(self, config: Mapping[str, Any], *, source: str, target: str) -> dict[str, Any]:
        """`config.json` of one layout for another; the same where layouts differ in names alone."""
        return dict(config)


FAMILIES = {
    "fuyu": "vlm.checkpoints.published.fuyu.FuyuFamily",
    "qwen_vl": "vlm.checkpoints.published.qwen_vl.QwenVLFamily",
}
"""Where each family is."""


def get_family(system: str) -> Family:
    """The family of a system in `FAMILIES`."""
    module, _, name = FAMILIES[system].rpartition(".")
    return getattr(importlib.import_module(module), name)()


def find_family(keys: Iterable[str]) -> Family | None:
    """The family that a checkpoint's names belong to; None: LLaVA's, or another system."""
    keys = set(keys)
    families = (get_family(system) for system in FAMILIES)
    return next((family for family in families if keys & set(family.marks.values())), None)


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint of a family under our names, carried tensors among them.

    Attributes:
        layout: of the files it was read from; of an artefact, the one it was published in.
        config: `config.json` of that layout.
        stream: reads (name, tensor) pairs, one at a time.
        model: `class_path` and `init_args`.
        write_files: puts what lies beside the weights into a folder.
    """

    layout: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    stream: Callable[[], Iterable[tuple[str, Tensor]]]
    model: Mapping[str, Any]
    write_files: Callable[[Path], None]


def open_family(family: Family, path: str | Path, *, layout: str = "auto") -> OpenedCheckpoint:
    """Opens and checks a published folder or hub id; no tensor is read yet.

    Raises:
        UserError: another system or layout, or files that do not fit together.
    """
    files = WeightFiles(path)
    keys = set(files.keys())
    found = next((name for name, mark in family.marks.items() if mark in keys), None)
    if found is None:
        raise UserError(f"{path}: has no {next(iter(family.marks.values()))}; is it {family.system}? Check --system")
    if layout not in ("auto", found):
        raise UserError(f"{path}: is in the {found} layout, not in {layout!r}")
    config = _read_config(files.folder / "config.json")
    table = family.table(found, config)
    shapes = table.check(files.shapes(), side="theirs")
    stream: Stream = partial(_converted, table, files)
    if (files.folder / CARRIED).exists():
        carried = WeightFiles(files.folder / CARRIED)
        shapes, stream = shapes | carried.shapes(), chained(stream, carried.items)
    model = family.describe(config, files.folder)
    return OpenedCheckpoint(found, config, shapes, stream, model, partial(_copy, files.folder, family.files))


def family_source(family: Family, path: str) -> WeightSource:
    """Every tensor of a published folder that the network computes with, under our names."""
    opened = open_family(family, path)
    table = family.table(opened.layout, opened.config)
    names = frozenset(name for name in opened.shapes if not table.is_carried(name))
    return WeightSource(f"published weights {path}", names, lambda: iter(opened.stream()))


def _copy(source: Path, names: Iterable[str], target: Path) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _converted(table: Table, files: WeightFiles) -> Iterator[tuple[str, Tensor]]:
    return table.stream_to_ours(files.items())


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing; it says the number of heads, which the tensors do not") from error
    except ValueError as error:
        raise UserError(f"{file}: is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no settings; is it the config.json of these weights?")
    return content
