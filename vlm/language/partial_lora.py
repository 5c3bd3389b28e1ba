"""Partial LoRA: low-rank updates for image tokens alone (InternLM-XComposer2, 2024)."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from vlm.errors import UserError
from vlm.language.layer_inputs import InformedLinear, LayerInputs, take_inputs
from vlm.language.surgery import Surgery, Up, find_linears, targeted_linears

_SHARED = ("q_proj", "k_proj", "v_proj")
"""Linear layers of one module that share A: in the published model they are one."""


@dataclass(frozen=True)
class PartialLoRA(Surgery):
    """Low-rank updates that act on image tokens alone (InternLM-XComposer2, 2024).

    ``y = W x + scale * B A x`` where the token shows an image, ``y = W x`` elsewhere. Queries, keys and values share A.

    Attributes:
        rank: width of the low-rank path.
        scale: factor on it (alpha / rank).
        targets: regular expressions over full module names; each must match a linear layer of a decoder's layers.
        dropout: on the input of A.
    """

    rank: int
    scale: float = 1.0
    targets: Sequence[str] = (r"language\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # files deliver lists

    def find_layers(self, module: nn.Module) -> list[str]:
        return list(find_linears(module, self.targets))

    @property
    def cannot_merge(self) -> str | None:
        return "partial LoRA acts on image tokens alone, so no plain weights compute the same"

    def apply(self, module: nn.Module) -> None:
        decoders: set[str] = set()
        downs: dict[str, Down] = {}  # by what shares them
        for name, linear in targeted_linears(module, self.targets, operation=self).items():
            parent, _, leaf = name.rpartition(".")
            found = re.match(r"(.*?)\.layers\.\d+", name)
            if found is None:
                raise UserError(f"surgery PartialLoRA: its targets match {name}, which is in no layer")
            group = parent if leaf in _SHARED else name
            new = PartialLoRALinear(linear, self, down=downs.get(group))
            downs[group] = new.down
            setattr(module.get_submodule(parent), leaf, new)
            decoders.add(found[1])
        for decoder in sorted(decoders):
            take_inputs(module.get_submodule(decoder))


class PartialLoRALinear(InformedLinear):
    """A linear layer whose `weight` and `bias` keep their names beside `Plora_A` and `Plora_B`.

    Args:
        down: A of another layer with the same input; None: its own.
    """

    def __init__(self, linear: nn.Linear, surgery: PartialLoRA, *, down: "Down | None" = None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        if down is None:
            self.Plora_A = down = Down(linear.in_features, surgery.rank, dropout=surgery.dropout)
        self._down = [down]  # in a list: of another layer, it has its name there
        self.Plora_B = Up(surgery.rank, linear.out_features, bias=False)
        self.scale = surgery.scale

    @property
    def down(self) -> "Down":
        return self._down[0]

    def forward(self, x: Tensor) -> Tensor:
        """float[..., in] -> float[..., out]."""
        return self.updated(super().forward(x), x)

    def updated(self, out: Tensor, x: Tensor) -> Tensor:
        """What else computed of x, float[..., out], with the update where tokens show an image."""
        if (visual := self.told.visual) is None:
            return out
        update = self.Plora_B(self.down(x)) * self.scale
        return out.flatten(0, -2).index_add(0, visual, update.to(out.dtype)).view_as(out)


class Down(InformedLinear):
    """A: computed once for the layers that share it, on image tokens alone."""

    def __init__(self, in_features: int, rank: int, *, dropout: float) -> None:
        super().__init__(in_features, rank, bias=False)
        self.dropout = dropout
        self._last: tuple[Tensor, Tensor] | None = None

    def inform(self, inputs: LayerInputs | None) -> None:
        super().inform(inputs)
        self._last = None

    def forward(self, x: Tensor) -> Tensor:
        """float[..., in] -> float[K, rank]."""
        if self._last is None or self._last[0] is not x:
            assert self.told.visual is not None
            visual = x.flatten(0, -2).index_select(0, self.told.visual)
            self._last = x, super().forward(F.dropout(visual, self.dropout, self.training))
        return self._last[1]

    def initialise_new(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
