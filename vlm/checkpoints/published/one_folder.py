"""Systems that are published as one folder with all of their parts."""

import json
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm.checkpoints.artefact import fill_artefact
from vlm.checkpoints.files.locate import CARRIED
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.files.writing import SHARD_BYTES, divert, write_safetensors
from vlm.checkpoints.published.entries import read_config_json
from vlm.checkpoints.published.family import (
    Family,
    Load,
    OpenedCheckpoint,
    PublishedFolder,
    Stream,
    as_dtype,
    chained,
)
from vlm.checkpoints.report import LoadReport
from vlm.checkpoints.resume.opened import read_trained
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError
from vlm.language.surgery import refuse_changed


@dataclass(frozen=True)
class OpenedFolder(OpenedCheckpoint):
    """A checkpoint with its settings.

    Attributes:
        layout: of the files it was read from; of an artefact, the one it is opened for.
        config: `config.json` of that layout.
        model: `class_path` and `init_args`.
        write_files: puts what lies beside the weights into a folder.
    """

    layout: str
    config: Mapping[str, Any]
    model: Mapping[str, Any]
    write_files: Callable[[Path], None]


class OneFolderFamily(Family):
    """A family whose folders hold every part.

    Attributes:
        marks: {layout: a tensor that no other layout has}.
        files: what lies beside the weights, copied along.
    """

    holds_surgery = True

    marks: ClassVar[Mapping[str, str]]
    files: ClassVar[tuple[str, ...]]

    @abstractmethod
    def is_own(self, config: Mapping[str, Any]) -> bool:
        """Whether a `config.json` beside tensors of this family's names is of this system."""

    @abstractmethod
    def table(self, layout: str, config: Mapping[str, Any]) -> Table:
        """Names and contents, there and back.

        Args:
            layout: a key of `marks`.
            config: the published `config.json`.
        """

    @abstractmethod
    def describe_folder(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
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

    def surgery_of(self, config: Mapping[str, Any]) -> list[dict[str, Any]]:
        """`surgery`, by a `config.json`."""
        return []

    def read_config(self, files: WeightFiles, path: str | Path) -> dict[str, Any]:
        """`config.json` beside the tensors, or what they say themselves.

        Raises:
            UserError: there is none.
        """
        return read_config_json(files.folder)

    # -- what every family does

    @property
    def layouts(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.marks)

    @property
    def looks_for(self) -> str:  # type: ignore[override]
        return f"{' or '.join(self.marks.values())}, and its config.json"

    def claims(self, folder: PublishedFolder) -> bool:
        return any(mark in folder.keys for mark in self.marks.values()) and self.is_own(folder.config)

    def open(
        self,
        path: str | Path,
        *,
        layout: str = "auto",
        target: str = "ours",
        vision: str | Path | None = None,
        base: str | Path | None = None,
    ) -> OpenedFolder:
        self._check_whole(vision, base)
        files = WeightFiles(path)
        keys = set(files.keys())
        found = next((name for name, mark in self.marks.items() if mark in keys), None)
        if found is None:
            raise UserError(f"{path}: has no {next(iter(self.marks.values()))}; is it {self.system}? Check --system")
        if layout not in ("auto", found):
            raise UserError(f"{path}: is in the {found} layout, not in {layout!r}")
        config = self.read_config(files, path)
        if not self.is_own(config):
            raise UserError(f"{path}: its config.json is not that of {self.system}; check --system")
        table = self.table(found, config)
        shapes = table.check(files.shapes(), side="theirs")
        stream: Stream = partial(_converted, table, files)
        if (files.folder / CARRIED).exists():
            carried = WeightFiles(files.folder / CARRIED)
            shapes, stream = shapes | carried.shapes(), chained(stream, carried.items)
        model = self.describe_folder(config, files.folder)
        return OpenedFolder(shapes, stream, found, config, model, partial(_copy, files.folder, self.files))

    def open_artefact(
        self, path: str | Path, *, target: str, load: Load, vision: str | Path | None = None
    ) -> OpenedFolder:
        """A converted checkpoint tensor by tensor, a trained stage as `load` opens it."""
        self._check_whole(vision)
        if target == "ours":
            raise UserError(f"{path}: is an artefact of ours already; name a published layout with --to")
        artefact = read_trained(path, system=self.system)
        model = artefact.meta["model"]
        if published := artefact.meta.get("published"):
            config = self.translated(published["config"], source=published["layout"], target=target)
            shapes = artefact.weights.shapes() | {name: tuple(t.shape) for name, t in artefact.carried.items()}
            stream = chained(artefact.items, artefact.carried.items)
            return OpenedFolder(shapes, stream, target, config, model, partial(_copy, artefact.folder, self.files))
        module = load(path)
        config = self.config(module, target)
        known = {spec["class_path"].rpartition(".")[2] for spec in self.surgery_of(config)}
        changed = [operation for operation in module.surgery if operation.has_changed(module)]
        refuse_changed([operation for operation in changed if type(operation).__name__ not in known], path)
        tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return OpenedFolder(shapes, tensors.items, target, config, model, partial(self.write_files, module=module))

    def open_complete(self, path: str) -> OpenedFolder:
        return self.open(path)

    def describe(self, opened: OpenedFolder) -> dict[str, Any]:
        return dict(opened.model)

    def carried(self, opened: OpenedFolder) -> Callable[[str], bool]:
        return self.table(opened.layout, opened.config).is_carried

    def surgery(self, opened: OpenedFolder) -> list[dict[str, Any]]:
        return self.surgery_of(opened.config)

    def fill(self, folder: Path, opened: OpenedFolder, *, target: str, template: str | None = None) -> LoadReport:
        if target == "ours":
            report = self._fill_ours(folder, opened, template=template)
        else:
            report = self._fill_published(folder, opened, layout=target)
        opened.write_files(folder)
        return report

    def export(self, folder: Path, path: str, *, dtype: torch.dtype | None, load: Load) -> LoadReport:
        layout = self.layouts[0]
        opened = self.open_artefact(path, target=layout, load=load)
        return self.fill(folder, replace(opened, stream=as_dtype(opened.stream, dtype)), target=layout)

    def _check_whole(self, *elsewhere: str | Path | None) -> None:
        if any(path is not None for path in elsewhere):
            raise UserError(f"{self.system}: is published whole; leave out --vision and --base")

    def _fill_ours(self, folder: Path, opened: OpenedFolder, *, template: str | None) -> LoadReport:
        carried: dict[str, Tensor] = {}
        arguments = {**opened.model["init_args"], **({} if template is None else {"template": template})}
        tokenizer = arguments["tokenizer"]
        arguments["tokenizer"] = tokenizer | {"init_args": tokenizer["init_args"] | {"path": "."}}
        meta = {
            "system": self.system,
            "stage": "published",
            "global_step": 0,
            "model": {"class_path": opened.model["class_path"], "init_args": arguments},
            "surgery": self.surgery(opened),
            "published": {"layout": opened.layout, "config": opened.config},
        }
        stream = divert(opened.stream(), self.carried(opened), carried)
        fill_artefact(folder, tensors=stream, meta=meta, carried=carried, max_shard_bytes=SHARD_BYTES)
        return LoadReport(loaded=[name for name in opened.shapes if name not in carried], carried=list(carried))

    def _fill_published(self, folder: Path, opened: OpenedFolder, *, layout: str) -> LoadReport:
        config = self.translated(opened.config, source=opened.layout, target=layout)
        table = self.table(layout, config)
        kept = {n: shape for n, shape in opened.shapes.items() if table.has_place(n) or not table.is_carried(n)}
        table.check(kept, side="ours")
        beside: dict[str, Tensor] = {}
        stream = divert(opened.stream(), lambda name: name not in kept, beside)
        write_safetensors(folder / "model.safetensors", table.stream_from_ours(stream), max_shard_bytes=SHARD_BYTES)
        if beside:
            write_safetensors(folder / CARRIED, beside.items())
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        carried = [name for name in opened.shapes if table.is_carried(name)]
        return LoadReport(loaded=[name for name in opened.shapes if name not in carried], carried=carried)


def _copy(source: Path, names: Iterable[str], target: Path) -> None:
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _converted(table: Table, files: WeightFiles) -> Iterator[tuple[str, Tensor]]:
    return table.stream_to_ours(files.items())
