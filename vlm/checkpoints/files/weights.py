"""Reading weights from any published container, writing safetensors, and the identity of a tensor.

Reading is lazy: names, shapes and dtypes cost no tensor data, and `items` holds one tensor at a time.
"""

import contextlib
import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import safetensors
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from vlm.checkpoints.files.atomic import atomic_files
from vlm.checkpoints.files.locate import download, find_files, preview
from vlm.errors import UserError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
SHARD_BYTES = 5_000_000_000
"""Size of the files that a large checkpoint is written in."""
_LOOKED_AT, _BLOCK = 1 << 20, 1 << 12
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class WeightFiles:
    """The tensors of a checkpoint folder, a checkpoint file, or a repository of the Hugging Face hub.

    Understands `*.safetensors` (one file, or shards with an index) and `*.bin`, `*.pth`, `*.pt` pickles, which may hold
    the tensors under a `model` or `state_dict` key. Pickles are read with `weights_only=True`: no code of theirs runs.

    Args:
        path_or_hub_id: folder, file, or `owner/name`.
        revision: branch, tag or commit of a hub repository.

    Raises:
        UserError: nothing there, a shard missing, a file truncated, or a pickle with more than tensors in it.
    """

    def __init__(self, path_or_hub_id: str | Path, *, revision: str | None = None) -> None:
        path = Path(path_or_hub_id).expanduser()
        if not path.exists():
            path = download(str(path_or_hub_id), revision)
        self.source = str(path_or_hub_id)
        self.folder = path if path.is_dir() else path.parent
        self._file_of: dict[str, Path] = {}
        self._opened: tuple[Path, Any] | None = None
        files, index = find_files(path)
        for file in files:
            for key in self._open(file).keys():  # noqa: SIM118  (a safetensors file is not iterable)
                if key in self._file_of:
                    raise UserError(f"{path}: tensor {key!r} is in {self._file_of[key].name} and in {file.name}")
                self._file_of[key] = file
        if index is not None and (lost := [key for key in index if key not in self._file_of]):
            raise UserError(f"{path}: {preview(lost)} in the index but in none of its files; fetch the files again")
        if not self._file_of:
            raise UserError(f"{path}: holds no tensors")

    def keys(self) -> list[str]:
        return list(self._file_of)

    def files(self) -> list[Path]:
        """Where the tensors lie, in order."""
        return list(dict.fromkeys(self._file_of.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, without reading their data."""
        return dict(self._headers())

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) pairs, file by file; a tensor lives as long as its reader keeps it."""
        for key in self._file_of:
            yield key, self.get(key)

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            UserError: no tensor has this name.
        """
        if name not in self._file_of:
            raise UserError(f"{self.source}: no tensor {name!r} among {len(self._file_of)}")
        file = self._file_of[name]
        opened = self._open(file)
        with _explain(file):
            return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)

    def _headers(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for key, file in self._file_of.items():
            opened = self._open(file)
            shape = opened[key].shape if isinstance(opened, dict) else opened.get_slice(key).get_shape()
            yield key, tuple(shape)

    def _open(self, file: Path):
        if self._opened is None or self._opened[0] != file:  # one open file: its memory map goes with it
            self._opened = None
            with _explain(file):
                if file.suffix == ".safetensors":
                    self._opened = file, safetensors.safe_open(file, framework="pt")
                else:
                    self._opened = file, _read_pickle(file)
        assert self._opened is not None
        return self._opened[1]


def hash_tensor(tensor: Tensor) -> str:
    """Identity of one tensor: blake2b over dtype, shape and raw bytes, as 32 hexadecimal digits (about 0.8 GB/s)."""
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    digest.update(_raw(tensor))
    return digest.hexdigest()


def fingerprint_of(hashes: Mapping[str, str]) -> str:
    """Identity of a set of named tensors, from the hash of each; the order does not matter."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(hashes):
        digest.update(f"{name}\0{hashes[name]}\0".encode())
    return digest.hexdigest()


def fingerprint_of_files(files: Iterable[Path]) -> str:
    """Identity of weight files that name no hashes: of each its size, its beginning and blocks evenly over it.

    Reads some 5 MB a file, whatever its size; of frozen tensors every bit is known by their hashes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "big"))
        with file.open("rb") as opened:
            digest.update(opened.read(_LOOKED_AT))
            for place in range(_LOOKED_AT, size, max(_BLOCK, size // 1024)):
                opened.seek(place)
                digest.update(opened.read(_BLOCK))
    return digest.hexdigest()


def write_safetensors(
    path: str | Path,
    items: Iterable[tuple[str, Tensor]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    hashes: dict[str, str] | None = None,
) -> list[Path]:
    """Writes tensors so that the file is complete or not there; returns the files written.

    At most one shard is held where it is, and the host has a copy of one tensor: those of a device are fetched, and
    sharded ones gathered (every other rank calls `gather` for them, in the same order), as they are written.

    Args:
        path: file to write, ending in `.safetensors`.
        items: (name, tensor) pairs; read once.
        metadata: text entries of the header.
        max_shard_bytes: start a new file before one grows beyond this. With more than one file they are named
            `model-00001-of-00003.safetensors`, and `model.safetensors.index.json` says which tensor is where.
        hashes: gets the identity of each tensor.

    Raises:
        UserError: the disk is full; an earlier file at `path` is intact.
    """
    path = Path(path)
    assert path.suffix == ".safetensors", path
    header = {"format": "pt", **(metadata or {})}
    shards: list[dict[str, int]] = []
    with atomic_files(path.parent) as folder:
        for tensors in _shards(items, max_shard_bytes):
            with open(folder / str(len(shards)), "wb") as file:
                _write_shard(file, tensors, header, hashes)
            shards.append({name: tensor.nbytes for name, tensor in tensors.items()})
            del tensors  # before the next shard is collected
        names = [path.name]
        if len(shards) > 1:
            count = len(shards)
            names = [f"{path.stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
            index = {
                "metadata": {"total_size": sum(size for shard in shards for size in shard.values())},
                "weight_map": {key: name for shard, name in zip(shards, names, strict=True) for key in shard},
            }
            (folder / f"{path.name}.index.json").write_text(json.dumps(index, indent=2))
        for number, name in enumerate(names):
            (folder / str(number)).rename(folder / name)
    return [path.with_name(name) for name in names]


def divert(
    items: Iterable[tuple[str, Tensor]], goes_aside: Callable[[str], bool], beside: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The items that do not go aside; the others are put into `beside`."""
    for name, tensor in items:
        if goes_aside(name):
            beside[name] = tensor
        else:
            yield name, tensor


def _shards(items: Iterable[tuple[str, Tensor]], max_bytes: int | None) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    seen: set[str] = set()
    for name, tensor in items:
        assert name not in seen, f"{name} is written twice"
        seen.add(name)
        if shard and max_bytes is not None and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _write_shard(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], hashes: dict[str, str] | None
) -> None:
    # wide dtypes first, so that every tensor starts at a multiple of its element size
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor, start, end = tensors[name], end, end + tensors[name].nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name, tensor in tensors.items():  # in the order in which all ranks gather
        whole = gather(tensor).cpu()
        if hashes is not None:
            hashes[name] = hash_tensor(whole)
        file.seek(8 + len(text) + header[name]["data_offsets"][0])
        file.write(_raw(whole))
        del whole  # before the next one is gathered


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor, of whose parts every rank has one; any other tensor is itself."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _raw(tensor: Tensor) -> Any:
    """The bytes of a tensor as a buffer, without a copy where it lies contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        content = torch.load(file, map_location="cpu", weights_only=True)  # written before torch 1.6
    for key in ("state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)} if content else {}
    if not tensors:
        raise UserError(f"{file}: holds no tensors, neither at its top nor under 'model' or 'state_dict'")
    return tensors


@contextlib.contextmanager
def _explain(file: Path) -> Iterator[None]:
    try:
        yield
    except safetensors.SafetensorError as error:
        raise UserError(f"{file}: is truncated or no safetensors file ({error}); fetch it again") from error
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{file}: not a pickle of tensors alone, so it is not opened (it could run code); "
            f"take the safetensors version of these weights ({reason})"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{file}: is truncated or no weight file ({reason}); fetch it again") from error


CHANGED = "changed-"
"""Begins the identity of a tensor known by what it is made of: its own last bits may differ between machines."""


class Change(Protocol):
    """What becomes of a tensor after it is read, such as an adapter that is merged into it."""

    def __call__(self, tensor: Tensor) -> Tensor: ...

    def content(self, of: str) -> str:
        """Identity of the changed tensor, from that of the tensor: `CHANGED` and a hash."""


@dataclass(frozen=True)
class WeightSource:
    """Somewhere weights come from.

    Attributes:
        label: for the load report: `base weights of language (folder)`, `artefact 1_align`.
        names: our names of the tensors it provides.
        items: streams (our name, tensor), one at a time.
        dropped: names of what is left out on purpose.
        carried: our names of what is there and never computed with.
        covers: patterns of our names of what is expected to come whole, from here or from another source.
        fresh: patterns of what may start new all the same.
        changes: {our name: what becomes of its tensor}, in order; of tensors that the source does not provide, those of
            the sources before it.
    """

    label: str
    names: frozenset[str]
    items: Callable[[], Iterator[tuple[str, Tensor]]]
    dropped: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    covers: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    changes: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copies a full tensor into `target`; of a sharded one each rank keeps its part."""
    if isinstance(target, DTensor):
        target.to_local().copy_(value[own_rows(len(value), target.device_mesh)])
    else:
        target.copy_(value)


def own_rows(count: int, mesh: DeviceMesh) -> slice:
    """Those of `count` rows that this rank keeps: cut as by `torch.chunk` over the last dimension of `mesh`."""
    shards = mesh.ndim - 1  # copies along a first dimension are the same
    each = -(-count // mesh.size(shards))
    start = min(mesh.get_local_rank(shards) * each, count)
    return slice(start, min(start + each, count))
