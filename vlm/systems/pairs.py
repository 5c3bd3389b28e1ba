"""What systems share that compare images with texts: the codec, which candidates are drawn, the queue."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.batch import IGNORE, Batch, Padded, TokenSequence
from vlm.codec import Encoded
from vlm.errors import UserError
from vlm.in_batch import candidates, draw_uniform
from vlm.prompts.cleaning import clean_caption
from vlm.sample import Sample
from vlm.sample.places import places_named
from vlm.seeding import seed_from
from vlm.systems.blip_base import DECODER, BLIPCodec, BLIPTuned, text_of, unlabelled

IMAGE_ID = "image_id"
"""Entry of `Batch.labels`: int64[B], the same for samples that show the same image."""
CUT = "cut_answers"


class PairCodec(BLIPCodec):
    """One image, or the frames of a video, and a caption: `[CLS]` caption `[SEP]`.

    A caption is cleaned and cut to `max_words`, and its tokens to `max_tokens`, as published; how many were cut is
    logged beside the losses (`cut_answers`). To be evaluated, a sample has all texts in its `answers`, of which the
    first one is in its losses. A caption is written behind `[DEC]`, and behind the begun one of the assistant.

    Args:
        terms: {loss term: its denominator per sample}.
        writes: the tokens of captions are predicted too, as term `lm`.
        max_words: longest caption, before it is tokenized.
        **arguments: of `BLIPCodec`.
    """

    def __init__(self, *, terms: dict[str, float], writes: bool, max_words: int = 30, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.terms, self.writes, self.max_words = terms, writes, max_words

    def encode(self, sample: Sample, *, seed: int | None = None, generate: bool = False) -> Encoded:
        if not sample.images:
            raise sample.error("0 images where one is compared with texts; give it one", kind="image")
        if generate:
            begun = [clean_caption(text_of(message), self.max_words) for message in sample.messages if message.begun]
            ids = self.ids(sample, DECODER, "".join(begun), end=False)
            return Encoded(sample, (unlabelled(ids),), seed=seed, places=places_named(sample))
        told = [message for message in sample.messages if message.role == "assistant"]
        if weights := {message.weight for message in told} - {1.0}:
            raise sample.error(
                f"its text has weight {weights.pop():g}, but pairs are compared with each other, all of them alike; "
                "remove the weight, or the sample"
            )
        captions = [text_of(message) for message in told]
        if seed is None and sample.answers:
            captions = [text for text, _ in sample.answers]
        captions = [clean_caption(text, len(text) + 1) for text in captions]
        if not captions or (seed is not None and not captions[0]):
            raise sample.error("has no text to compare its image with; add an assistant message", kind="no label")
        made = [self._caption(text) for text in captions]
        ids, _ = made[0]
        counts = {**self.terms, CUT: float(sum(cut for _, cut in made))}
        first = unlabelled(ids)
        if self.writes:
            tokens = torch.tensor(ids)
            first = TokenSequence(tokens, torch.cat([tokens[1:], tokens.new_full((1,), IGNORE)]))
            counts["lm"] = len(ids) - 1.0
        texts = (first, *(unlabelled(ids) for ids, _ in made[1:]))
        return Encoded(sample, texts, counts=counts, seed=seed, places=places_named(sample))

    def _caption(self, text: str) -> tuple[list[int], bool]:
        """Tokens of a cleaned caption, and whether any of it had to go."""
        words = clean_caption(text, self.max_words)
        ids = self.tokenizer.encode(words, literal=[(0, len(words))])[0]
        kept = ids[: self.max_tokens - 2]
        return [self.tokenizer.token_id("[CLS]"), *kept, self.end_id], words != text or kept != ids

    def encode_texts(
        self, sample: Sample, asked: str, answered: str | None, weight: float, *, seed: int | None, generate: bool
    ) -> Encoded:
        raise AssertionError("a pair has no question")

    def labels(self, items: Sequence[Encoded]) -> dict[str, Tensor]:
        names = [(item.sample.source, item.sample.group or item.sample.id) for item in items]
        return {IMAGE_ID: torch.tensor([seed_from(*name) for name in names], dtype=torch.int64)}


def first_texts(batch: Batch, pad_id: int) -> Padded:
    """The first text of each sample: int64[B, n] ids and bool[B, n] mask."""
    padded = batch.text.padded(pad_id)
    size = len(batch.real)
    if len(padded.ids) == size:
        return padded
    places = torch.searchsorted(batch.text.owner, torch.arange(size, device=batch.text.owner.device))
    return Padded(padded.ids[places], padded.mask[places])


def with_first(ids: Tensor, mark: int) -> Tensor:
    """int64[S, n] with another first token, which says what a text is read or written for."""
    return torch.cat([torch.full_like(ids[:, :1], mark), ids[:, 1:]], dim=1)


def draw(weights: Tensor, chance: Tensor) -> Tensor:
    """int64[B]: one column of each row of float[B, C], as likely as its weight, by a number in [0, 1) for each row."""
    sums = weights.cumsum(1)
    wanted = chance[:, None].to(sums) * sums[:, -1:]
    found = torch.searchsorted(sums, wanted, right=True).squeeze(1)
    last = (weights > 0).to(torch.int64) * torch.arange(weights.shape[1], device=weights.device)
    return found.minimum(last.amax(1))


class PairModule(BLIPTuned):
    """Compares images with texts, and looks at a pair again: what BLIP and BLIP-2's first stage share.

    A subclass says in `pair_logits` how a pair is looked at.
    """

    codec: PairCodec

    @abstractmethod
    def pair_logits(self, ids: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        """float[N, 2]: that texts and images, pair by pair, do not and do belong together."""

    def match_loss(self, batch: Batch, features: Tensor, ids: Tensor, mask: Tensor, wrong: Sequence[Tensor]) -> Tensor:
        """Right pairs, each text with a wrong image, each image with a wrong text.

        Args:
            wrong: float[B, C] each: how likely a candidate is drawn as the wrong text of an image, and as the wrong
                image of a text.
        """
        chance = draw_uniform(batch, 2)
        wrong_text, wrong_image = (draw(weights, chance[:, at]) for at, weights in enumerate(wrong))
        if batch.negatives == "step":  # texts of one length everywhere
            room = (0, self.arguments["max_tokens"] - ids.shape[1])
            ids, mask = F.pad(ids, room, value=self.codec.tokenizer.pad_id), F.pad(mask, room)
        others = candidates(features, batch, gradient=True)[wrong_image]
        other_ids, other_mask = candidates(ids, batch)[wrong_text], candidates(mask, batch)[wrong_text]
        logits = self.pair_logits(
            torch.cat([ids, ids, other_ids]),
            torch.cat([mask, mask, other_mask]),
            torch.cat([features, others, features]),
        )
        labels = torch.arange(len(logits), device=logits.device) < len(ids)
        losses = F.cross_entropy(logits.float(), labels.long(), reduction="none")
        there = [weights.amax(1) > 0 for weights in reversed(wrong)]  # one sample alone has no wrong partner
        return torch.where(torch.cat([batch.real, *(own & batch.real for own in there)]), losses, 0.0).sum()

    def text_states(self, ids: Tensor) -> Tensor:
        """int64[S, `max_tokens`]: texts as `match_logits` takes them, of one length in all packs."""
        return F.pad(ids, (0, self.arguments["max_tokens"] - ids.shape[1]), value=self.codec.tokenizer.pad_id)

    def match_logits(self, image_states: Tensor, text_states: Tensor) -> Tensor:
        mask = text_states != self.codec.tokenizer.pad_id
        longest = max(1, int(mask.sum(1).max()))
        return self.pair_logits(text_states[:, :longest], mask[:, :longest], image_states)


class Projections(nn.Module):
    """Into the space where images and texts are compared."""

    def __init__(self, image_dim: int, text_dim: int, dim: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(image_dim, dim), nn.Linear(text_dim, dim)


class Heads(nn.Module):
    """The temperature of the contrast, and whether an image and a text match: no, yes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.empty(1))
        self.match = nn.Linear(dim, 2)

    def initialise_new(self) -> None:
        nn.init.constant_(self.temperature, 0.07)


