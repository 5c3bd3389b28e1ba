"""Features of a frozen tower on the disk, for stages that see the same views again and again."""

import hashlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from vlm.batch import Batch, Views
from vlm.checkpoints.files.atomic import atomic_file
from vlm.checkpoints.files.identity import hash_tensor

_DIGEST = 16
_WAITING = 64
"""Views whose features may wait to be written."""


def with_keys(batch: Batch) -> Batch:
    """The pack with a name for each view, made of its pixels: of the image, and of how it is seen."""
    return replace(batch, views={name: replace(views, keys=_keys(views)) for name, views in batch.views.items()})


def _keys(views: Views) -> tuple[str, ...]:
    if views.table is None or views.whole is not None:
        return tuple(hash_tensor(view) for view in views.pixels)
    table = hash_tensor(views.table)[:8]  # bytes are a quarter of the pixels that they become
    return tuple(hash_tensor(view) + table for view in views.values)


class FeatureFiles:
    """One file a view: what a tower makes of it, as a function of this view and nothing else.

    A view goes through the tower alone, so that its features do not depend on what it shares a pack with, on who
    computed them, and on what was there already. Any number of processes read and write one folder: a file appears
    whole or not at all, and whoever makes it again writes the same. A file that is not what was written is made anew.

    Attributes:
        num_read: views whose features were read.
        num_computed: views that went through the tower.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_read = self.num_computed = 0
        self._waiting: queue.Queue[str] = queue.Queue(_WAITING)
        self._unwritten: dict[str, Tensor] = {}
        self._error: BaseException | None = None
        threading.Thread(target=self._write_all, name="feature files", daemon=True).start()

    def size(self) -> tuple[int, int]:
        """How many files there are, and their bytes."""
        sizes = [file.stat().st_size for file in self.folder.glob("??/*.features")]
        return len(sizes), sum(sizes)

    def find(self, keys: Sequence[str], compute: Callable[[int], Tensor], *, device: torch.device) -> Tensor:
        """float[V, P, D] features of views, without a graph.

        Args:
            keys: names of the views.
            compute: number of a view -> float[1, P, D], its features by the tower.
        """
        features: dict[str, Tensor] = {}
        for view, key in enumerate(keys):
            if key in features:
                continue
            kept = self._unwritten.get(key)
            if kept is None and (kept := self._read(key)) is not None and device.type == "cuda":
                kept = kept.pin_memory().to(device, non_blocking=True)
            if kept is not None:
                self.num_read += 1
                features[key] = kept
                continue
            self.num_computed += 1
            with torch.no_grad():
                features[key] = self._unwritten[key] = compute(view)
            self._check_writer()
            self._waiting.put(key)
        return torch.cat([features[key] for key in keys])

    def finish(self) -> None:
        """Waits until everything is written."""
        self._waiting.join()
        self._check_writer()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.features"

    def _read(self, key: str) -> Tensor | None:
        try:
            content = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        digest, stored = content[:_DIGEST], content[_DIGEST:]
        return load(stored)["features"] if _digest(stored) == digest else None

    def _write_all(self) -> None:
        while True:
            key = self._waiting.get()
            try:
                if self._error is None:
                    features = self._unwritten[key].cpu().contiguous()  # a device is waited for here alone
                    stored = save({"features": features})
                    with atomic_file(self._path(key), durable=False) as file:
                        file.write(_digest(stored) + stored)
            except BaseException as error:  # whoever trains has to know
                self._error = error
            finally:
                del self._unwritten[key]
                self._waiting.task_done()

    def _check_writer(self) -> None:
        if self._error is not None:
            raise self._error


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()
