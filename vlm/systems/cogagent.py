"""CogAgent: A Visual Language Model for GUI Agents (Hong et al., 2023)."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vlm.batch import Batch, Views
from vlm.codec import ViewStream
from vlm.functional import zero_from
from vlm.language import CrossAttention
from vlm.language.layer_inputs import Context, LayerInputs
from vlm.sample import Sample
from vlm.systems.cogvlm import CogVLM, CogVLMCodec
from vlm.systems.row import STREAM
from vlm.systems.spliced import see
from vlm.vision import TowerDescription, TowerFacts
from vlm.vision.preprocess import ImageTransform

HIGH = "high"
"""The stream of fine views."""


class CogAgentCodec(CogVLMCodec):
    """CogVLM's rows; every image is seen a second time, finer, and not in the row.

    Args:
        high: makes the fine view.
    """

    def __init__(self, *, high: ImageTransform, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.high = high

    def streams(self, sample: Sample, *, seed: int | None = None) -> dict[str, ViewStream]:
        return super().streams(sample, seed=seed) | {HIGH: ViewStream(self.high)}


class Places(nn.Module):
    """Learned vectors for the places of the features of both views; zero at the start, which changes nothing."""

    def __init__(self, low: TowerFacts, high: TowerFacts) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.empty(low.num_tokens, low.dim))
        self.high = nn.Parameter(torch.empty(high.num_tokens, high.dim))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.low)
        nn.init.zeros_(self.high)


class CogAgent(CogVLM):
    """CogVLM at 224 px, whose every layer also looks at a view of 1120 px.

    ::

        image, squashed to 224 px  -> EVA02-CLIP-E, + `places.low`            float[V, 256, 1792]
          -> connector -> 258 tokens of the row, which go through the visual expert
        image, squashed to 1120 px -> EVA02-CLIP-L, 23 of 24 blocks, patches only
          -> + `places.high`                                                  float[V, 6400, 1024]
          -> what the cross-attention of every layer looks at (`vlm.language.CrossAttention`)

        layer: h + self_attn(norm(h)) -> h + cross_attn(norm(h)) -> h + mlp(norm(h))
          all tokens, text and image, ask with queries of width 1024; keys and values of an image are computed once

    So the row stays as short as at 224 px. Stage 1a trains the fine tower, its places and the cross-attention, 1b the
    visual expert with them, stages 2 and 3 everything. Where there is no image, it is Vicuna.

    Args:
        vision_high: the tower of the fine view.
        cross_width: of queries, keys and values of the cross-attention, over all heads.
        cross_heads: number of its heads.
        **arguments: as in `CogVLM`.
    """

    system = "cogagent"
    codec: CogAgentCodec
    vision_high: nn.Module
    places: Places

    def __init__(
        self, *, vision_high: TowerDescription, cross_width: int = 1024, cross_heads: int = 32, **arguments: Any
    ) -> None:
        super().__init__(vision_high=vision_high, cross_width=cross_width, cross_heads=cross_heads, **arguments)
        self.register_surgery(CrossAttention(context=self.high.dim, width=cross_width, heads=cross_heads))

    @cached_property
    def high(self) -> TowerFacts:
        """Facts of the tower of the fine view."""
        return self.arguments["vision_high"].facts()

    def make_codec(self) -> CogAgentCodec:
        high = ImageTransform(size=self.high.image_size, mode=self.arguments["image"])
        return CogAgentCodec(high=high, **self.codec_arguments())

    def build_parts(self) -> dict[str, nn.Module]:
        parts = super().build_parts()
        parts |= {"vision_high": self.arguments["vision_high"].build(), "places": Places(self.tower, self.high)}
        return {name: parts[name] for name in ("vision", "vision_high", "places", "connector", "language")}

    @property
    def view_sizes(self) -> dict[str, tuple[int, int]]:
        return super().view_sizes | {HIGH: (self.high.image_size, self.high.image_size)}

    def image_modules(self) -> tuple[nn.Module, ...]:
        return *super().image_modules(), self.places

    def encode_images(self, batch: Batch) -> Tensor:
        return self.connector(see(self.vision, batch.views[STREAM].pixels) + self.places.low)

    def layer_inputs(self, batch: Batch) -> LayerInputs:
        row = batch.text
        slots = row.slots[STREAM].view(-1, self.codec.tower.num_tokens)
        of_image = torch.searchsorted(row.cu_seqlens[1:].to(torch.int64), slots[:, 0].contiguous(), right=True)
        images = torch.zeros_like(row.cu_seqlens)  # int32[S + 1], of the sequence before each bound
        images = images.index_add(0, of_image + 1, torch.ones_like(of_image, dtype=images.dtype))
        bounds = (images.cumsum(0) * self.high.num_tokens).to(torch.int32)
        features = self.fine_features(batch)
        return LayerInputs.of(row, Context(features, bounds, max_len=len(features)))

    def fine_features(self, batch: Batch) -> Tensor:
        """float[I * P, C] of all images of a pack, in the order of the row."""
        if HIGH in batch.views:
            return self._look(batch.views[HIGH].pixels)
        device = batch.text.ids.device
        if batch.counts.get("images"):  # on another rank: see `empty_features`
            return self._look(Views.blank(*self.view_sizes[HIGH], device=device).pixels)[:0]
        nothing = torch.zeros(0, self.high.dim, device=device)
        return nothing + zero_from(self.vision_high.parameters()) if torch.is_grad_enabled() else nothing

    def _look(self, pixels: Tensor) -> Tensor:
        """float[V, 3, H, W] -> float[V * P, C]."""
        return (see(self.vision_high, pixels) + self.places.high).flatten(0, 1)
