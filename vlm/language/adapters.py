"""Adapters of peft, whose layers take the place of linear ones without renaming anything."""

import functools
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vlm.errors import UserError
from vlm.language.layer_inputs import extend
from vlm.language.partial_lora import PartialLoRA, PartialLoRALinear
from vlm.language.quantized import FourBitLinear
from vlm.language.surgery import Surgery, Up, plain
from vlm.language.visual_expert import VisualExpert, is_routed, route

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
        targets: which linear layers: regular expressions over full names, or over the ends of names (`q_proj`); each
            must match one. Empty: all.
        dropout: on the input of A.
        dora: with magnitudes of their own.
        parts: of which only linear layers inside of blocks are adapted; `both` is the language model and the tower.
            Empty: `language` without targets, else any part.
        quantize: parts of which every linear layer inside of blocks keeps its frozen weight in 4 bits (QLoRA).
    """

    rank: int
    alpha: float
    targets: Sequence[str] = ()
    dropout: float = 0.0
    dora: bool = False
    parts: Sequence[str] | str = ()
    quantize: Sequence[str] | str = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # files deliver lists
        parts = spelled_out(self.parts) or (() if self.targets else ("language",))
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "quantize", spelled_out(self.quantize))
        object.__setattr__(self, "alpha", float(self.alpha))
        if self.rank < 1:
            raise UserError(f"surgery PeftAdapter: rank must be at least 1, found {self.rank}")

    @property
    def cannot_merge(self) -> str | None:
        return None

    @property
    def cannot_shard(self) -> str | None:
        return "weights in 4 bits cannot be sharded; use DDP, or leave `quantize` out" if self.quantize else None

    def lies_over(self, other: Surgery) -> bool:
        """Over partial LoRA and visual experts, which stay as they are: what it adds to `W x` can be merged into W.

        An expert is a linear layer of its own (`q_proj.expert`), and so adapted by itself.
        """
        return isinstance(other, PartialLoRA | VisualExpert)

    def adapts(self, name: str) -> bool:
        """Whether a linear layer of this full name is adapted."""
        return in_blocks(name, self.parts) and (not self.targets or any(_fits(t, name) for t in self.targets))

    def unquantized(self) -> "PeftAdapter":
        return replace(self, quantize=())

    def quantizes(self, name: str) -> bool:
        """Whether a linear layer of this full name keeps its weight in 4 bits."""
        return bool(self.quantize) and in_blocks(name, self.quantize)

    def find_layers(self, module: nn.Module) -> list[str]:
        return [name for name in _linears(module) if self.adapts(name) or self.quantizes(name)]

    def apply(self, module: nn.Module) -> None:
        linears = _linears(module)
        self._check(module, linears)
        for name in self.find_layers(module):
            parent, _, leaf = name.rpartition(".")
            found: Any = linears[name]
            layer: nn.Module = plain(found) if is_routed(found) else found
            if self.quantizes(name):
                layer = FourBitLinear.like(linears[name])
            if self.adapts(name):
                layer = self._adapted(layer)
            if is_routed(found):
                route(layer, found.expert, sort=found.sort, restore=found.restore)
            _call_forward_of_qkv(module.get_submodule(parent))
            setattr(module.get_submodule(parent), leaf, layer)

    def _check(self, module: nn.Module, linears: Collection[str]) -> None:
        known = [name for name, _ in module.named_children()]
        for part in (*self.parts, *self.quantize):
            if part.split(".")[0] not in known:
                raise UserError(
                    f"surgery PeftAdapter: the system has no part {part!r}; its parts are {', '.join(known)}"
                )
            if not any(in_blocks(name, [part]) for name in linears):
                raise UserError(f"surgery PeftAdapter: {part} has no linear layer in blocks; name some under targets")
        for name in linears:
            if self.quantizes(name) and isinstance(module.get_submodule(name), PartialLoRALinear):
                raise UserError(
                    f"surgery PeftAdapter: {name} has partial LoRA, whose weight is not kept in 4 bits; leave "
                    "`quantize` out"
                )
        for target in self.targets:
            if not any(_fits(target, name) and in_blocks(name, self.parts) for name in linears):
                raise UserError(f"surgery PeftAdapter: target {target!r} matches no linear layer")

    def check_trained(self, module: nn.Module, *, is_new: bool) -> None:
        layers = self._layers(module)
        of_adapter = [p for layer in layers.values() for n, p in layer.named_parameters() if n.startswith("lora_")]
        if is_new and not any(parameter.requires_grad for parameter in of_adapter):
            raise UserError(
                "stage.train: the adapter would not be trained; add `adapters: {lr: 2.0e-4}`, or take "
                "callbacks.LoRAInjection out"
            )
        for name, layer in module.named_modules():
            if isinstance(layer, FourBitLinear) and layer.weight.requires_grad:
                raise UserError(f"stage.train: {name}.weight is kept in 4 bits and cannot be trained; leave it out")
        for name, layer in layers.items():
            if layer.get_parameter("weight").requires_grad:
                raise UserError(
                    f"stage.train: {name}.weight is trained as a whole although an adapter lies over it; train "
                    f"`adapters` in the place of {name.split('.')[0]!r}, or leave the adapter out"
                )

    def summary(self, module: nn.Module) -> list[str]:
        layers = self._layers(module)
        count = sum(
            p.numel() for layer in layers.values() for n, p in layer.named_parameters() if n.startswith("lora_")
        )
        of_parts = Counter(name.split(".")[0] for name in layers)
        where = " and ".join(f"{number} linear layers of {part}" for part, number in of_parts.items())
        lines = [f"{self}: {where}, {count:,} parameters"]
        if packed := [m for m in map(_base_of, module.modules()) if isinstance(m, FourBitLinear)]:
            numbers = sum(layer.in_features * layer.out_features for layer in packed)
            size = sum(layer.num_bytes for layer in packed) / 2**20
            lines.append(f"{len(packed)} linear layers are kept in 4 bits: {numbers:,} parameters in {size:,.1f} MiB")
        if not self.targets and (beside := sorted(self._left_out(module, layers))):
            lines.append(f"in these blocks it does not adapt {', '.join(beside)}")
        return lines

    def _layers(self, module: nn.Module) -> dict[str, nn.Module]:
        return {name: m for name, m in module.named_modules() if hasattr(m, "lora_A") and self.adapts(name)}

    def _left_out(self, module: nn.Module, layers: Collection[str]) -> set[str]:
        """Weights of the same blocks that are no linear layer's: convolutions, the experts of Mixtral."""
        parts = {name.split(".")[0] for name in layers}
        return {
            re.sub(r"\.\d+(?=\.)", ".*", name)
            for name, parameter in module.named_parameters()
            if parameter.ndim > 1 and in_blocks(name, parts)
            if not _ADDED.search(name) and name.removesuffix(".weight") not in layers
        }

    def _adapted(self, linear: Any) -> nn.Module:
        from peft import LoraConfig  # here: peft takes 0.4 s to import, which nobody without an adapter should wait for
        from peft.tuners import lora

        kind: Any = lora.Linear
        if isinstance(linear, FourBitLinear):
            from peft.tuners.lora.bnb import Linear4bit as kind
        config = LoraConfig(lora_dropout=self.dropout, use_dora=self.dora, init_lora_weights=False)
        alpha: Any = self.alpha  # annotated as an integer there
        partial_lora, linear = (linear, plain(linear)) if isinstance(linear, PartialLoRALinear) else (None, linear)
        layer: Any = kind(linear, ADAPTER, config=config, r=self.rank, lora_alpha=alpha)
        layer.lora_A[ADAPTER] = Down(linear.in_features, self.rank, bias=False)
        layer.lora_B[ADAPTER] = Up(self.rank, linear.out_features, bias=False)
        if self.dora:
            magnitude = layer.lora_magnitude_vector[ADAPTER]
            magnitude.initialise_new = partial(_draw_magnitude, magnitude, linear)
        _keep_names(layer, linear)
        if partial_lora is not None:
            extend(layer, _beside_partial_lora)
            layer._modules |= partial_lora._modules
            object.__setattr__(layer, "partial", partial_lora)  # no child: its tensors have their names here
        return layer


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """float32[out, in]: the weight that computes what a layer and its adapter compute, rounded once.

    Args:
        weight: float[out, in] of the layer.
        a: float[rank, in].
        b: float[out, rank].
        scale: alpha / rank.
        magnitude: float[out] of DoRA.
    """
    merged = weight.double() + scale * (b.double() @ a.double())
    if magnitude is not None:
        merged *= (magnitude.double() / torch.linalg.norm(merged, dim=1))[:, None]
    return merged.float()


