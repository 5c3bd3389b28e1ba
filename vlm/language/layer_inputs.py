"""What the layers of a decoder are told about its tokens, beside their embeddings.

A system says it once, for a row (`RowDecoder.layer_inputs`); training, scoring, the choice of options and generation
all hand it down as the keyword `layer_inputs` of the decoder and of every layer. In generation it travels with the
cache: the prompts are told, and what is generated is text.

A layer takes it through a subclass of its class, never through a hook: so it happens inside `forward`, which a
recomputation runs again with the inputs of its own row.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PretrainedConfig

from vlm.batch import Row


@dataclass(frozen=True)
class Context:
    """What the cross-attention of every layer looks at.

    Attributes:
        features: float[M, C], those of one sequence after those of another.
        cu_seqlens: int32[S + 1], where they start; a sequence without any sees nothing.
        max_len: most features of a sequence, a plain int.
    """

    features: Tensor
    cu_seqlens: Tensor
    max_len: int

    @classmethod
    def pack(cls, features: Sequence[Tensor]) -> "Context":
        """Of float[m, C] per sequence; m may be 0."""
        lengths = [len(one) for one in features]
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(features[0].device, torch.int32)
        return cls(torch.cat(list(features)), bounds, max(lengths))


@dataclass(frozen=True)
class LayerInputs:
    """What every layer is told about a row of tokens, or about a left-padded batch of prompts (B x T tokens).

    Attributes:
        positions: int64[N] or int64[B, T], of the rotary embeddings.
        visual: int64[K], which tokens show an image, counted over the row or the flattened batch; None while text is
            generated, where layers of images have nothing to do. An empty one is a row without an image: its new
            paths run on no token, so that all they hold is in the graph.
        context: what cross-attention looks at.
        states: keys and values of the context by number of layer, kept while an answer is generated.
        is_sorted: the layers hold text tokens first, then image tokens (`vlm.language.visual_expert`).
    """

    positions: Tensor
    visual: Tensor | None
    context: Context | None = None
    states: dict[int, tuple[Tensor, Tensor]] | None = None
    is_sorted: bool = False

    @classmethod
    def of(cls, row: Row, context: Context | None = None) -> "LayerInputs":
        return cls(row.positions, row.visual, context)

    def for_sorted_layers(self) -> "LayerInputs":
        return replace(self, is_sorted=True)

    @property
    def num_text(self) -> int:
        assert self.visual is not None
        return self.positions.numel() - len(self.visual)

    @functools.cached_property
    def order(self) -> Tensor:
        """int64[N]: text tokens first, then image tokens, each in the order of the row."""
        assert self.visual is not None
        kind = torch.zeros(self.positions.numel(), dtype=torch.uint8, device=self.positions.device)
        return kind.index_fill(0, self.visual, 1).argsort(stable=True)

    @functools.cached_property
    def inverse(self) -> Tensor:
        """int64[N]: where each token of the row stands in `order`."""
        return torch.empty_like(self.order).scatter(
            0, self.order, torch.arange(len(self.order), device=self.order.device)
        )

    def sort(self, tokens: Tensor) -> Tensor:
        """float[N, D] in the order of the row -> in that of the layers."""
        return tokens.index_select(0, self.order) if self.is_sorted else tokens

    def restore(self, tokens: Tensor) -> Tensor:
        """float[N, D] in the order of the layers -> in that of the row."""
        return tokens.index_select(0, self.inverse) if self.is_sorted else tokens


# -- prompts


@dataclass(frozen=True)
class Prompt:
    """What an answer goes on from.

    Attributes:
        embeds: float[n, D], image features in place.
        positions: int64[n].
        visual: bool[n], which tokens show an image.
        context: float[m, C], what cross-attention looks at.
    """

    embeds: Tensor
    positions: Tensor
    visual: Tensor
    context: Tensor | None = None

    @classmethod
    def split(cls, embeds: Tensor, row: Row, inputs: LayerInputs) -> list["Prompt"]:
        """The sequences of a row, float[N, D]."""
        assert inputs.visual is not None
        lengths = row.cu_seqlens.diff().tolist()
        visual = torch.zeros(len(embeds), dtype=torch.bool, device=embeds.device).index_fill(0, inputs.visual, True)
        context: Sequence[Tensor | None] = [None] * len(lengths)
        if inputs.context is not None:
            context = inputs.context.features.split(inputs.context.cu_seqlens.diff().tolist())
        parts = (tensor.split(lengths) for tensor in (embeds, inputs.positions, visual))
        return [cls(*part) for part in zip(*parts, context, strict=True)]


def pack_context(prompts: Sequence[Prompt]) -> Context | None:
    features = [prompt.context for prompt in prompts if prompt.context is not None]
    return Context.pack(features) if features else None


class PromptCache(DynamicCache):
    """Keys and values of a batch whose prompts the layers are told about; what follows them is text.

    Args:
        prompts: left-padded to one length.
        num_beams: how often each of them is searched for.
    """

    def __init__(self, config: PretrainedConfig, prompts: Sequence[Prompt], *, num_beams: int = 1) -> None:
        super().__init__(config=config)
        self.positions = _pad_left([prompt.positions for prompt in prompts])
        visual = _pad_left([prompt.visual for prompt in prompts]).repeat_interleave(num_beams, dim=0)
        self._prompt = LayerInputs(
            self.positions.repeat_interleave(num_beams, dim=0),
            visual.flatten().nonzero().squeeze(1),
            pack_context(prompts),  # the beams of a prompt look at the same
            states={},
        )
        self._text = replace(self._prompt, visual=None)

    def layer_inputs(self) -> LayerInputs:
        """Of the tokens that come next."""
        return self._text if self.get_seq_length() else self._prompt


def _pad_left(tensors: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(tensors), batch_first=True, padding_side="left")


# -- modules that take them


class InformedLinear(nn.Linear):
    """A linear layer that knows the tokens it is given; the layer that it is in tells it."""

    inputs: LayerInputs | None = None

    def inform(self, inputs: LayerInputs | None) -> None:
        self.inputs = inputs

    @property
    def told(self) -> LayerInputs:
        """Its inputs.

        Raises:
            ValueError: no layer has told it; what surgery added would be left out in silence.
        """
        if self.inputs is None:
            raise ValueError(
                f"{type(self).__name__} was told nothing about its tokens; it runs inside of a layer that does"
            )
        return self.inputs


@contextmanager
def informing(layer: nn.Module, inputs: LayerInputs | None) -> Iterator[None]:
    """Inside, the linear layers of a decoder layer know its inputs.

    Raises:
        ValueError: there are none; what surgery added would be left out in silence.
    """
    if inputs is None:
        raise ValueError("a changed layer takes `layer_inputs`; in generation it is the cache that has them")
    # an adapter's layer calls the partial LoRA that it lies over, which is no child of it
    called = (part for child in layer.modules() for part in (child, getattr(child, "partial", None)))
    linears: list[Any] = [part for part in called if hasattr(part, "inform")]
    for linear in linears:
        linear.inform(inputs)
    try:
        yield
    finally:
        for linear in linears:
            linear.inform(None)


def extend(module: nn.Module, subclass: Callable[[type], type]) -> None:
    """Makes a built module one of a subclass of its class; its tensors, their names and the class's name stay."""
    base = type(module)
    module.__class__ = subclass(base)
    module.__class__.__name__ = base.__name__


