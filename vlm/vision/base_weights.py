"""The layouts in which towers are published."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.tables.base import BaseWeights, read_with_table
from vlm.checkpoints.tables.clip import clip_table
from vlm.checkpoints.tables.eva import eva_table
from vlm.checkpoints.tables.mini_gemini import convnext_names

_OPEN_CLIP = "visual.trunk."


def read_transformer(tower: Any, files: WeightFiles) -> BaseWeights:
    """A vision transformer in Hugging Face CLIP's layout, in that of BLIP-2, in timm's or in OpenCLIP's around timm's.

    What lies above its last built block is dropped, and of a tower without class token this and its position too.
    """
    keys = files.keys()
    prefix = next((p for p in ("vision_model.", "") if f"{p}embeddings.class_embedding" in keys), None)
    if "vision_model.encoder.layers.0.self_attn.qkv.weight" in keys:
        base = read_with_table(eva_table(num_blocks=tower.facts.num_blocks), files, part="vision.")
    elif prefix is not None:
        table = clip_table(theirs=prefix, num_blocks=tower.facts.num_blocks)
        base = read_with_table(table, files, part="vision.")
    else:
        depths = "|".join(map(str, range(tower.facts.num_blocks, tower.facts.depth)))
        above = re.compile(rf"blocks\.({depths})\.|norm\.|fc_norm\.|head\.")
        built = {name.removeprefix("trunk.") for name in tower.state_dict()}
        start = _OPEN_CLIP if f"{_OPEN_CLIP}pos_embed" in keys else ""  # its text side is dropped
        names = {key: key.removeprefix(start) for key in keys if key.startswith(start)}
        names = {key: name for key, name in names.items() if name in built or not above.match(name)}
        base = BaseWeights(
            names=frozenset(f"trunk.{name}" for name in names.values()),
            items=lambda: ((f"trunk.{names[key]}", tensor) for key, tensor in files.items() if key in names),
            dropped=tuple(key for key in keys if key not in names),
        )
    return _without_class_token(base) if tower.trunk.cls_token is None else base


def read_pyramid(files: WeightFiles) -> BaseWeights:
    """A ConvNeXt in OpenCLIP's layout or in timm's: stem and stages."""
    names = convnext_names(files.keys())
    return BaseWeights(
        names=frozenset(f"trunk.{name}" for name in names.values()),
        items=lambda: ((f"trunk.{names[key]}", tensor) for key, tensor in files.items() if key in names),
        dropped=tuple(key for key in files.keys() if key not in names),  # noqa: SIM118
    )


def _without_class_token(base: BaseWeights) -> BaseWeights:
    """For a tower that has no class token: neither it nor its position, the first one."""
    if "trunk.cls_token" not in base.names:
        return base

    def items() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in base.items():
            yield name, tensor[:, 1:] if name == "trunk.pos_embed" else tensor

    return replace(base, names=base.names - {"trunk.cls_token"}, items=items, dropped=(*base.dropped, "cls_token"))
