"""What a published BLIP that compares images with texts may leave out, as it is at the start of a fine-tuning."""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.checkpoints.published.family import chained
from vlm.checkpoints.published.one_folder import OpenedFolder

_COPIED = ("vision.", "language.", "projections.")
_WRITES = (".decoder_attention.", "language.head.")


def complete(opened: OpenedFolder) -> OpenedFolder:
    """A folder with temperature, momentum copies and queue; those it lacks are as published code starts them."""
    shapes, made = dict(opened.shapes), _made(opened)
    copies = {}
    if not any(name.startswith("momentum.") for name in shapes):
        copies = {
            name: f"momentum.{name}"
            for name in shapes
            if name.startswith(_COPIED) and not any(part in name for part in _WRITES)
            if not name.endswith("position_ids")
        }

    def copied() -> Iterator[tuple[str, Tensor]]:
        return ((copies[name], tensor) for name, tensor in opened.stream() if name in copies)

    shapes |= {copy: shapes[name] for name, copy in copies.items()} | {n: tuple(t.shape) for n, t in made.items()}
    return replace(opened, shapes=shapes, stream=chained(opened.stream, copied, lambda: iter(made.items())))


def _made(opened: OpenedFolder) -> dict[str, Tensor]:
    arguments, made = opened.model["init_args"], {}
    if "heads.temperature" not in opened.shapes:
        made["heads.temperature"] = torch.full((1,), 0.07)
    if not any(name.startswith("queue.") for name in opened.shapes):
        generator = torch.Generator().manual_seed(0)
        for kind in ("image", "text"):
            drawn = torch.randn(arguments["dim"], arguments["queue"], generator=generator)
            made[f"queue.{kind}"] = F.normalize(drawn, dim=0)
        made["queue.place"] = torch.zeros(1, dtype=torch.int64)
        if arguments.get("same_image"):
            made["queue.ids"] = torch.full((1, arguments["queue"]), -100)
    return made
