"""Cross-attention in every layer of a language model (CogAgent, 2023)."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import UserError
from vlm.language.attention import packed_attention
from vlm.language.layer_inputs import LayerInputs, extend, informing, take_inputs
from vlm.language.surgery import Surgery, names_of


@dataclass(frozen=True)
class CrossAttention(Surgery):
    """Every token looks at the features of its sequence, in every layer (Hong et al., CogAgent, 2023).

    ::

        layer: h + self_attn(norm(h)) -> h + cross_attn(norm(h)) -> h + mlp(norm(h))

    What is looked at (`LayerInputs.context`) may be much finer than the tokens of the row, because the attention is
    thin: its queries, keys and values have their own, small width. It has no mask and no positions.

    Attributes:
        context: width of the features.
        width: of queries, keys and values, over all heads.
        heads: number of heads.
    """

    context: int
    width: int
    heads: int

    def find_layers(self, module: nn.Module) -> list[str]:
        system: Any = module
        return names_of(module, system.language.base_model.layers)

    def apply(self, module: nn.Module) -> None:
        system: Any = module
        decoder, config = system.language.base_model, system.language.config
        if self.width % self.heads:
            raise UserError(f"surgery CrossAttention: width {self.width} is not divisible by {self.heads} heads")
        parts = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        for layer in decoder.layers:
            others = {name for name, _ in layer.named_children()} - set(parts)
            if others or not all(hasattr(layer, part) for part in parts) or not hasattr(config, "rms_norm_eps"):
                raise UserError(
                    f"surgery CrossAttention: {type(layer).__name__} is not built of {', '.join(parts)} alone; give a "
                    "language model of Llama's kind"
                )
            norm = type(layer.input_layernorm)
            layer.cross_attn = ContextAttention(config.hidden_size, self)
            layer.post_cross_attention_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
            extend(layer, _crossed_layer)
        take_inputs(decoder)


class ContextAttention(nn.Module):
    """float[..., D] tokens -> float[..., D], what they find in the context of their sequence."""

    def __init__(self, dim: int, surgery: CrossAttention) -> None:
        super().__init__()
        self.heads = surgery.heads
        self.query = nn.Linear(dim, surgery.width, bias=False)
        self.key_value = nn.Linear(surgery.context, 2 * surgery.width, bias=False)
        self.dense = _Out(surgery.width, dim, bias=False)

    def forward(
        self,
        hidden: Tensor,
        inputs: LayerInputs,
        *,
        layer: int,
        cu_seqlens: Tensor | None = None,
        max_len: int | None = None,
    ) -> Tensor:
        """Tokens of one sequence after those of another; a batch of one length has no bounds.

        Args:
            layer: number of the layer, under which its keys and values are kept.
            cu_seqlens: int32[S + 1], of a packed row.
        """
        if (context := inputs.context) is None:
            raise ValueError(
                "cross-attention takes a context; the system's `layer_inputs` gives an empty one if need be"
            )
        query = inputs.restore(self.query(hidden).flatten(0, -2))
        key, value = self._states(inputs, layer)
        if cu_seqlens is None:  # a prompt's beams look at the same keys, as if they were one sequence
            num_sequences = len(context.cu_seqlens) - 1
            max_len = len(query) // num_sequences
            steps = torch.arange(num_sequences + 1, device=query.device, dtype=torch.int32)
            cu_seqlens = steps * max_len
        found, _ = packed_attention(
            self,
            self._split_heads(query),
            self._split_heads(key),
            self._split_heads(value),
            None,
            cu_seqlens=cu_seqlens,
            max_len=max_len,
            cu_seqlens_k=context.cu_seqlens,
            max_len_k=context.max_len,
            is_causal=False,
        )
        found = found[0].flatten(1).to(hidden.dtype)
        return self.dense(inputs.sort(found)).unflatten(0, hidden.shape[:-1])

    def _states(self, inputs: LayerInputs, layer: int) -> tuple[Tensor, Tensor]:
        """float[M, width] keys and values; in generation of the first time."""
        if inputs.states is not None and layer in inputs.states:
            return inputs.states[layer]
        assert inputs.context is not None
        features = inputs.context.features.to(self.key_value.weight.dtype)  # FSDP casts plain tensors alone
        key, value = self.key_value(features).chunk(2, dim=-1)
        if inputs.states is not None:
            inputs.states[layer] = key, value
        return key, value

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """float[N, width] -> float[1, heads, N, width / heads]."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None]


class _Out(nn.Linear):
    def initialise_new(self) -> None:
        nn.init.zeros_(self.weight)  # the new path starts as the identity


@functools.cache
def _crossed_layer(base: Any) -> type:
    class Layer(base):
        takes_inputs = True

        def forward(self, hidden: Tensor, *, layer_inputs: LayerInputs | None = None, **kwargs: Any) -> Tensor:
            with informing(self, layer_inputs):
                assert layer_inputs is not None
                attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden), **kwargs)
                hidden = hidden + attended
                bounds = {name: kwargs[name] for name in ("cu_seqlens", "max_len") if name in kwargs}
                hidden = hidden + self.cross_attn(
                    self.post_cross_attention_layernorm(hidden),
                    layer_inputs,
                    layer=self.self_attn.layer_idx,
                    **bounds,
                )
                return hidden + self.mlp(self.post_attention_layernorm(hidden))

    return Layer
