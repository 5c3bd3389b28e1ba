"""A resume checkpoint, looked at as the artefact that its stage would leave now."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.checkpoints.artefact import DEFAULTS, Artefact, check_system, read_artefact
from vlm.checkpoints.files.identity import fingerprint_of, hash_tensor
from vlm.checkpoints.resume.sharded import STATE, ShardedFile
from vlm.checkpoints.resume.single_file import read_file
from vlm.errors import UserError

RECORD = "stage"
"""Key of what a checkpoint says about itself: the contents of `stage.json`, paths relative to the run folder."""


def is_checkpoint(path: str | Path) -> bool:
    """Whether this is a checkpoint, of one file or sharded."""
    path = Path(path)
    return (path / STATE).is_file() if path.is_dir() else path.suffix == ".ckpt" and path.is_file()


def read_trained(path: str | Path, *, system: str | Collection[str] | None = None) -> Artefact:
    """An artefact, or a checkpoint as one.

    Args:
        system: as in `read_artefact`.

    Raises:
        UserError: what `read_artefact` raises; a checkpoint that is damaged, gone, or does not say what it holds.
    """
    if not is_checkpoint(path):
        return read_artefact(path, system=system)
    opened = _read_checkpoint(Path(path))
    check_system(opened, system)
    return opened


@dataclass(frozen=True)
class OpenedCheckpoint(Artefact):
    """What a checkpoint holds of the network: where there are moving averages, these, as an artefact does.

    It is read where it lies, so a training that goes on and removes it meanwhile does not disturb.
    """

    tensors: "Tensors"

    @property
    def base(self) -> Path:
        return self.run

    @property
    def run(self) -> Path:
        place = next((folder for folder in self.folder.parents if folder.name == "checkpoints"), self.folder)
        return place.parent

    @property
    def fingerprint(self) -> str:
        own = {f"tensors/{name}": hash_tensor(tensor) for name, tensor in self.tensors.items()}
        frozen = {f"frozen/{part}": str(entry.get("fingerprint")) for part, entry in self.meta["frozen"].items()}
        return fingerprint_of(own | frozen)

    @cached_property
    def weights(self) -> Any:
        return self.tensors


@dataclass(frozen=True)
class Tensors:
    """Tensors by name, one at a time, as `WeightFiles` gives them."""

    entries: Mapping[str, Any]
    read: Callable[[Any], Tensor]

    def keys(self) -> list[str]:
        return list(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def get(self, name: str) -> Tensor:
        return self.read(self.entries[name])

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.entries:
            yield name, self.get(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.items()}


def _read_checkpoint(path: Path) -> OpenedCheckpoint:
    read: Callable[[Any], Any]
    if path.is_dir():
        opened = ShardedFile(path)
        content, read = opened.content, opened.read
    else:
        content, read = read_file(path, mmap=True), lambda tensor: tensor
    record = content.get(RECORD)
    if record is None:
        raise UserError(
            f"{path}: does not say which system it holds, as checkpoints of this version do; go on with its run, which "
            "saves another one"
        )
    entries = {**content["state_dict"], **content.get("averages", {})}
    # the content of what training changes is hashed when it is asked for
    meta = {**DEFAULTS, **record, "tensors": dict.fromkeys(entries, ""), "carried": {}, "moments": {}}
    return OpenedCheckpoint(path, meta, Tensors(entries, read))
