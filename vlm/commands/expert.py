"""Partial LoRA as the visual expert that computes the same: image tokens have weights of their own, and no tensor knows
of a low rank any more. It can be trained on in full, and costs what the language model alone costs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.building.instantiate import describe, describe_module
from vlm.checkpoints.artefact import fill_artefact
from vlm.checkpoints.files.atomic import atomic_directory
from vlm.commands.merged import MERGED, probe_logits
from vlm.errors import UserError
from vlm.language import PartialLoRA, PeftAdapter, VisualExpert
from vlm.language.adapters import merged_weight
from vlm.language.partial_lora import PartialLoRALinear
from vlm.loading import load


def write_expert(src: str | Path, dst: Path) -> str:
    """Writes an artefact of `src` with a visual expert in the place of its partial LoRA; returns what was compared.

    Raises:
        UserError: `src` has no partial LoRA, an adapter lies over it, or the expert computes something else.
    """
    if dst.exists():
        raise UserError(f"{dst}: exists already; remove it or give another folder")
    module = load(src)
    if not any(isinstance(operation, PartialLoRA) for operation in module.surgery):
        raise UserError(f"{src}: has no partial LoRA that could become a visual expert")
    if any(isinstance(operation, PeftAdapter) for operation in module.surgery):
        raise UserError(
            f"{src}: an adapter lies over its partial LoRA; merge it first (a stage with `merge: true` under "
            "`stage.follows`)"
        )
    rest = [operation for operation in module.surgery if not isinstance(operation, PartialLoRA)]
    before = probe_logits(module)
    expert = VisualExpert()
    meta = {
        "system": module.system,
        "stage": "published",
        "global_step": 0,
        "model": describe_module(module),
        "surgery": describe([expert, *rest]),
        "ties": dict(module.ties),
    }
    meta["model"]["init_args"]["partial_lora"] = None
    with atomic_directory(dst) as folder:
        fill_artefact(folder, tensors=_tensors(module, set(expert.find_layers(module))), meta=meta)
        after = probe_logits(load(folder))
        share = ((after - before).abs().max() / before.abs().max()).item()
        if not share <= MERGED:
            raise UserError(
                f"{src}: the expert computes something else: a logit differs by {share:.2g} of the largest, and "
                f"{MERGED:g} is allowed"
            )
    return f"no logit of a probe differs by more than {share:.1g} of the largest"


def _tensors(module: Any, layers: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the network with an expert beside the linear layers of these names."""
    for name, tensor in module.state_dict().items():
        if ".Plora_" in name or name in module.ties:
            continue
        yield name, tensor.detach()
        path, _, leaf = name.rpartition(".")
        if path not in layers:
            continue
        layer = module.get_submodule(path)
        copy = tensor.detach().clone()
        if leaf == "weight" and isinstance(layer, PartialLoRALinear):
            copy = merged_weight(tensor, layer.down.weight, layer.Plora_B.weight, layer.scale).detach().to(tensor.dtype)
        yield f"{path}.expert.{leaf}", copy
