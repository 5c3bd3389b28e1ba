"""A system whose layers are told everything: marks around images, shared positions, an expert, a second finer view."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.batch import Batch, TokenSequence
from vlm.language.layer_inputs import Context, LayerInputs
from vlm.functional import zero_from
from vlm.sample import Sample
from vlm.systems.row import STREAM
from vlm.systems.spliced import SplicedCodec, SplicedDecoder
from vlm.vision import TowerDescription


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
    """A picture takes a mark, its patches and a mark."""

    def num_tokens(self, width: int, height: int) -> int:
        return self.tower.num_tokens + 2

    def image_tokens(self, sample: Sample) -> list[int]:
        return [self.tower.num_tokens + 2] * len(sample.images)

    def sequence(self, sample: Sample, ids: Sequence[int], targets: Tensor, slots: Sequence[int]) -> TokenSequence:
        tokens, places = torch.tensor(ids), torch.tensor(slots, dtype=torch.int64)
        positions, visual = image_blocks(tokens, places, self.tower.num_tokens + 2)
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
        super().__init__(**arguments)
        self.arguments |= {"vision_high": vision_high}
        self.high = vision_high.facts()
        known = ("tokenizer", "template", "tower", "transform", "augment", "max_tokens")
        self.codec = CogCodec(**{name: getattr(self.codec, name) for name in known})

    def build_parts(self) -> dict[str, nn.Module]:
        parts = super().build_parts()
        language = parts.pop("language")
        new = {"marks": Marks(language.config.hidden_size), "vision_high": self.arguments["vision_high"].build()}
        return parts | new | {"language": language}

    def image_modules(self) -> tuple[nn.Module, ...]:
        return *super().image_modules(), self.marks

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.marks(super().encode_images(pixels))

    def layer_inputs(self, batch: Batch) -> LayerInputs:
        owners = batch.text.owner.tolist()
        views = batch.views.get(STREAM)
        if views is None:
            return LayerInputs.of(batch.text, Context.pack([self._nothing(batch)] * len(owners)))
        features, of = self._look(views.pixels), views.sample_of_image
        return LayerInputs.of(batch.text, Context.pack([features[of == owner].flatten(0, 1) for owner in owners]))

    def _look(self, pixels: Tensor) -> Tensor:
        dtype = next(self.vision_high.parameters()).dtype
        return self.vision_high(F.interpolate(pixels.to(dtype), self.high.image_size))

    def _nothing(self, batch: Batch) -> Tensor:
        device = batch.text.ids.device
        if batch.counts.get("images"):
            return self._look(torch.zeros(1, 3, *self.blank_size, device=device)).flatten(0, 1)[:0]
        nothing = torch.zeros(0, self.high.dim, device=device)
        return nothing + zero_from(self.vision_high.parameters()) if torch.is_grad_enabled() else nothing
