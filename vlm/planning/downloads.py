"""What has to be fetched, or is here already."""

from dataclasses import dataclass
from pathlib import Path

import torch

from vlm.bert import BertSize
from vlm.checkpoints.files.locate import find_files
from vlm.errors import UserError
from vlm.planning.published import known_model, whole_folder
from vlm.planning.system import Described


@dataclass(frozen=True)
class Download:
    """Base weights of a part.

    Attributes:
        part: of the system.
        path: folder or hub id.
        size: bytes of its weight files.
        is_here: they are on this disk, and `size` is exact.
    """

    part: str
    path: str
    size: int
    is_here: bool


def downloads_of(what: Described) -> list[Download]:
    """The base weights of each part that has some."""
    found = []
    for part, path in what.paths.items():
        try:
            files, _ = find_files(Path(path).expanduser()) if Path(path).expanduser().exists() else ([], None)
        except UserError:
            files = []
        size = sum(file.stat().st_size for file in files) or _expected(path, what, part)
        found.append(Download(part, path, size, is_here=bool(files)))
    return found


def _expected(path: str, what: Described, part: str) -> int:
    """From the numbers of the published folder and the type they are stored in; of the part's own where not known."""
    if (whole := whole_folder(path)) is not None:
        return whole * torch.float32.itemsize
    known = known_model(path)
    dtype = getattr(torch, known.stored) if known is not None else torch.float32
    with torch.device("meta"):
        description = what.arguments[part]
        seen = (what.arguments["vision"].facts().dim,) if isinstance(description, BertSize) else ()
        parameters = description.build(*seen).parameters()
    return sum(parameter.numel() for parameter in parameters) * dtype.itemsize
