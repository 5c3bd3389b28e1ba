"""An adapter as a folder that `peft.PeftModel.from_pretrained` lays over the class of transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm.checkpoints.report import LoadReport
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError
from vlm.language import PeftAdapter
from vlm.language.adapters import ADAPTER

_PREFIX = "base_model.model."
_KINDS = ("lora_A", "lora_B", "lora_magnitude_vector")


def fill_peft_folder(
    folder: Path, module: Any, table: Table, *, trained: frozenset[str], made: Mapping[str, Tensor], base: str | None
) -> LoadReport:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into a folder that the caller makes appear.

    What was trained besides (a connector) goes with it as whole modules (`modules_to_save`).

    Args:
        module: with its adapter.
        table: between our names and those of the class in memory.
        trained: names of what the stage trained.
        made: tensors that the class has and we do not.
        base: what it is to be laid over, for the file; None where that is no published folder.

    Raises:
        UserError: peft cannot hold it.
    """
    from peft import LoraConfig

    adapters = [operation for operation in module.surgery if isinstance(operation, PeftAdapter)]
    if len({(a.rank, a.alpha, a.dora) for a in adapters}) != 1:
        raise UserError(f"{len(adapters)} adapters of different settings are no single one of peft; write them merged")
    layers = {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
    beside = {name for name in trained if not any(f".{kind}." in name for kind in _KINDS)}
    tensors, targets = {}, []
    for name, tensor in _theirs(module, table, list(layers), beside, made).items():
        path, _, leaf = name.rpartition(".")
        if tensor.is_floating_point():
            if leaf not in ("weight", "bias"):
                raise UserError(
                    f"{name}: was trained and is in no module of its own, which peft needs; write it merged"
                )
            tensors[f"{_PREFIX}{name}"] = tensor
            continue
        owner, rows = list(layers.values())[int(tensor[0, 0])], tensor[:, 1]
        targets.append(path)
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = owner.lora_A[ADAPTER].weight.detach()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = owner.lora_B[ADAPTER].weight.detach()[rows]
        if ADAPTER in owner.lora_magnitude_vector:
            magnitude = owner.lora_magnitude_vector[ADAPTER].weight
            tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = magnitude.detach()[rows]
    whole = sorted({name.removeprefix(_PREFIX).rpartition(".")[0] for name in tensors if ".lora_" not in name})
    adapter = adapters[0]
    alpha: Any = adapter.alpha  # annotated as an integer there
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.dora,
        target_modules=sorted(targets),
        modules_to_save=whole or None,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    # as peft writes it, but for sets, whose order is another one in each process
    entries = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    (folder / "adapter_config.json").write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    return LoadReport(loaded=sorted(trained))


def _theirs(
    module: Any, table: Table, layers: list[str], beside: set[str], made: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """{their name: (number of our layer, our row) int64[rows, 2] of an adapted weight, or a tensor trained besides}.

    The table is asked with such numbers in the place of weights, and with empty tensors for all else.
    """
    numbers = {f"{name}.weight": number for number, name in enumerate(layers)}
    given: dict[str, Tensor] = {}
    for name, tensor in module.named_parameters():
        if name in numbers:
            rows = torch.arange(tensor.shape[0])
            given[name] = torch.stack([torch.full_like(rows, numbers[name]), rows], 1)
        elif name in beside:
            given[name] = tensor.detach()
        elif not any(f".{kind}." in name for kind in _KINDS):
            given[name] = torch.empty(tensor.shape, device="meta")
    given |= {name: tensor.to("meta") for name, tensor in made.items()}
    found = {name: tensor for name, tensor in table.stream_from_ours(given.items()) if not tensor.is_meta}
    for name, tensor in found.items():
        if not tensor.is_floating_point() and (tensor.ndim != 2 or len(tensor[:, 0].unique()) != 1):
            raise UserError(
                f"{name}: holds several adapted layers, which no adapter of its own computes; write it merged"
            )
    return found
