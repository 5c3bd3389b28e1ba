"""The first stage of BLIP-2: a Q-Former learns from images with texts, before it meets a language model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.batch import Batch
from vlm.connectors import QFormer
from vlm.connectors.qformer import QueryPass
from vlm.errors import UserError
from vlm.evaluation.retrieval import Embeddings
from vlm.evaluation.retrieval_table import similarities
from vlm.in_batch import candidates, own_places
from vlm.language import Decoding
from vlm.language.generation import DecoderPrompt
from vlm.systems.blip_base import DECODER
from vlm.systems.pairs import IMAGE_ID, Heads, PairCodec, PairModule, Projections, first_texts, with_first

_SELF = -1e4
"""Similarity that stands in the place of a right pair where a wrong one is drawn."""


class BLIP2QFormer(PairModule):
    """BLIP-2 (Li et al., 2023), stage 1, and fine-tuned for retrieval: one Q-Former, three masks, three losses.

    ::

        pixels -> vision -> features
        queries look at them, alone      -- projections.image --.
        [CLS] caption, read alone        -- projections.text ---> itc: the best query counts, against all of the step
        queries and caption see each other -> heads.match, mean of the queries -> itm: right pairs and hard wrong ones
        [DEC] caption sees the queries and what stands before it -> itg: its next tokens

    The published objective compares the samples of all devices (`negatives: step`): with those of others without a
    gradient in the contrast, with one for the images of wrong pairs.

    Args:
        qformer: with `text`; where it has a `head` too, captions are written (`lm`).
        dim: width of the space where images and texts are compared.
        same_image: all texts of an image are right for it, and none is drawn as wrong (fine-tuning for retrieval).
        label_smoothing: of the contrast and of the written captions.
        max_words: longest caption.
        **arguments: of `BLIPTuned`; `max_tokens` is that of a caption with its marks.
    """

    system = "blip2"
    codec: PairCodec
    qformer: Any
    projections: Projections
    heads: Heads
    in_batch_terms = ("itc", "itm")

    def __init__(
        self,
        *,
        qformer: QFormer,
        dim: int = 256,
        same_image: bool = False,
        label_smoothing: float = 0.1,
        max_words: int = 50,
        max_tokens: int = 32,
        **arguments: Any,
    ) -> None:
        if not qformer.text:
            raise UserError("model.qformer.text: false, but the first stage compares images with texts; set it to true")
        super().__init__(
            qformer=qformer,
            dim=dim,
            same_image=same_image,
            label_smoothing=label_smoothing,
            max_words=max_words,
            max_tokens=max_tokens,
            **arguments,
        )

    def make_codec(self) -> PairCodec:
        return PairCodec(
            terms={"itc": 1.0, "itm": 3.0},
            writes=self.arguments["qformer"].head,
            max_words=self.arguments["max_words"],
            **self.codec_arguments(),
        )

    def build_parts(self) -> dict[str, nn.Module]:
        width, dim = self.arguments["qformer"].dim, self.arguments["dim"]
        return {
            "vision": self.arguments["vision"].build(),
            "qformer": self.build_text("qformer", self.tower.dim),
            "projections": Projections(width, width, dim),
            "heads": Heads(width),
        }

    # -- losses

    def embed_images(self, seen: QueryPass) -> Tensor:
        """float[B, Q, D], normalised."""
        return F.normalize(self.projections.image(seen.hidden), dim=-1)

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """float[S, D], normalised, of texts that begin with [CLS]."""
        return F.normalize(self.projections.text(self.qformer.read(ids, mask)[:, 0]), dim=-1)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        ids, mask = first_texts(batch, self.codec.tokenizer.pad_id)
        features = self.encode_images(batch)  # [B, P, C]
        seen = self.qformer.look(features)
        image, text = self.embed_images(seen), self.embed_texts(ids, mask)
        similar = self.compare(image, text, batch)
        made = {
            "itc": self._contrast_loss(batch, *similar),
            "itm": self.match_loss(batch, features, ids, mask, self.wrong_weights(batch, *similar)),
        }
        if self.codec.writes:
            states, smoothing = self._label_states(batch, seen), self.arguments["label_smoothing"]
            made["lm"] = self.qformer.label_loss(states, batch.text, label_smoothing=smoothing)
        return made

    def compare(self, image: Tensor, text: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """float[B, C] of the images to all texts and of the texts to all images; fillers are no candidates."""
        unreal = ~candidates(batch.real, batch)
        to_texts = similarities(image, candidates(text, batch)) / self.heads.temperature
        to_images = similarities(candidates(image, batch), text).T / self.heads.temperature
        return to_texts.masked_fill(unreal, -torch.inf), to_images.masked_fill(unreal, -torch.inf)

    def right_pairs(self, batch: Batch) -> Tensor:
        """bool[B, C]: candidates that are right for a sample."""
        real = candidates(batch.real, batch)
        if self.arguments["same_image"]:
            ids = batch.labels[IMAGE_ID]
            return (ids[:, None] == candidates(ids, batch)) & real
        return F.one_hot(own_places(batch), len(real)).bool()

    def _contrast_loss(self, batch: Batch, *similar: Tensor) -> Tensor:
        real, right = candidates(batch.real, batch), self.right_pairs(batch).float()
        smoothing = self.arguments["label_smoothing"]
        targets = (1 - smoothing) * right / right.sum(1, keepdim=True).clamp(min=1) + smoothing * real / real.sum()
        losses = torch.zeros(len(right), device=right.device)
        for scores in similar:
            losses = losses - (scores.log_softmax(1).masked_fill(~real, 0.0) * targets).sum(1) / 2
        return torch.where(batch.real, losses, 0.0).sum()

    @torch.no_grad()
    def wrong_weights(self, batch: Batch, *similar: Tensor) -> list[Tensor]:
        """float[B, C] each: how likely a candidate is drawn as wrong text of an image, and as wrong image of a text."""
        real, right = candidates(batch.real, batch), self.right_pairs(batch)
        return [scores.masked_fill(right & real, _SELF).softmax(1) for scores in similar]

    def pair_logits(self, ids: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        """float[N, 2]: whether texts and images, pair by pair, do not match, or do; the mean of what queries say."""
        queries = self.qformer(features, ids, mask)  # [N, Q, D]
        return self.heads.match(queries).mean(1)

    def label_logits(self, batch: Batch) -> Tensor:
        if not self.codec.writes:
            return super().label_logits(batch)
        seen = self.qformer.look(self.encode_images(batch)[batch.text.owner])
        return self.qformer.logits(self._label_states(batch, seen))

    def _label_states(self, batch: Batch, seen: QueryPass) -> Tensor:
        """float[L, D], what the head is given; a text is written from [DEC] on, behind the keys and values of its
        image's queries."""
        row = batch.text
        ids = with_first(row.padded(self.codec.tokenizer.pad_id).ids, self.codec.tokenizer.token_id(DECODER))
        if len(ids) != len(seen.hidden):  # an image with several texts
            owner = row.owner
            past = tuple((keys[owner], values[owner]) for keys, values in seen.past)
            seen = QueryPass(seen.hidden[owner], past)
        hidden = self.qformer.write(ids, seen)
        return hidden.flatten(0, 1)[row.padded_index()[row.label_positions]]

    def answers(self, batch: Batch, decoding: Decoding) -> list[str]:
        if not self.codec.writes:
            raise UserError("model.qformer.head: false, so it writes no captions; evaluate it by retrieval")
        given = batch.text.ids.split(batch.text.cu_seqlens.diff().tolist())
        prompts = [DecoderPrompt(*pair) for pair in zip(self.encode_images(batch), given, strict=True)]
        written = self.write(self.qformer, prompts, batch, decoding)
        return [self.codec.decode(ids) for ids in written]

    def probe(self, batch: Batch) -> Tensor:
        ids, mask = first_texts(batch, self.codec.tokenizer.pad_id)
        features = self.encode_images(batch)
        similar = similarities(self.embed_images(self.qformer.look(features)), self.embed_texts(ids, mask))
        return torch.cat([similar, self.pair_logits(ids, mask, features)], dim=1)

    # -- retrieval

    def embeddings(self, batch: Batch) -> Embeddings:
        row, pad_id = batch.text, self.codec.tokenizer.pad_id
        ids, mask = row.padded(pad_id)
        features = self.encode_images(batch)
        image, text = self.embed_images(self.qformer.look(features)), self.embed_texts(ids, mask)
        return Embeddings(image, text, row.owner, features, self.text_states(ids))
