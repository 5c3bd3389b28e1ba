"""Decoders whose row holds text and, in the place of marks, what images became.

Reading order: `RowCodec.encode` (sample to tokens), `RowDecoder.encode_images` (pixels to features),
`RowDecoder.embed_row` (splice), `RowDecoder.losses` (decode, loss).
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm.batch import IGNORE, Batch, TokenSequence, Views, next_token_targets
from vlm.codec import Codec, Encoded, pack_rows
from vlm.errors import SetupError, UserError
from vlm.functional import splice, zero_from
from vlm.geometry import Box, View
from vlm.language import Decoding, LanguagePart, NewTokens
from vlm.language.causal_lm import label_logits
from vlm.language.choosing import WeighedChoices, weigh_choices
from vlm.language.generation import generate
from vlm.language.label_loss import label_loss
from vlm.language.layer_inputs import LayerInputs, Prompt
from vlm.module import VisionLanguageModule
from vlm.prompts.documents import documents_of, fit_document
from vlm.prompts.regions import find_boxes, write_regions
from vlm.prompts.template import IMAGE, Template, Tokenized
from vlm.prompts.tokenizer import Tokenizer
from vlm.sample import ImagePart, Sample
from vlm.sample.places import places_named
from vlm.seeding import seed_from

STREAM = "image"


class RowCodec(Codec):
    """Rows in which an image takes as many tokens as `num_tokens` says for its size.

    Args:
        max_tokens: longest sample, image tokens included; a longer one is an error, never cut in silence. Documents
            are cut to it, and that is counted (`vlm.prompts.documents`).
    """

    def __init__(self, *, tokenizer: Tokenizer, template: Template, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.max_tokens = max_tokens

    def find_boxes(self, text: str, *, size: tuple[float, float]) -> list[Box]:
        return find_boxes(text, self.template.regions, size=size)

    def render_regions(self, sample: Sample, *, seed: int | None = None) -> Sample:
        def view(image: int) -> View:
            width, height = sample.images[image].size(sample)
            return self.view(width, height, image=image, seed=seed)

        return write_regions(sample, self.template.regions, view=view)

    def encode(self, sample: Sample, *, seed: int | None = None, generate: bool = False) -> Encoded:
        if len(documents := documents_of(sample)) > 1:
            return concat_documents([self.encode(one, seed=seed, generate=generate) for one in documents])
        places = places_named(sample)
        sample = self.render_regions(sample, seed=seed)
        try:
            tokens, cut = self.tokenize(sample, generate=generate)
        except SetupError:
            raise
        except UserError as error:
            raise sample.error(str(error), kind=error.kind) from error
        limit = None if generate else self.max_tokens  # the end of a prompt is what is to be continued
        image_tokens = self.image_tokens(sample, seed=seed)
        sample, tokens, widths, events = fit_document(sample, tokens, image_tokens, max_tokens=limit)
        ids, labels, slots = self.reserve(tokens.ids, tokens.labels, widths)
        if len(ids) > self.max_tokens:
            raise sample.error(
                f"{len(ids)} tokens ({len(slots)} of them for {len(sample.images)} images), over the limit of "
                f"{self.max_tokens}; shorten it or raise max_tokens",
                kind="too long",
            )
        targets = next_token_targets(torch.tensor(labels))
        num_labels = int((targets != IGNORE).sum())
        if not generate and num_labels == 0:
            template = f"no token is trained under this template ({self.template.name})"
            raise sample.error(f"{template}; is there an answer?", kind="no label")
        text = self.sequence(sample, ids, targets, slots)
        count = float(num_labels)
        if not generate and (factors := {message.weight for message in sample.messages} - {0.0, 1.0}):
            weight = self._weights(sample, sorted(factors), widths)
            text = replace(text, weight=weight)
            count = weight[targets != IGNORE].double().sum().item()
        return Encoded(sample, (text,), counts={"lm": count, **events, **cut}, seed=seed, places=places)

    def tokenize(self, sample: Sample, *, generate: bool) -> tuple[Tokenized, Mapping[str, float]]:
        """Labelled tokens of a sample's messages, and what had to go for them ({an entry of `EVENTS`: 1})."""
        return self.template.tokenize(sample.messages, self.tokenizer, generate=generate), {}

    def _weights(self, sample: Sample, factors: Sequence[float], image_tokens: Sequence[int]) -> Tensor:
        """float32[n], how much each position counts: those that are trained for answers of a weight, and no others."""

        def trained(factor: float) -> Tensor:
            chosen = [replace(message, weight=float(message.weight == factor)) for message in sample.messages]
            tokens = self.template.tokenize(chosen, self.tokenizer)
            _, labels, _ = self.reserve(tokens.ids, tokens.labels, image_tokens)
            return next_token_targets(torch.tensor(labels)) != IGNORE

        always = trained(-1.0)  # marks that are trained whoever speaks
        weights = torch.ones(len(always), dtype=torch.float32)
        for factor in factors:
            weights[trained(factor) & ~always] = factor
        return weights

    def image_tokens(self, sample: Sample, *, seed: int | None = None) -> list[int]:
        """How many tokens each image of a sample takes; `seed` is that of `encode`."""
        return [self.num_tokens(*file.size(sample)) for file in sample.images]

    def sequence(self, sample: Sample, ids: np.ndarray, targets: Tensor, slots: np.ndarray) -> TokenSequence:
        """The sequence of a sample.

        Args:
            ids: int64[n].
            slots: int64[k], positions that images take.
        """
        return TokenSequence(torch.from_numpy(ids), targets, slots={STREAM: torch.from_numpy(slots)})

    @staticmethod
    def reserve(
        marked: Sequence[int], labels: Sequence[int], image_tokens: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Widens each image mark to the tokens that its image takes.

        Returns:
            int64[n] ids, int64[n] labels, and int64[k], the positions of features.
        """
        ids, trained = np.array(marked, dtype=np.int64), np.array(labels, dtype=np.int64)
        is_image = ids == IMAGE
        num_images = int(is_image.sum())
        assert num_images <= len(image_tokens)
        widths = np.ones_like(ids)
        widths[is_image] = image_tokens[:num_images]
        ids[is_image], trained[is_image] = 0, IGNORE  # ids never looked at: features take these positions
        return ids.repeat(widths), trained.repeat(widths), np.flatnonzero(is_image.repeat(widths))

    def collate(self, items: Sequence[Encoded], *, counts: Mapping[str, float], packs: int = 1) -> Batch:
        text, rows = pack_rows(items, streams=[STREAM])
        return Batch(
            text=text,
            rows=rows,
            views=self.read(items),
            samples=tuple(item.info() for item in items),
            counts=dict(counts),
            packs=packs,
        )

    @abstractmethod
    def read(self, items: Sequence[Encoded]) -> dict[str, Views]:
        """The views of a pack's images by stream; {} when it has none."""

    def decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(ids)
        for mark in self.template.stop:
            text = text.split(mark, 1)[0]
        return text.strip()


def concat_documents(items: Sequence[Encoded]) -> Encoded:
    """The documents, or exchanges, of one sample, each a sequence of its own."""
    counts: dict[str, float] = {}
    for item in items:
        for name, value in item.counts.items():
            counts[name] = counts.get(name, 0.0) + value
    sample = replace(
        items[0].sample,
        messages=tuple(message for item in items for message in item.sample.messages),
        images=tuple(image for item in items for image in item.sample.images),
    )
    text = tuple(sequence for item in items for sequence in item.text)
    rows = {name: tuple(sequence for item in items for sequence in item.rows[name]) for name in items[0].rows}
    return replace(items[0], sample=sample, text=text, rows=rows, counts=counts)


def exchanges(sample: Sample) -> list[Sample]:
    """A conversation as one for each answer that is trained, in which those before it are only read."""
    found, messages = [], sample.messages
    for at, message in enumerate(messages):
        if message.role == "assistant" and message.weight:
            before = (replace(m, weight=0.0) if m.role == "assistant" else m for m in messages[:at])
            shown = sum(isinstance(part, ImagePart) for m in messages[:at] for part in m.content)
            found.append(replace(sample, messages=(*before, message), images=sample.images[:shown]))
    return found or [sample]


class RowDecoder(VisionLanguageModule):
    """Text and images in one row -> language model -> label positions.

    Args:
        language: the decoder.
        tokenizer: of the decoder. Tokens it adds get rows of their own (`vlm.language.NewTokens`).
        **arguments: of the subclass, which it was made from; `seed` of everything that is new or random.
    """

    codec: RowCodec
    language: PreTrainedModel

    def __init__(self, *, language: LanguagePart, tokenizer: Tokenizer, **arguments: Any) -> None:
        super().__init__(language=language, tokenizer=tokenizer, **arguments)
        self._tokenized: dict[str, list[int]] = {}
        if tokenizer.added_tokens:
            self.register_surgery(NewTokens())

    def build_language(self) -> PreTrainedModel:
        """The decoder.

        Raises:
            UserError: the tokenizer is another one's.
        """
        language = self.arguments["language"].build()
        tokenizer, rows = self.codec.tokenizer, language.config.vocab_size
        last = len(tokenizer) - 1
        last -= tokenizer.pad_id == last  # no row of a pack ever holds it
        if not tokenizer.added_tokens and last >= rows:
            raise UserError(
                f"model.tokenizer ({tokenizer.path}) makes ids up to {last}, but the language model has {rows} token "
                "embeddings; give the tokenizer that belongs to it"
            )
        return language

    # -- what images go through

    @property
    @abstractmethod
    def view_sizes(self) -> Mapping[str, tuple[int, int]]:
        """{stream: height and width of a view}."""

    @abstractmethod
    def image_modules(self) -> tuple[nn.Module, ...]:
        """What images go through."""

    @abstractmethod
    def encode_images(self, batch: Batch) -> Tensor:
        """float[V, P, D] features of the views of a pack that has some."""

    def arrange_features(self, features: Tensor, layout: Tensor | None) -> Tensor:
        """float[V, P, D] features of all views as float[K, D] image tokens (see `Views.layout`)."""
        return features.flatten(0, 1)

    # -- forward

    def image_features(self, batch: Batch) -> Tensor:
        """float[K, D] features of all images, in the order of the row's slots."""
        views = batch.views.get(STREAM)
        if views is None:
            return self.empty_features(batch)
        return self.arrange_features(self.encode_images(batch), views.layout)

    def empty_features(self, batch: Batch) -> Tensor:
        """float[0, D] for a pack without images, connected to what it left out.

        A step in which no rank has an image skips the tower everywhere. In a mixed step, a rank without one runs a
        blank view, at the same place as the others run theirs, so that the ranks of a sharded model stay in step.
        """
        device = batch.text.ids.device
        if batch.counts.get("images"):
            blank = {name: Views.blank(*size, device=device) for name, size in self.view_sizes.items()}
            return self.arrange_features(self.encode_images(replace(batch, views=blank)), None)[:0]
        features = torch.zeros(0, self.language.config.hidden_size, device=device)
        if not torch.is_grad_enabled():
            return features
        return features + zero_from(p for part in self.image_modules() for p in part.parameters())

    def embed_row(self, batch: Batch) -> Tensor:
        """float[N, D]: token embeddings with the image features in place."""
        embeds = self.language.get_input_embeddings()(batch.text.ids)  # [N, D], of placeholders too
        features = self.image_features(batch)  # [K, D]
        return splice(embeds, features, batch.text.slots[STREAM])  # [N, D], K of them overwritten

    def layer_inputs(self, batch: Batch) -> LayerInputs:
        """What every layer is told about the row, in training, scores and answers alike.

        A system with cross-attention adds what it looks at, one entry per sequence; one without an image is empty, but
        in the graph (`empty_features`).
        """
        return LayerInputs.of(batch.text)

    def label_logits(self, batch: Batch) -> Tensor:
        """float[L, vocabulary] at the label positions."""
        embeds = self.embed_row(batch)  # [N, D]
        return label_logits(self.language, embeds, batch.text, self.layer_inputs(batch))  # [N, D] -> [L, D] -> [L, V]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        embeds = self.embed_row(batch)  # [N, D]
        # [N, D] -> [L, D] -> []: only labels meet the vocabulary, and the step divides their sum
        return {"lm": label_loss(self.language, embeds, batch.text, self.layer_inputs(batch))}

    def answers(self, batch: Batch, decoding: Decoding) -> list[str]:
        if decoding.chooses:
            return [weighed.likeliest for weighed in self.weigh(batch, decoding)]
        prompts = Prompt.split(self.embed_row(batch), batch.text, self.layer_inputs(batch))
        tokenizer = self.codec.tokenizer
        ends = {mark: tokenizer.added_id(mark) for mark in self.codec.template.stop}
        answers = generate(
            self.language,
            prompts,
            decoding=decoding,
            seeds=[seed_from(decoding.seed, sample.id) for sample in batch.samples],
            end_ids=[tokenizer.eos_id, *(end for end in ends.values() if end is not None)],
            # answers that have ended are filled up with it, which takes a row of the table
            pad_id=tokenizer.pad_id if tokenizer.pad_id < self.language.config.vocab_size else tokenizer.eos_id,
            stop=[mark for mark, end in ends.items() if end is None],
            decode=lambda ids: tokenizer.decode(ids, skip_special=False),
            synced=self.is_sharded,
        )
        return [self.codec.decode(ids) for ids in answers]

    def weigh(self, batch: Batch, decoding: Decoding) -> list[WeighedChoices]:
        prompts = Prompt.split(self.embed_row(batch), batch.text, self.layer_inputs(batch))
        encode, sharded = self._option_ids, self.is_sharded
        return weigh_choices(self.language, prompts, batch.samples, decoding, encode=encode, together=sharded)

    def _option_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts that are chosen from; they are the same for sample after sample, so each is encoded once."""
        for text in texts:
            if text not in self._tokenized:
                self._tokenized[text] = self.codec.tokenizer.encode(text)[0]
        return [self._tokenized[text] for text in texts]
