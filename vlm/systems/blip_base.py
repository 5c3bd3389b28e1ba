"""What BLIP's fine-tuned systems share: the images of a sample are what its texts look at.

Reading order: `BLIPCodec.encode` of a system (sample to texts), `BLIPTuned.image_features` (pixels to features),
`losses` of the system.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vlm.batch import IGNORE, Batch, TokenSequence
from vlm.codec import Codec, Encoded, ViewStream, pack_rows, read_views
from vlm.errors import UserError
from vlm.language import Decoding
from vlm.language.generation import DecoderPrompt, generate
from vlm.language.med import MedSearch, Writer
from vlm.module import VisionLanguageModule
from vlm.prompts.tokenizer import Tokenizer
from vlm.sample import Message, Sample, TextPart
from vlm.seeding import seed_from
from vlm.vision import TowerDescription, TowerFacts, see
from vlm.vision.preprocess import ImageTransform, RandomCropFlip

STREAM = "image"
IMAGES = "images"
"""Entry of `Batch.labels`: int64[B, k], the images of each sample, counted over the pack; -1 where it has fewer."""
DECODER, ENCODER = "[DEC]", "[ENC]"
"""First token of a text that is written, and of one that is read with an image."""


class BLIPCodec(Codec):
    """Samples with images and one question, or none, and one answer.

    Args:
        tokenizer: of BERT, with `[DEC]` and `[ENC]`.
        transform: of an image to a view.
        augment: what happens to it before, in training.
        max_tokens: longest text, marks included; a longer one is an error, never cut in silence.
    """

    needs_image = True

    def __init__(
        self, *, tokenizer: Tokenizer, transform: ImageTransform, augment: RandomCropFlip | None, max_tokens: int
    ) -> None:
        self.tokenizer = tokenizer
        self.transform = transform
        self.augment = augment
        self.max_tokens = max_tokens

    @cached_property
    def end_id(self) -> int:
        """Of the token that ends a text, [SEP]."""
        return self.tokenizer.eos_id

    def num_tokens(self, width: int, height: int) -> int:
        return 0  # texts look at images, which are among none of them

    def encode(self, sample: Sample, *, seed: int | None = None, generate: bool = False) -> Encoded:
        if len(sample.images) < self.min_images:
            raise sample.error(f"{len(sample.images)} images where {self.min_images} are looked at", kind="image")
        turns = [message for message in sample.messages if message.role != "system"]
        answer = turns.pop() if turns and turns[-1].role == "assistant" else None
        if len(turns) > 1 or (turns and turns[0].role != "user"):
            raise sample.error("a conversation; this system takes one question and one answer, so split it")
        asked = " ".join(words for message in turns if (words := text_of(message)))
        answered = None if answer is None or (generate and not answer.begun) else text_of(answer)
        weight = 1.0 if answer is None else answer.weight
        return self.encode_texts(sample, asked, answered, weight, seed=seed, generate=generate)

    @abstractmethod
    def encode_texts(
        self, sample: Sample, asked: str, answered: str | None, weight: float, *, seed: int | None, generate: bool
    ) -> Encoded:
        """`encode`, given the text of the user, which may be empty, and that of the assistant, if there is one, with
        the weight that its data gives it."""

    def ids(self, sample: Sample, first: str, text: str, *, end: bool = True) -> list[int]:
        """Tokens of a text behind its first mark, ended by [SEP] or open.

        Raises:
            SampleError: it is over the limit.
        """
        literal = [(0, len(text))]  # marks that data spells are text
        ids = [self.tokenizer.token_id(first), *self.tokenizer.encode(text, literal=literal)[0]]
        ids += [self.end_id] if end else []
        if len(ids) > self.max_tokens:
            raise sample.error(
                f"a text of {len(ids)} tokens, over the limit of {self.max_tokens}; shorten it or raise max_tokens",
                kind="too long",
            )
        return ids

    def collate(self, items: Sequence[Encoded], *, counts: Mapping[str, float], packs: int = 1) -> Batch:
        text, rows = pack_rows(items)
        numbers = [len(item.sample.images) for item in items]
        first = torch.tensor(numbers).cumsum(0) - torch.tensor(numbers)
        place = torch.arange(max(numbers))
        images = torch.where(place < torch.tensor(numbers)[:, None], first[:, None] + place, -1)
        return Batch(
            text=text,
            rows=rows,
            views=read_views(items, self._streams, augment=self.augment),
            samples=tuple(item.info() for item in items),
            counts=dict(counts),
            labels={IMAGES: images, **self.labels(items)},
            packs=packs,
        )

    def labels(self, items: Sequence[Encoded]) -> dict[str, Tensor]:
        """Further entries of `Batch.labels`."""
        return {}

    def _streams(self, sample: Sample, *, seed: int | None = None) -> dict[str, ViewStream]:
        return {STREAM: ViewStream(self.transform, self.transform.table)}

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids).strip()


def text_of(message: Message) -> str:
    """The text of a turn, without blanks around it."""
    return "".join(part.text for part in message.content if isinstance(part, TextPart)).strip()


def unlabelled(ids: Sequence[int]) -> TokenSequence:
    """A text of which no token is predicted."""
    return TokenSequence(torch.tensor(ids), torch.full((len(ids),), IGNORE))


def predicted(ids: Sequence[int], *, given: int = 1, weight: float = 1.0) -> TokenSequence:
    """A text of which each token is predicted by those before it, but for the first `given`."""
    tokens = torch.tensor(ids)
    targets = tokens[1:].clone()
    targets[: given - 1] = IGNORE
    return TokenSequence(tokens[:-1], targets, weight=weight)


class BLIPTuned(VisionLanguageModule):
    """pixels -> ViT -> features of all images of a sample, side by side -> what a BERT looks at.

    Args:
        vision: the tower; its class token and last norm are kept.
        tokenizer: of BERT, with `[DEC]` and `[ENC]`.
        augment: random crops and flips in training, and RandAugment behind them.
        max_tokens: longest text.
        seed: of everything that is new or random.
        **arguments: of a subclass.
    """

    system = "blip"
    codec: BLIPCodec
    vision: nn.Module

    def __init__(
        self,
        *,
        vision: TowerDescription,
        tokenizer: Tokenizer,
        augment: RandomCropFlip | None = None,
        max_tokens: int = 40,
        seed: int = 0,
        **arguments: Any,
    ) -> None:
        super().__init__(
            vision=vision, tokenizer=tokenizer, augment=augment, max_tokens=max_tokens, seed=seed, **arguments
        )

    @cached_property
    def tower(self) -> TowerFacts:
        """Facts of the vision tower."""
        return self.arguments["vision"].facts()

    def codec_arguments(self) -> dict[str, Any]:
        """What a `BLIPCodec` is made from."""
        given = self.arguments
        return {
            "tokenizer": given["tokenizer"],
            "transform": ImageTransform(size=self.tower.image_size, mode="squash"),
            "augment": given["augment"],
            "max_tokens": given["max_tokens"],
        }

    def build_text(self, part: str, context_dim: int) -> nn.Module:
        """A BERT that looks at `context_dim` channels.

        Raises:
            UserError: the tokenizer is another one's.
        """
        description, tokenizer = self.arguments[part], self.codec.tokenizer
        if len(tokenizer) > description.vocab_size:
            raise UserError(
                f"model.tokenizer ({tokenizer.path}) makes ids up to {len(tokenizer) - 1}, but {part} has "
                f"{description.vocab_size} token embeddings; give the tokenizer that belongs to it"
            )
        return description.build(context_dim)

    def encode_images(self, batch: Batch) -> Tensor:
        """float[V, P, C] features of every image of a pack."""
        views = batch.views[STREAM]
        return see(self.vision, views.pixels, keys=views.keys)

    def image_features(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """float[B, m, C] of all images of each sample, one behind the other, and bool[B, m], True where there is one.

        None in its place where every sample has one image.
        """
        features, images = self.encode_images(batch), batch.labels[IMAGES]
        if images.shape[1] == 1:
            return features, None
        there = (images >= 0)[:, :, None].expand(-1, -1, features.shape[1])
        return features[images.clamp(min=0)].flatten(1, 2), there.flatten(1)

    def write(
        self, network: Writer, prompts: Sequence[DecoderPrompt], batch: Batch, decoding: Decoding
    ) -> list[list[int]]:
        """Token ids that a decoder goes on with behind each prompt.

        Raises:
            UserError: a choice is asked for, where a text is written.
        """
        if decoding.candidates or decoding.options is not None:
            raise UserError("decoding: captions are written, not chosen; leave options and candidates out")
        return generate(
            MedSearch(network, end_id=self.codec.end_id),
            prompts,
            decoding=decoding,
            seeds=[seed_from(decoding.seed, sample.id) for sample in batch.samples],
            end_ids=[self.codec.end_id],
            pad_id=self.codec.tokenizer.pad_id,
            synced=self.is_sharded,
        )


def seen(features: Tensor, mask: Tensor | None) -> list[Tensor]:
    """What each sample's text looks at, float[m, C] without padding."""
    return list(features) if mask is None else [own[real] for own, real in zip(features, mask, strict=True)]
