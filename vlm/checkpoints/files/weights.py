"""Reading weights from any published container.

Reading is lazy: names, shapes and dtypes cost no tensor data, and `items` holds one tensor at a time.
"""

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from vlm.checkpoints.files.locate import download, find_files, preview
from vlm.errors import UserError


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
