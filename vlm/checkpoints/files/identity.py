"""The identity of a tensor, of a set of them, and of files that hold some."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHANGED = "changed-"
"""Begins the identity of a tensor known by what it is made of: its own last bits may differ between machines."""
_LOOKED_AT, _BLOCK = 1 << 20, 1 << 12


def hash_tensor(tensor: Tensor) -> str:
    """Identity of one tensor: blake2b over dtype, shape and raw bytes, as 32 hexadecimal digits (about 0.8 GB/s)."""
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    digest.update(raw_bytes(tensor))
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


def raw_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor as a buffer, without a copy where it lies contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""
