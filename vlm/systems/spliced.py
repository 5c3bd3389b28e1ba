"""Systems whose image features take the place of placeholder tokens in a decoder's row (`vlm.systems.row`)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from vlm.batch import Batch, Views
from vlm.codec import Encoded, ViewStream, read_views
from vlm.connectors import Connector
from vlm.geometry import View
from vlm.language import LanguagePart
from vlm.prompts import get_template
from vlm.prompts.template import Template
from vlm.prompts.tokenizer import Tokenizer
from vlm.sample import Sample
from vlm.seeding import seed_from
from vlm.systems.row import STREAM, RowCodec, RowDecoder
from vlm.vision import TowerDescription, TowerFacts, see
from vlm.vision.preprocess import ImageMode, ImageTransform, RandomCropFlip


class SplicedCodec(RowCodec):
    """Rows in which every image takes a fixed number of tokens; subclasses may give it a number of its own.

    Args:
        tower: facts of the vision tower, `num_tokens` behind the connector; one view per image.
        max_tokens: longest sample, image tokens included; a longer one is an error, never cut in silence. Documents
            are cut to it, and that is counted (`vlm.prompts.documents`).
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        template: Template,
        tower: TowerFacts,
        transform: ImageTransform,
        augment: RandomCropFlip | None,
        max_tokens: int,
    ) -> None:
        super().__init__(tokenizer=tokenizer, template=template, max_tokens=max_tokens)
        self.tower = tower
        self.transform = transform
        self.augment = augment

    def num_tokens(self, width: int, height: int) -> int:
        return self.tower.num_tokens

    def view(self, width: int, height: int, *, image: int = 0, seed: int | None = None) -> View:
        side = float(self.transform.size)
        if self.augment is None or seed is None:
            return View(self.transform.placement(width, height), (side, side))
        # asked for regions alone, and a sample that has some is not mirrored
        cut = self.augment.placement(width, height, seed=seed_from(seed, image), places="regions")
        return View(cut.then(self.transform.placement(self.augment.size, self.augment.size)), (side, side))

    def image_tokens(self, sample: Sample, *, seed: int | None = None) -> list[int]:
        return [self.tower.num_tokens] * len(sample.images)

    def streams(self, sample: Sample, *, seed: int | None = None) -> dict[str, ViewStream]:
        """How the images of a sample are seen, {stream: from an image to its views}."""
        return {STREAM: ViewStream(self.transform, self.transform.table)}

    def read(self, items: Sequence[Encoded]) -> dict[str, Views]:
        return read_views(items, self.streams, augment=self.augment)


class SplicedDecoder(RowDecoder):
    """pixels -> vision tower -> connector -> features spliced into the token row -> language model -> label positions.

    Args:
        vision: the tower.
        connector: from the tower's width to the language model's.
        language: the decoder.
        tokenizer: of the decoder. Tokens it adds get rows of their own (`vlm.language.NewTokens`).
        template: name of the conversation template (`vlm.prompts`).
        image: how an image becomes a square view: `pad` to square with the mean colour, `crop` the centre after
            resizing the short edge, or `squash`.
        augment: random crops and flips before it, in training, and perhaps RandAugment.
        max_tokens: longest sample.
        seed: of everything that is new or random.
        **arguments: of a subclass.
    """

    codec: SplicedCodec
    vision: nn.Module
    connector: nn.Module

    def __init__(
        self,
        *,
        vision: TowerDescription,
        connector: Connector,
        language: LanguagePart,
        tokenizer: Tokenizer,
        template: str,
        image: ImageMode = "pad",
        augment: RandomCropFlip | None = None,
        max_tokens: int = 2048,
        seed: int = 0,
        **arguments: Any,
    ) -> None:
        super().__init__(
            vision=vision,
            connector=connector,
            language=language,
            tokenizer=tokenizer,
            template=template,
            image=image,
            augment=augment,
            max_tokens=max_tokens,
            seed=seed,
            **arguments,
        )

    @cached_property
    def tower(self) -> TowerFacts:
        """Facts of the vision tower, about the views of a batch."""
        return self.arguments["vision"].facts()

    def make_codec(self) -> SplicedCodec:
        return SplicedCodec(**self.codec_arguments())

    def codec_arguments(self) -> dict[str, Any]:
        """What `SplicedCodec` is made from."""
        given = self.arguments
        return {
            "tokenizer": given["tokenizer"],
            "template": get_template(given["template"]),
            "tower": replace(self.tower, num_tokens=given["connector"].num_tokens(self.tower.num_tokens)),
            "transform": ImageTransform(size=self.tower.image_size, mode=given["image"]),
            "augment": given["augment"],
            "max_tokens": given["max_tokens"],
        }

    def build_parts(self) -> dict[str, nn.Module]:
        language = self.build_language()
        return {
            "vision": self.arguments["vision"].build(),
            "connector": self.arguments["connector"].build(self.tower.dim, language.config.hidden_size),
            "language": language,
        }

    @property
    def view_sizes(self) -> dict[str, tuple[int, int]]:
        return {STREAM: (self.tower.image_size, self.tower.image_size)}

    def image_modules(self) -> tuple[nn.Module, ...]:
        return self.vision, self.connector

    def encode_images(self, batch: Batch) -> Tensor:
        views = batch.views[STREAM]
        return self.connector(see(self.vision, views.pixels, keys=views.keys))
