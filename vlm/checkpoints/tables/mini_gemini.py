"""Mini-Gemini's own tensors beside those of LLaVA: the mining and the ConvNeXt.

Of the ConvNeXt the released checkpoints hold the stem and the stages under names of their own; base weights come in
OpenCLIP's or in timm's.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from vlm.checkpoints.tables.rules import Rule, rename

MARK = "model.vlm_uni_query_projector.1.weight"
"""In every checkpoint of Mini-Gemini, and in none of the others."""
AUX = "model.vision_tower_aux."
_MINING = {"query": "query", "aux": "key", "val": "value"}


def own_rules() -> tuple[Rule, ...]:
    """Of the official layout."""
    return (
        *(
            rename(f"model.vlm_uni_{theirs}_projector.{layer}.{kind}", f"mining.{ours}.{layer}.{kind}")
            for theirs, ours in _MINING.items()
            for layer in (0, 1)
            for kind in ("weight", "bias")
        ),
        rename(AUX + "vision_stem.{rest}", "vision_high.trunk.stem.{rest}"),
        rename(AUX + "vision_stages.{rest}", "vision_high.trunk.stages.{rest}"),
    )


def convnext_names(keys: Iterable[str]) -> dict[str, str]:
    """{name in a file: name in the trunk} of the stem and the stages of a ConvNeXt in OpenCLIP's or timm's layout."""
    keys = list(keys)
    prefix = next((p for p in ("visual.trunk.", "trunk.") if any(key.startswith(p) for key in keys)), "")
    bare = {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    return {key: name for key, name in bare.items() if name.startswith(("stem.", "stages."))}


def convnext_options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """`depths` and `dims` of a ConvNeXt.

    Args:
        shapes: by name in the trunk.
    """
    blocks = [name.split(".") for name in shapes if name.endswith(".conv_dw.weight")]
    depths = [0] * (1 + max(int(name[1]) for name in blocks))
    dims = list(depths)
    for _, stage, _, block, *_ in blocks:
        depths[int(stage)] = max(depths[int(stage)], int(block) + 1)
        dims[int(stage)] = shapes[f"stages.{stage}.blocks.{block}.conv_dw.weight"][0]
    return {"depths": depths, "dims": dims}


def high_tower(content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """`init_args` that a published `config.json` and its tensors say about the tower of the fine map.

    Args:
        shapes: of the checkpoint, under published names.
    """
    inner = {name.removeprefix(AUX + "vision_"): shape for name, shape in shapes.items() if name.startswith(AUX)}
    options = convnext_options(inner) if inner else {}
    return {
        "name": "convnext_large_mlp",
        "image_size": content.get("image_size_aux", 768),
        "weights": None if inner else content.get("mm_vision_tower_aux"),
        "options": options,
    }