@torch.no_grad()
def replace_adapters(module: nn.Module, *, merge: bool) -> None:
    """Puts plain linear layers in the place of adapted ones, with the merged weights or with those of before."""
    for name, found in list(module.named_modules()):
        layer: Any = found
        if not hasattr(layer, "lora_A"):
            continue
        linear = getattr(layer, "partial", layer.base_layer)
        if is_routed(layer):
            route(linear, layer.expert, sort=layer.sort, restore=layer.restore)
        if merge:
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            magnitude = layer.lora_magnitude_vector[ADAPTER].weight if ADAPTER in layer.lora_magnitude_vector else None
            linear.weight.copy_(merged_weight(linear.weight, down, up, layer.scaling[ADAPTER], magnitude))
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, linear)


def spelled_out(parts: Sequence[str] | str) -> tuple[str, ...]:
    """Parts of a system as files name them: one, several, or `both`."""
    if parts == "both":
        return ("language", "vision")
    return (parts,) if isinstance(parts, str) else tuple(parts)


def in_blocks(name: str, parts: Collection[str]) -> bool:
    """Whether a tensor or layer is inside of a block of one of these parts; without any, wherever it is."""
    return not parts or any(name.startswith(f"{part}.") and _IN_BLOCK.search(name[len(part) :]) for part in parts)


