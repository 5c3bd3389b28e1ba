"""What a finished stage hands on: a folder with its tensors and `stage.json`, which says what they are.

::

    artefact/
      stage.json             system, stage, step, model, surgery, hashes (see `META_KEYS`)
      model.safetensors      the stage's tensors under our names (or shards with an index)
      carried.safetensors    published tensors the computation never uses (only where there are any)
      optimizer/             the optimizer's moments, for a stage that continues this one (only where it was asked for)

Nothing is ever told from the name of the folder.
"""

import importlib.metadata
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.checkpoints.files.atomic import atomic_directory
from vlm.checkpoints.files.identity import fingerprint_of, hash_tensor
from vlm.checkpoints.files.locate import CARRIED, preview
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.files.writing import write_safetensors
from vlm.errors import UserError

FORMAT = 1
"""Version of the folder's format; raised when an older reader would misread it."""

FOLLOWED = "what it follows"
"""How an artefact names the source of frozen parts that those it follows brought."""
STAGE_FILE = "stage.json"
_WEIGHTS = "model.safetensors"
_MOMENTS = "optimizer/moments.safetensors"
_MOMENTS_SHARD_BYTES = 5_000_000_000
_LIBRARIES = ("torch", "lightning", "transformers", "timm", "peft", "safetensors")

META_KEYS = {
    "system": "name of the system",
    "stage": "name of the stage, or 'published' for converted weights",
    "global_step": "optimizer steps done in the stage and in those it continues",
    "model": "{class_path, init_args} that builds the network",
    "surgery": "list of what was done to it, in order",
    "trained": "names of the parameters the stage trained",
    "averaged": "whether these are moving averages; the moments then come with what training goes on with",
    "frozen": "part -> {source, fingerprint}: tensors that are not in this folder",
    "ties": "alias -> owner: one tensor under two names, stored once",
    "follows": "list of {path, absolute, fingerprint, parts, leave_out, merge} of the artefacts it started from",
    "precision": "trainer.precision of the training, null where there was no trainer",
    "shortened": "what cut the training short, null for one of its whole length",
    "paths": "path in `model` as it is written -> the same, relative to this folder and absolute",
}
_REQUIRED = ("system", "stage", "global_step", "model")
DEFAULTS: Mapping[str, Any] = {"surgery": [], "trained": [], "frozen": {}, "ties": {}, "follows": []}
"""What a key of `stage.json` is where a stage has nothing to say."""


