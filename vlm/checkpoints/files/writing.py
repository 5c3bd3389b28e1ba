"""Writing safetensors, whole or not at all."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vlm.checkpoints.files.atomic import atomic_files
from vlm.checkpoints.files.identity import hash_tensor, raw_bytes
from vlm.checkpoints.files.parts import gather

SHARD_BYTES = 5_000_000_000
"""Size of the files that a large checkpoint is written in."""
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}


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
        file.write(raw_bytes(whole))
        del whole  # before the next one is gathered