_IN_BLOCK = re.compile(r"\.\d+\.")
_ADDED = re.compile(r"\.(lora_[AB]|Plora_[AB])\.")
"""What low-rank paths hold themselves."""


def _fits(target: str, name: str) -> bool:
    return re.fullmatch(rf"(?:{target})|.*\.(?:{target})", name) is not None


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are called, without those of low-rank paths: nn.MultiheadAttention reads the weight of its
    own instead."""
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and not isinstance(child, NonDynamicallyQuantizableLinear)
        if not _ADDED.search(f"{name}.")
    }


def _call_forward_of_qkv(attention: Any) -> None:
    """BEiT's and EVA's attention in timm multiplies with `qkv.weight` by itself unless it is told to add biases after
    the layer; the adapter would never be asked."""
    if getattr(attention, "q_bias", None) is not None and hasattr(attention, "qkv_bias_separate"):
        attention.qkv_bias_separate = True


class Down(nn.Linear):
    """The first half of a low-rank path, float[..., in] -> float[..., rank]."""

    def initialise_new(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))


def _base_of(module: nn.Module) -> Any:
    return getattr(module, "base_layer", module)


def _draw_magnitude(magnitude: Any, linear: nn.Linear) -> None:
    """The length of each row of the base weight, which has its values: it is filled before what lies below it."""
    weight: Tensor = linear.full_weight() if isinstance(linear, FourBitLinear) else linear.weight
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


@functools.cache
def _beside_partial_lora(base: Any) -> type:
    """Partial LoRA adds to what an adapter computes, so that the adapter can be merged into W."""

    class Adapted(base):
        partial: PartialLoRALinear

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.partial.updated(super().forward(x, *args, **kwargs), x)

    return Adapted
