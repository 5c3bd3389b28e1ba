"""Fuyu-8B: A Multimodal Architecture for AI Agents (Adept, 2023). It has no paper; facts are those of its release."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlm.batch import Batch, TokenSequence, Views
from vlm.codec import Encoded, ViewStream, read_views
from vlm.connectors import Linear
from vlm.errors import UserError
from vlm.geometry import Placement, View
from vlm.language import LanguagePart
from vlm.prompts import get_template
from vlm.prompts.fuyu import NEWLINE
from vlm.prompts.tokenizer import Tokenizer
from vlm.sample import Sample
from vlm.systems.row import STREAM, RowCodec, RowDecoder
from vlm.vision.patches import Patches, channels_last


class FuyuCodec(RowCodec):
    """Rows in which an image takes a token for each of its patches and one for each row of them.

    Places count in pixels of the image as it is cut, after it was scaled down.
    """

    joins_views = True

    def __init__(self, *, patches: Patches, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.patches = patches

    def num_tokens(self, width: int, height: int) -> int:
        columns, rows = self.patches.grid(width, height)
        return (columns + 1) * rows

    def image_tokens(self, sample: Sample, *, seed: int | None = None) -> list[int]:
        return [self.num_tokens(*self._size(sample, at)) for at in range(len(sample.images))]

    def view(self, width: int, height: int, *, image: int = 0, seed: int | None = None) -> View:
        across, down = self.patches.scaled(width, height)
        columns, rows = self.patches.grid(width, height)
        # the published factor, of both directions; its float32 decides where half a number is rounded to
        side, scale = self.patches.side, torch.tensor(down / height).item()
        shown = Placement(scale_x=across / (columns * side), scale_y=down / (rows * side))
        return View(Placement(), (width * scale, height * scale), shown=shown)

    def sequence(self, sample: Sample, ids: np.ndarray, targets: Tensor, slots: np.ndarray) -> TokenSequence:
        newline = self.tokenizer.token_id(NEWLINE)
        written, patches, at_image = ids.copy(), np.ones(len(slots), dtype=bool), 0
        for at in range(len(sample.images)):
            columns, rows = self.patches.grid(*self._size(sample, at))
            ends = at_image + (columns + 1) * np.arange(1, rows + 1)
            patches[ends - 1] = False
            at_image = ends[-1]
        written[slots[~patches]] = newline
        return super().sequence(sample, written, targets, slots[patches])

    def read(self, items: Sequence[Encoded]) -> dict[str, Views]:
        stream = ViewStream(self.patches, self.patches.table, self.patches.grid)
        return read_views(items, lambda sample, seed: {STREAM: stream})

    def _size(self, sample: Sample, image: int) -> tuple[int, int]:
        size = sample.images[image].size(sample)
        try:
            self.patches.scaled(*size)
        except UserError as error:
            raise sample.error(f"image {sample.images[image].name!r}: {error}") from error
        return size


class Fuyu(RowDecoder):
    """An image is its patches, and a decoder is all there is.

    ::

        image, at its own size, scaled down where it is larger than 1920 x 1080
          -> patches of 30 x 30, the colours of a pixel together        float[V, 2700]
          -> Linear                                                     float[V, D]
          -> row by row, the token |NEWLINE| behind each row; then <s>, the text, <0x04>, the answer
          -> Persimmon-8B; loss on the answer

    Nothing about its training is published: the recipe, which trains everything, is ours.

    Args:
        patches: how an image is cut.
        language: the decoder.
        tokenizer: of the decoder; it has `|NEWLINE|`.
        template: name of the conversation template (`vlm.prompts`).
        max_tokens: longest sample.
        seed: of everything that is new or random.
    """

    system = "fuyu"
    connector: nn.Linear

    def __init__(
        self,
        *,
        patches: Patches,
        language: LanguagePart,
        tokenizer: Tokenizer,
        template: str = "fuyu",
        max_tokens: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__(
            patches=patches, language=language, tokenizer=tokenizer, template=template, max_tokens=max_tokens, seed=seed
        )
        self.patches = patches

    def make_codec(self) -> FuyuCodec:
        given = self.arguments
        return FuyuCodec(
            patches=given["patches"],
            tokenizer=given["tokenizer"],
            template=get_template(given["template"]),
            max_tokens=given["max_tokens"],
        )

    def build_parts(self) -> dict[str, nn.Module]:
        language = self.build_language()
        return {
            "connector": Linear().build(3 * self.patches.side**2, language.config.hidden_size),
            "language": language,
        }

    @property
    def view_sizes(self) -> dict[str, tuple[int, int]]:
        return {STREAM: (self.patches.side, self.patches.side)}

    def image_modules(self) -> tuple[nn.Module, ...]:
        return (self.connector,)

    def encode_images(self, batch: Batch) -> Tensor:
        return self.connector(channels_last(batch.views[STREAM].pixels).to(self.connector.weight.dtype))[:, None]