class FeatureQueue(nn.Module):
    """Momentum features of the last samples, float32[D, size] of each kind, written round and round.

    Args:
        ids: which image each of them belongs to is kept too, int64[1, size]; -100 where none is yet.
    """

    image: Tensor
    text: Tensor
    ids: Tensor | None
    place: Tensor

    def __init__(self, dim: int, size: int, *, ids: bool) -> None:
        super().__init__()
        for kind in ("image", "text"):
            self.register_buffer(kind, torch.empty(dim, size))
        self.register_buffer("ids", torch.empty(1, size, dtype=torch.int64) if ids else None)
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))

    def initialise_new(self) -> None:
        for features in (self.image, self.text):
            features.copy_(F.normalize(torch.randn(features.shape), dim=0))
        if self.ids is not None:
            self.ids.fill_(-100)
        self.place.zero_()

    def check(self, batch_size: int) -> None:
        """
        Raises:
            UserError: steps do not fill the queue evenly.
        """
        size = self.image.shape[1]
        if size % batch_size:
            raise UserError(
                f"model.queue: {size} is no multiple of the batch of {batch_size} samples (data.batch.size); "
                f"set it to {size // batch_size * batch_size or batch_size}"
            )

    def push(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Takes in float[N, D] of each kind and int64[N]; the place is a tensor, so that no device is waited for."""
        size = self.image.shape[1]
        assert size % len(image) == 0, "the queue holds whole steps"
        places = (self.place + torch.arange(len(image), device=self.place.device)) % size
        self.image.index_copy_(1, places, image.T.to(self.image))
        self.text.index_copy_(1, places, text.T.to(self.text))
        if self.ids is not None:
            self.ids.index_copy_(1, places, ids[None])
        self.place.copy_((self.place + len(image)) % size)
