"""What the folders of a system look like that its authors, or Hugging Face's tools, publish."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm import registry
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.published.entries import read_json
from vlm.checkpoints.report import LoadReport
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError

Stream = Callable[[], Iterable[tuple[str, Tensor]]]
"""Reads (name, tensor) pairs, one at a time."""
Load = Callable[[str | Path], Any]
"""`vlm.load`, for artefacts that hold only what their stage trained."""


@dataclass(frozen=True)
class PublishedFolder:
    """What a family is told to know its own folders by.

    Attributes:
        path: folder or hub id.
        keys: names of the tensors.
        config: `config.json`; empty where there is none.
    """

    path: str
    keys: frozenset[str]
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint under our names, carried tensors among them. Families add what they need.

    Attributes:
        shapes: of every tensor.
        stream: reads them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    stream: Stream


class Family(ABC):
    """The published folders of one system: how they are recognised, opened and written.

    Attributes:
        system: its name in `vlm.registry`.
        layouts: what its folders may be, besides ours; the first is that of the release.
        looks_for: what its folders are known by, for messages.
        hub_class: the class of transformers that opens what `vlm export` writes; None: there is none.
        holds_surgery: whether its folders may hold what surgery adds; `open_artefact` checks which.
        holds_adapter: an adapter lies in them beside the weights; elsewhere it is merged.
    """

    system: ClassVar[str]
    layouts: ClassVar[tuple[str, ...]]
    looks_for: ClassVar[str]
    hub_class: ClassVar[str | None] = None
    holds_surgery: ClassVar[bool] = False
    holds_adapter: ClassVar[bool] = False

    @property
    def class_path(self) -> str:
        return registry.SYSTEMS[self.system].class_path

    @abstractmethod
    def claims(self, folder: PublishedFolder) -> bool:
        """Whether a folder is this system's and no other's, by its tensors and its `config.json`."""

    @abstractmethod
    def open(
        self,
        path: str | Path,
        *,
        layout: str = "auto",
        target: str = "ours",
        vision: str | Path | None = None,
        base: str | Path | None = None,
    ) -> Any:
        """Opens and checks a folder or hub id as an `OpenedCheckpoint`; no tensor is read yet.

        Args:
            layout: one of `layouts`, or `auto`.
            target: layout it will be written in.
            vision: where the vision tower lies when the folder does not hold it.
            base: what the folder is a delta over.

        Raises:
            UserError: another system or layout, files that do not fit together, or an entry that is not computed here.
        """

    @abstractmethod
    def open_artefact(self, path: str | Path, *, target: str, load: Load, vision: str | Path | None = None) -> Any:
        """The same of an artefact of ours."""

    @abstractmethod
    def open_complete(self, path: str) -> Any:
        """A folder with every tensor that the network computes with, its tower from elsewhere where it lacks it."""

    @abstractmethod
    def describe(self, opened: Any) -> dict[str, Any]:
        """`class_path` and `init_args` of the system that computes what an opened folder's files say."""

    @abstractmethod
    def carried(self, opened: Any) -> Callable[[str], bool]:
        """Which tensors of an opened checkpoint, by our name, are kept aside instead of being part of the network."""

    @abstractmethod
    def fill(self, folder: Path, opened: Any, *, target: str, template: str | None = None) -> LoadReport:
        """Writes an opened checkpoint into a folder that the caller makes appear, as an artefact or in a layout.

        Args:
            target: one of `layouts`, or `ours`.
            template: of an artefact, instead of the one its system is talked to with.
        """

    @abstractmethod
    def export(self, folder: Path, path: str, *, dtype: torch.dtype | None, load: Load) -> LoadReport:
        """Writes a finished stage for `hub_class`."""

    def memory_table(self, module: Any) -> tuple[Table, Mapping[str, Tensor]]:
        """The names that `hub_class` has in memory, and tensors that it has and our module does not.

        Raises:
            UserError: the class computes something else.
        """
        raise UserError(f"{self.system}: has no class of its own in Hugging Face's tools")

    def surgery(self, opened: Any) -> list[dict[str, Any]]:
        """`class_path` and `init_args` of the surgery that an opened folder's network was trained with."""
        return []


def get_family(system: str) -> Family:
    """The family of a system.

    Raises:
        UserError: nothing was published of it.
    """
    entry = registry.SYSTEMS.get(system)
    if entry is None or entry.family is None:
        known = ", ".join(registry.published_systems())
        raise UserError(f"{system}: no published folders are known of it, only of {known}")
    module, _, name = entry.family.rpartition(".")
    return getattr(importlib.import_module(module), name)()


def look_into(path: str | Path, files: WeightFiles) -> PublishedFolder:
    """A folder as families are told of it."""
    return PublishedFolder(str(path), frozenset(files.keys()), read_json(files.folder / "config.json") or {})


def find_family(folder: PublishedFolder) -> Family:
    """The family that a folder belongs to.

    Raises:
        UserError: none of them claims it, or several do.
    """
    families = [get_family(system) for system in registry.published_systems()]
    found = [family for family in families if family.claims(folder)]
    if len(found) == 1:
        return found[0]
    if found:
        both = " and ".join(f"{family.system} ({family.looks_for})" for family in found)
        raise UserError(f"{folder.path}: looks like a folder of {both}; convert it with --system, which says which")
    looked = "; ".join(f"{family.system}: {family.looks_for}" for family in families)
    raise UserError(
        f"{folder.path}: is no published folder of a system here; looked for {looked}. Is it another system?"
    )


def chained(*streams: Stream) -> Stream:
    """One stream after another."""
    return lambda: (item for stream in streams for item in stream())


def as_dtype(stream: Stream, dtype: torch.dtype | None) -> Stream:
    """Tensors of another type; None keeps each one's own."""
    return stream if dtype is None else lambda: ((name, tensor.to(dtype)) for name, tensor in stream())
