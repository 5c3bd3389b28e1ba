"""A system whose layers are told everything: marks around images, shared positions, an expert, a second finer view."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vlm.batch import Batch, TokenSequence, Views
from vlm.codec import ViewStream
from vlm.functional import zero_from
from vlm.language.layer_inputs import Context, LayerInputs
from vlm.sample import Sample
from vlm.systems.row import STREAM
from vlm.systems.spliced import SplicedCodec, SplicedDecoder
from vlm.vision import TowerDescription, TowerFacts
from vlm.vision.preprocess import ImageTransform

HIGH = "high"


def image_blocks(ids: Tensor, slots: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """CogVLM's rule: positions int64[n] and visual tokens int64[k] of a sequence.

    Args:
        slots: those of images, each a block of `width`: a mark, patches, a mark.
    """
    blocks = slots.view(-1, width)
    steps = torch.ones_like(ids)
    steps[blocks[:, 2:-1]] = 0  # all patches have the number of the first one
    return steps.cumsum(0) - 1, blocks[:, :-1].flatten()


class CogCodec(SplicedCodec):
    """An image takes a mark, its patches and a mark; it is seen a second time in the stream `high`."""

    def __init__(self, *, high: ImageTransform, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.high = high

    def streams(self, sample: Sample, *, seed: int | None = None) -> dict[str, ViewStream]:
        return super().streams(sample, seed=seed) | {HIGH: ViewStream(self.high)}

    def sequence(self, sample: Sample, ids: Sequence[int], targets: Tensor, slots: Sequence[int]) -> TokenSequence:
        tokens, places = torch.tensor(ids), torch.tensor(slots, dtype=torch.int64)
        positions, visual = image_blocks(tokens, places, self.tower.num_tokens)
        return TokenSequence(tokens, targets, slots={STREAM: places}, positions=positions, visual=visual)


class Marks(nn.Module):
    """float[V, P, D] -> float[V, P + 2, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.boi, self.eoi = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))

    def initialise_new(self) -> None:
        nn.init.normal_(self.boi)
        nn.init.normal_(self.eoi)

    def forward(self, features: Tensor) -> Tensor:
        boi, eoi = (mark.expand(len(features), 1, -1) for mark in (self.boi, self.eoi))
        return torch.cat([boi, features, eoi], dim=1)


class TinyCog(SplicedDecoder):
    """Its surgery is `VisualExpert` and `CrossAttention`; all images of a sample are looked at by cross-attention."""

    system = "tiny_cog"

    def __init__(self, *, vision_high: TowerDescription, **arguments: Any) -> None:
        super().__init__(vision_high=vision_high, **arguments)

    @cached_property
    def high(self) -> TowerFacts:
        return self.arguments["vision_high"].facts()

    def make_codec(self) -> CogCodec:
        arguments = self.codec_arguments()
        marked = replace(arguments["tower"], num_tokens=arguments["tower"].num_tokens + 2)
        high = ImageTransform(size=self.high.image_size, mode=self.arguments["image"])
        return CogCodec(high=high, **arguments | {"tower": marked})

    def build_parts(self) -> dict[str, nn.Module]:
        parts = super().build_parts()
        language = parts.pop("language")
        new = {"marks": Marks(language.config.hidden_size), "vision_high": self.arguments["vision_high"].build()}
        return parts | new | {"language": language}

    @property
    def view_sizes(self) -> dict[str, tuple[int, int]]:
        return super().view_sizes | {HIGH: (self.high.image_size, self.high.image_size)}

    def image_modules(self) -> tuple[nn.Module, ...]:
        return *super().image_modules(), self.marks

    def encode_images(self, batch: Batch) -> Tensor:
        return self.marks(super().encode_images(batch))

    def layer_inputs(self, batch: Batch) -> LayerInputs:
        row, views = batch.text, batch.views.get(HIGH)
        features = self._nothing(batch) if views is None else self._look(views.pixels)
        first = row.slots[STREAM].view(-1, self.tower.num_tokens + 2)[:, 0].contiguous()  # of each image
        sequence = torch.searchsorted(row.cu_seqlens[1:].to(torch.int64), first, right=True)
        images = torch.zeros_like(row.cu_seqlens).index_add(
            0, sequence + 1, torch.ones_like(sequence, dtype=torch.int32)
        )
        bounds = (images.cumsum(0) * self.high.num_tokens).to(torch.int32)
        return LayerInputs.of(row, Context(features, bounds, max_len=len(features)))

    def _look(self, pixels: Tensor) -> Tensor:
        """float[V, 3, H, W] -> float[V * P, C]."""
        return self.vision_high(pixels.to(next(self.vision_high.parameters()).dtype)).flatten(0, 1)

    def _nothing(self, batch: Batch) -> Tensor:
        device = batch.text.ids.device
        if batch.counts.get("images"):
            return self._look(Views.blank(*self.view_sizes[HIGH], device=device).pixels)[:0]
        nothing = torch.zeros(0, self.high.dim, device=device)
        return nothing + zero_from(self.vision_high.parameters()) if torch.is_grad_enabled() else nothing
