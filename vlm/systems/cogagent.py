"""CogAgent: A Visual Language Model for GUI Agents (Hong et al., 2023)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vlm.batch import Batch, Views
from vlm.codec import Encoded, ViewStream
from vlm.functional import zero_from
from vlm.language import CrossAttention
from vlm.language.layer_inputs import Context, LayerInputs
from vlm.sample import Sample
from vlm.systems.cogvlm import CogVLM, CogVLMCodec
from vlm.systems.row import STREAM
from vlm.vision import TowerDescription, TowerFacts, see
from vlm.vision.preprocess import ImageTransform

HIGH = "high"
"""The stream of fine views."""


class CogAgentCodec(CogVLMCodec):
    """CogVLM's rows; every image is seen a second time, finer, and not in the row.

    Args:
        high: makes the fine view.
        fine: how many features are made of it.
    """

    def __init__(self, *, high: ImageTransform, fine: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.high = high
        self.fine = fine

    def streams(self, sample: Sample, *, seed: int | None = None) -> dict[str, ViewStream]:
        return super().streams(sample, seed=seed) | {HIGH: ViewStream(self.high, self.high.table)}

    def collate(self, items: Sequence[Encoded], *, counts: Mapping[str, float], packs: int = 1) -> Batch:
        batch = super().collate(items, counts=counts, packs=packs)
        if HIGH not in batch.views:
            return batch
        lengths = [len(text.slots[STREAM]) // self.tower.num_tokens * self.fine for item in items for text in item.text]
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        high = replace(batch.views[HIGH], cu_seqlens=bounds, max_len=max(lengths))
        return replace(batch, views={**batch.views, HIGH: high})


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
        return CogAgentCodec(high=high, fine=self.high.num_tokens, **self.codec_arguments())

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
        views = batch.views[STREAM]
        return self.connector(see(self.vision, views.pixels, keys=views.keys) + self.places.low)

    def layer_inputs(self, batch: Batch) -> LayerInputs:
        return LayerInputs.of(batch.text, self.fine_context(batch))

    def fine_context(self, batch: Batch) -> Context:
        """The features of the fine views, each sequence's own."""
        row, device = batch.text, batch.text.ids.device
        if (views := batch.views.get(HIGH)) is not None:
            assert views.cu_seqlens is not None
            return Context(self._look(views), views.cu_seqlens, views.max_len)
        features = torch.zeros(0, self.high.dim, device=device)
        if batch.counts.get("images"):  # on another rank: see `empty_features`
            features = self._look(Views.blank(*self.view_sizes[HIGH], device=device))[:0]
        elif torch.is_grad_enabled():
            features = features + zero_from(self.vision_high.parameters())
        return Context(features, torch.zeros_like(row.cu_seqlens), max_len=0)

    def _look(self, views: Views) -> Tensor:
        """float[V * P, C]."""
        return (see(self.vision_high, views.pixels, keys=views.keys) + self.places.high).flatten(0, 1)
