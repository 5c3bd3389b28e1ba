"""Adapters of peft, whose layers take the place of linear ones without renaming anything."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm.errors import UserError
from vlm.language.surgery import Surgery, Up, find_linears, targeted_linears

ADAPTER = "default"
"""Peft's name of its first adapter, part of the names of the new tensors: `q_proj.lora_A.default.weight`."""


@dataclass(frozen=True)
class PeftAdapter(Surgery):
    """Low-rank updates for every token: LoRA (Hu et al., 2022) or DoRA (Liu et al., 2024).

    ``y = W x + alpha / rank * B A x``; DoRA learns the length of each row of ``W + alpha / rank * B A`` besides.

    The base weight keeps its published name; `lora_A`, `lora_B` and, of DoRA, `lora_magnitude_vector` lie beside it.

    Attributes:
        rank: width of the low-rank path.
        alpha: its factor, times the rank.
        targets: regular expressions over full module names, in the language model, the tower or both; each must match
            a linear layer.
        dropout: on the input of A.
        dora: with magnitudes of their own.
    """

    rank: int
    alpha: float
    targets: Sequence[str] = (r"language\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",)
    dropout: float = 0.0
    dora: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # files deliver lists
        object.__setattr__(self, "alpha", float(self.alpha))
        if self.rank < 1:
            raise UserError(f"surgery PeftAdapter: rank must be at least 1, found {self.rank}")

    @property
    def cannot_merge(self) -> str | None:
        return None

    def find_layers(self, module: nn.Module) -> list[str]:
        return list(find_linears(module, self.targets))

    def apply(self, module: nn.Module) -> None:
        for name, linear in targeted_linears(module, self.targets, operation=self).items():
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, self._adapted(linear))

    def _adapted(self, linear: nn.Linear) -> nn.Module:
        from peft import LoraConfig  # here: peft takes 0.4 s to import, which nobody without an adapter should wait for
        from peft.tuners import lora

        config = LoraConfig(lora_dropout=self.dropout, use_dora=self.dora, init_lora_weights=False)
        alpha: Any = self.alpha  # annotated as an integer there
        layer: Any = lora.Linear(linear, ADAPTER, config=config, r=self.rank, lora_alpha=alpha)
        layer.lora_A[ADAPTER] = Down(linear.in_features, self.rank, bias=False)
        layer.lora_B[ADAPTER] = Up(self.rank, linear.out_features, bias=False)
        if self.dora:
            magnitude = layer.lora_magnitude_vector[ADAPTER]
            magnitude.initialise_new = partial(_draw_magnitude, magnitude, linear)
        _keep_names(layer, linear)
        return layer


class Down(nn.Linear):
    """The first half of a low-rank path, float[..., in] -> float[..., rank]."""

    def initialise_new(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))


def _draw_magnitude(magnitude: Any, linear: nn.Linear) -> None:
    """The length of each row of the base weight, which has its values: it is filled before what lies below it."""
    weight: Tensor = linear.weight
    full = weight.full_tensor() if isinstance(weight, DTensor) else weight
    magnitude.weight.data.copy_(torch.linalg.norm(full.detach().cpu().float(), dim=1))


def _keep_names(layer: Any, linear: nn.Linear) -> None:
    """Peft puts the layer it adapts one level down (`base_layer.weight`); here its tensors stay where they were.

    The adapted layer is no child any more, and shares its dictionary of tensors with the new one: whoever replaces a
    tensor (memory, sharding, a cast) replaces it for both.
    """
    del layer._modules["base_layer"]
    object.__setattr__(layer, "base_layer", linear)
    layer._parameters = linear._parameters