def take_inputs(decoder: Any) -> None:
    """Makes a stack (`decoder.layers`) take `layer_inputs`, or find them in the cache, and each of its layers too."""
    for module, subclass in ((decoder, _informed_decoder), *((layer, _informed_layer) for layer in decoder.layers)):
        if not getattr(type(module), "takes_inputs", False):
            extend(module, subclass)


def next_inputs(layer_inputs: LayerInputs | None, cache: Any) -> LayerInputs | None:
    """What is told about the tokens of one forward of a decoder."""
    return cache.layer_inputs() if layer_inputs is None and isinstance(cache, PromptCache) else layer_inputs


@functools.cache
def _informed_decoder(base: Any) -> type:
    class Decoder(base):
        takes_inputs = True

        def forward(self, *args: Any, layer_inputs: LayerInputs | None = None, **kwargs: Any) -> Any:
            inputs = next_inputs(layer_inputs, kwargs.get("past_key_values"))
            return super().forward(*args, layer_inputs=inputs, **kwargs)

    return Decoder


@functools.cache
def _informed_layer(base: Any) -> type:
    class Layer(base):
        takes_inputs = True

        def forward(self, hidden: Tensor, *args: Any, layer_inputs: LayerInputs | None = None, **kwargs: Any) -> Any:
            with informing(self, layer_inputs):
                return super().forward(hidden, *args, **kwargs)

    return Layer
