"""Partial LoRA: low-rank updates for image tokens alone (InternLM-XComposer2, 2024)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from vlm.language.surgery import Down, Surgery, Up, find_linears, targeted_linears


@dataclass(frozen=True)
class PartialLoRA(Surgery):
    """Low-rank updates that act on image tokens alone (InternLM-XComposer2, 2024).

    ``y = W x + scale * B A x`` where the token shows an image, ``y = W x`` elsewhere.

    Attributes:
        rank: width of the low-rank path.
        scale: factor on it (alpha / rank).
        targets: regular expressions over full module names; each must match a linear layer.
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
        layers: dict[str, nn.Module] = {}
        for name, linear in targeted_linears(module, self.targets, operation=self).items():
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, PartialLoRALinear(linear, self))
            found = re.match(r".*?\.layers\.\d+", name)
            assert found is not None, name
            layers[found[0]] = module.get_submodule(found[0])
        for layer in layers.values():
            layer.register_forward_pre_hook(_hand_down_mask, with_kwargs=True)


class PartialLoRALinear(nn.Linear):
    """A linear layer whose `weight` and `bias` keep their names beside `Plora_A` and `Plora_B`."""

    def __init__(self, linear: nn.Linear, surgery: PartialLoRA) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.Plora_A = Down(linear.in_features, surgery.rank, bias=False)
        self.Plora_B = Up(surgery.rank, linear.out_features, bias=False)
        self.scale = surgery.scale
        self.dropout = surgery.dropout
        self.visual_mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """float[..., N, in] -> float[..., N, out]; `visual_mask` bool[N] or [..., N] says which tokens are images."""
        out = super().forward(x)
        if self.visual_mask is None:
            return out
        update = self.Plora_B(self.Plora_A(F.dropout(x, self.dropout, self.training))) * self.scale
        return out + update * self.visual_mask[..., None].to(update.dtype)


def _hand_down_mask(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Sets a layer's own mask on its children just before it runs: also right when the layer is recomputed."""
    mask = kwargs.pop("visual_mask", None)
    for child in layer.modules():
        if isinstance(child, PartialLoRALinear):
            child.visual_mask = mask
    return args, kwargs