@dataclass(frozen=True)
class Artefact:
    """An artefact on disk; its tensors are read when asked for.

    Attributes:
        folder: where it lies.
        meta: contents of `stage.json`: `META_KEYS`, and `format`, `versions`, and name -> hash of what is stored:
            `tensors`, `carried`, `moments`.
    """

    folder: Path
    meta: Mapping[str, Any]

    @property
    def base(self) -> Path:
        """Folder that the paths in `meta` are relative to."""
        return self.folder

    @property
    def run(self) -> Path:
        """Folder of the run that made it."""
        return self.folder.parent

    @property
    def fingerprint(self) -> str:
        """Identity of its contents: own tensors and carried ones, and the frozen ones it refers to."""
        frozen = {f"frozen/{part}": str(entry.get("fingerprint")) for part, entry in self.meta["frozen"].items()}
        own = {f"{kind}/{name}": value for kind in ("tensors", "carried") for name, value in self.meta[kind].items()}
        return fingerprint_of(own | frozen)

    @cached_property
    def weights(self) -> WeightFiles:
        return WeightFiles(self.folder)

    @cached_property
    def carried(self) -> Mapping[str, Tensor]:
        """The carried tensors by our names; empty where there are none."""
        return dict(WeightFiles(self.folder / CARRIED).items()) if self.meta["carried"] else {}

    @property
    def moments(self) -> WeightFiles:
        """The optimizer's state as `parameter name/state name` (see `vlm.checkpoints.resume.moments`).

        Raises:
            UserError: the stage did not keep it.
        """
        if not self.meta.get("moments"):
            raise UserError(
                f"{self.folder}: holds no optimizer moments to continue with; "
                "train its stage again with stage.keep_optimizer: true"
            )
        return WeightFiles((self.folder / _MOMENTS).parent)

    def items(self, *, verify: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(our name, tensor) one at a time.

        Args:
            verify: compare each tensor with its hash.

        Raises:
            UserError: a tensor is not what was written.
        """
        for name, tensor in self.weights.items():
            if verify:
                self._verify(name, tensor, self.meta["tensors"])
            yield name, tensor

    def verify(self) -> None:
        """Reads every tensor and compares it with its hash.

        Raises:
            UserError: a tensor is not what was written.
        """
        for _ in self.items(verify=True):
            pass
        for name, tensor in self.carried.items():
            self._verify(name, tensor, self.meta["carried"])

    def _verify(self, name: str, tensor: Tensor, hashes: Mapping[str, str]) -> None:
        if hash_tensor(tensor) != hashes[name]:
            raise UserError(f"{self.folder}: tensor {name!r} is not the one that was written; make the artefact again")


def write_artefact(
    folder: str | Path,
    *,
    tensors: Iterable[tuple[str, Tensor]],
    meta: Mapping[str, Any],
    carried: Mapping[str, Tensor] | None = None,
    moments: Iterable[tuple[str, Tensor]] | None = None,
    max_shard_bytes: int | None = None,
) -> Artefact:
    """Writes an artefact as a whole: it is complete or not there, and an older one is replaced in one step.

    Args:
        folder: where it goes.
        tensors: (our name, tensor), on any device and sharded or not; owners of ties only, read once.
        meta: see `META_KEYS`; further keys are kept.
        carried: published tensors the computation never uses, by our names.
        moments: the optimizer's state, read once, after `tensors`.
        max_shard_bytes: see `write_safetensors`.

    Raises:
        UserError: the disk is full, or the folder holds something else than an artefact, which would be lost.
    """
    folder = Path(folder)
    if folder.is_dir() and not (folder / STAGE_FILE).exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds other files, which the artefact would replace; give another folder")
    with atomic_directory(folder) as temporary:
        fill_artefact(
            temporary, tensors=tensors, meta=meta, carried=carried, moments=moments, max_shard_bytes=max_shard_bytes
        )
    return read_artefact(folder)


def fill_artefact(
    folder: Path,
    *,
    tensors: Iterable[tuple[str, Tensor]],
    meta: Mapping[str, Any],
    carried: Mapping[str, Tensor] | None = None,
    moments: Iterable[tuple[str, Tensor]] | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """The files of `write_artefact` into a folder that the caller makes appear (`atomic_directory`)."""
    assert not (lost := [key for key in _REQUIRED if key not in meta]), f"stage.json needs {lost}"
    hashes: dict[str, str] = {}
    write_safetensors(folder / _WEIGHTS, tensors, max_shard_bytes=max_shard_bytes, hashes=hashes)
    assert not (both := hashes.keys() & meta.get("ties", {}).keys()), f"aliases are stored once, as their owner: {both}"
    carried = {} if carried is None else carried  # only looked at here: a reader of `tensors` may have filled it
    if carried:
        write_safetensors(folder / CARRIED, carried.items())
    moment_hashes: dict[str, str] = {}
    if moments is not None:
        path = folder / _MOMENTS
        write_safetensors(path, moments, max_shard_bytes=_MOMENTS_SHARD_BYTES, hashes=moment_hashes)
    content = {
        **DEFAULTS,
        **meta,
        "format": FORMAT,
        "tensors": hashes,
        "carried": {name: hash_tensor(tensor) for name, tensor in carried.items()},
        "moments": moment_hashes,
        "versions": _versions(),
    }
    (folder / STAGE_FILE).write_text(json.dumps(content, indent=2) + "\n")


def read_artefact(folder: str | Path, *, system: str | Collection[str] | None = None) -> Artefact:
    """Opens an artefact and checks everything that costs no tensor data.

    Args:
        system: the system it has to be of, or several; a recipe that follows another system names it.

    Raises:
        UserError: no artefact, half of one, one of another format or system, or files that do not fit together.
    """
    folder = Path(folder)
    file = folder / STAGE_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run the stage before it first, or correct the path")
    if not file.exists():
        raise UserError(
            f"{folder}: has no {STAGE_FILE}, so it is no artefact of a stage; give the `artefact` folder of a finished "
            "stage, or convert published weights with `vlm convert`"
        )
    try:
        meta = json.loads(file.read_text())
        assert isinstance(meta, dict)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{file}: is not readable JSON; make the artefact again") from error
    if meta.get("format") != FORMAT:
        raise UserError(
            f"{file}: has format {meta.get('format')!r}, this version reads {FORMAT}; update or make it again"
        )
    if lost := [key for key in (*_REQUIRED, *DEFAULTS, "tensors", "carried") if key not in meta]:
        raise UserError(f"{file}: lacks {preview(lost)}; make the artefact again")
    artefact = Artefact(folder, meta)
    check_system(artefact, system)
    if meta["tensors"].keys() != set(artefact.weights.keys()):
        different = meta["tensors"].keys() ^ set(artefact.weights.keys())
        raise UserError(
            f"{folder}: {preview(sorted(different))} only in one of {STAGE_FILE} and the weights; make it again"
        )
    if meta["carried"] and not (folder / CARRIED).exists():
        raise UserError(f"{folder}: {CARRIED} is missing; make the artefact again")
    return artefact


def check_system(artefact: Artefact, system: str | Collection[str] | None) -> None:
    """Refuses an artefact of a system that is not asked for; None asks for any."""
    allowed = {system} if isinstance(system, str) else set(system or ())
    if allowed and artefact.meta["system"] not in allowed:
        raise UserError(
            f"{artefact.folder}: is an artefact of {artefact.meta['system']!r}, expected "
            f"{' or '.join(sorted(allowed))}; a recipe has to name another system it starts from"
        )


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
