"""The visual expert: image tokens go through linear layers of their own (CogVLM, 2023)."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import UserError
from vlm.language.layer_inputs import InformedLinear, LayerInputs, extend, next_inputs, take_inputs
from vlm.language.surgery import Surgery, names_of

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class VisualExpert(Surgery):
    """Every layer has a second QKV, output projection and MLP, for image tokens (Wang et al., CogVLM, 2023).

    ::

        row of text and image tokens -> sorted into [text; image] once, before the first layer
          norms, sums, activations: of any token
          linear layers: text part through `weight`, image part through `expert.weight`
          attention: queries, keys and values are put back into the order of the row, what comes out is sorted again
        -> order of the row

    So it costs exactly what the language model alone costs. The expert starts as a copy of the language model's
    weights; attention, norms and positions are shared.
    """

    def find_layers(self, module: nn.Module) -> list[str]:
        system: Any = module
        layers = system.language.base_model.layers
        blocks = [getattr(layer, parent, None) for layer in layers for parent in ("self_attn", "mlp")]
        found = [getattr(block, leaf, None) for block in blocks for leaf in (*_ATTENTION, *_MLP)]
        return names_of(module, (linear for linear in found if linear is not None))

    def apply(self, module: nn.Module) -> None:
        system: Any = module
        decoder = system.language.base_model
        for layer in decoder.layers:
            for parent, leaves in (("self_attn", _ATTENTION), ("mlp", _MLP)):
                block = getattr(layer, parent, nn.Module())
                for leaf in leaves:
                    linear = getattr(block, leaf, None)
                    if not isinstance(linear, nn.Linear):
                        raise UserError(
                            f"surgery VisualExpert: {type(layer).__name__} has no linear layer {parent}.{leaf}; give a "
                            "language model of Llama's kind"
                        )
                    route(linear, _Copy(linear), sort=leaf == "o_proj", restore=leaf in _ATTENTION[:3])
        take_inputs(decoder)
        extend(decoder, _sorting_decoder)


def route(linear: Any, expert: nn.Module, *, sort: bool, restore: bool) -> None:
    """Makes a linear layer send image tokens through `expert`, which lies below it; its own tensors keep their names.

    Args:
        linear: of any class; text tokens go through what it did before.
        sort: the tokens come in the order of the row.
        restore: they leave in the order of the row.
    """
    linear.expert, linear.sort, linear.restore = expert, sort, restore
    extend(linear, _routed)


def is_routed(layer: nn.Module) -> bool:
    """Whether image tokens go another way through a layer."""
    return isinstance(getattr(layer, "expert", None), nn.Module)


@functools.cache
def _routed(base: Any) -> type:
    class Routed(base):
        inputs: LayerInputs | None = None
        inform, told = InformedLinear.inform, InformedLinear.told

        def forward(self, x: Tensor) -> Tensor:
            """float[..., in] -> float[..., out]."""
            inputs = self.told
            if inputs.visual is None:
                return super().forward(x)
            assert inputs.is_sorted
            tokens = x.flatten(0, -2)
            if self.sort:
                tokens = inputs.sort(tokens)
            text, visual = tokens.split([inputs.num_text, len(inputs.visual)])
            out = torch.cat([super().forward(text), self.expert(visual)])
            if self.restore:
                out = inputs.restore(out)
            return out.unflatten(0, x.shape[:-1])

    return Routed


class _Copy(nn.Linear):
    """Starts with the values of another linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self._original = [linear]  # in a list: its parameters are not ours

    @property
    def starts_as(self) -> nn.Linear:
        return self._original[0]


@functools.cache
def _sorting_decoder(base: Any) -> type:
    class Decoder(base):
        def forward(
            self,
            *args: Any,
            inputs_embeds: Tensor | None = None,
            layer_inputs: LayerInputs | None = None,
            **kwargs: Any,
        ) -> Any:
            inputs = next_inputs(layer_inputs, kwargs.get("past_key_values"))
            if inputs is None or inputs.visual is None:
                return super().forward(*args, inputs_embeds=inputs_embeds, layer_inputs=inputs, **kwargs)
            assert inputs_embeds is not None, "image tokens come as embeddings"
            inputs = inputs.for_sorted_layers()
            embeds = inputs.sort(inputs_embeds.flatten(0, 1)).view_as(inputs_embeds)
            out = super().forward(*args, inputs_embeds=embeds, layer_inputs=inputs, **kwargs)
            hidden = out.last_hidden_state
            out.last_hidden_state = inputs.restore(hidden.flatten(0, 1)).view_as(hidden)
            return out

    return Decoder
