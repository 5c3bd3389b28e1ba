"""BLIP as it is pre-trained, and fine-tuned for retrieval."""

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.batch import Batch
from vlm.errors import UserError
from vlm.evaluation.retrieval import Embeddings
from vlm.in_batch import candidates, gather_detached
from vlm.language import Med
from vlm.moving import update_copies
from vlm.systems.blip_base import DECODER, ENCODER, IMAGES, STREAM
from vlm.systems.pairs import (
    IMAGE_ID,
    FeatureQueue,
    Heads,
    PairCodec,
    PairModule,
    Projections,
    first_texts,
    with_first,
)

_RAMP = {False: 2, True: 1}
"""Epochs until the momentum copies have their full say: of pre-training, and of fine-tuning for retrieval."""


class Contrast(NamedTuple):
    """What the contrast of a pack comes to.

    Attributes:
        losses: float[B] of each sample, both directions.
        image_to_text: float[B, B + queue] similarities over the temperature; the samples of the pack come first.
        text_to_image: the same.
    """

    losses: Tensor
    image_to_text: Tensor
    text_to_image: Tensor


def contrast(
    online: tuple[Tensor, Tensor],
    momentum: tuple[Tensor, Tensor],
    *,
    queue: FeatureQueue,
    temperature: Tensor,
    alpha: float,
    ids: Tensor,
    real: Tensor,
) -> Contrast:
    """BLIP's contrast with soft targets; candidates are the momentum features of the pack and of the queue.

    Args:
        online, momentum: float[B, D] of images and of texts, normalised.
        alpha: share of the momentum copies' own similarities in the targets.
        ids: int64[B], the same for the same image, whose texts are all right where the queue knows ids.
        real: bool[B], False for fillers, which are no candidates.
    """
    images, texts = (
        torch.cat([own.T, old.clone()], 1) for own, old in zip(momentum, (queue.image, queue.text), strict=True)
    )
    unreal = F.pad(~real, (0, queue.image.shape[1]))
    right = torch.eye(len(ids), images.shape[1], device=ids.device)
    if queue.ids is not None:
        right = (ids[:, None] == torch.cat([ids[None], queue.ids], 1)).float() * ~unreal
        right = right / right.sum(1, keepdim=True).clamp(min=1)
    similar, losses = [], torch.zeros(len(ids), device=ids.device)
    for own, own_m, others in zip(online, momentum, (texts, images), strict=True):
        similar.append((own @ others / temperature).masked_fill(unreal, -torch.inf))
        with torch.no_grad():
            soft = (own_m @ others / temperature).masked_fill(unreal, -torch.inf).softmax(1)
            targets = alpha * soft + (1 - alpha) * right
        log_shares = similar[-1].log_softmax(1).masked_fill(unreal, 0.0)
        losses = losses - (log_shares * targets).sum(1) / 2
    return Contrast(losses, *similar)


class BLIP(PairModule):
    """BLIP (Li et al., 2022): one text model, three uses, three losses.

    ::

        pixels -> vision -> features -- projections.image --.
        [CLS] caption -> language reads ---- projections.text --> itc, against the momentum copies' features and a queue
        [ENC] caption, features -> language reads -> heads.match --> itm, right pairs and hard wrong ones
        [DEC] caption, features -> language writes ----------------> lm

    Wrong pairs are drawn by similarity. `negatives: pack` draws them from the pack, `negatives: step` from all packs
    (retrieval on COCO); the contrast is with the pack's own samples and the queue in either case, as published.

    Args:
        language: a text model that reads; where it also writes, captions are trained.
        dim: width of the space where images and texts are compared.
        queue: features of how many samples are kept; a multiple of the batch.
        momentum: how much of themselves the copies keep in a step.
        alpha: share of the momentum copies' similarities in the targets, which grows from 0.
        same_image: all texts of an image are right for it, and none is drawn as wrong (fine-tuning for retrieval).
        label_smoothing: of `lm`.
        max_words: longest caption.
        **arguments: of `BLIPTuned`.
    """

    codec: PairCodec
    language: Any
    momentum: Any
    projections: Projections
    heads: Heads
    queue: FeatureQueue
    in_batch_terms = ("itc", "itm")
    moving = ("momentum", "queue")

    def __init__(
        self,
        *,
        language: Med,
        dim: int = 256,
        queue: int = 57600,
        momentum: float = 0.995,
        alpha: float = 0.4,
        same_image: bool = False,
        label_smoothing: float = 0.1,
        max_words: int = 30,
        max_tokens: int = 30,
        **arguments: Any,
    ) -> None:
        if not language.encoder:
            raise UserError("model.language: encoder: false reads no text, so nothing can be compared; set it to true")
        super().__init__(
            language=language,
            dim=dim,
            queue=queue,
            momentum=momentum,
            alpha=alpha,
            same_image=same_image,
            label_smoothing=label_smoothing,
            max_words=max_words,
            max_tokens=max_tokens,
            **arguments,
        )
        self.copies = {f"momentum.{part}": part for part in ("vision", "language", "projections")}
        self.features: list[tuple[Tensor, Tensor, Tensor]] = []

    def make_codec(self) -> PairCodec:
        return PairCodec(
            terms={"itc": 1.0, "itm": 3.0},
            writes=self.arguments["language"].decoder,
            max_words=self.arguments["max_words"],
            **self.codec_arguments(),
        )

    def build_parts(self) -> dict[str, nn.Module]:
        given, width = self.arguments, self.tower.dim
        copied = dataclasses.replace(given["language"], decoder=False)

        def projections() -> Projections:
            return Projections(width, given["language"].dim, given["dim"])

        return {
            "vision": given["vision"].build(),
            "language": self.build_text("language", width),
            "projections": projections(),
            "heads": Heads(given["language"].dim),
            "momentum": nn.ModuleDict(
                {"vision": given["vision"].build(), "language": copied.build(width), "projections": projections()}
            ),
            "queue": FeatureQueue(given["dim"], given["queue"], ids=given["same_image"]),
        }

    # -- what moves without a gradient

    def on_fit_start(self) -> None:
        self.queue.check(self.trainer.datamodule.batch.size)  # type: ignore[attr-defined]

    @torch.no_grad()
    def on_step_start(self) -> None:
        self.heads.temperature.clamp_(0.001, 0.5)
        update_copies(self, self.arguments["momentum"])
        self.features = []

    def on_step_end(self) -> None:
        self.queue.push(*(self._in_pack_order(torch.stack(kind)) for kind in zip(*self.features, strict=True)))

    def _in_pack_order(self, values: Tensor) -> Tensor:
        """[micro-batches, B, ...] of each rank -> [samples of the step, ...]: packs go to the ranks in turn."""
        everywhere = gather_detached(values).unflatten(0, (self.trainer.world_size, len(values)))
        return everywhere.transpose(0, 1).flatten(0, 2)

    # -- losses

    def embed_images(self, network: Any, features: Tensor, frames: int) -> Tensor:
        """float[B, D], normalised: the class token, or the mean of those of all frames."""
        tokens = features.unflatten(1, (frames, -1))[:, :, 0]
        return F.normalize(network.projections.image(tokens).mean(1), dim=-1)

    def embed_texts(self, network: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """float[S, D], normalised, of texts that begin with [CLS]."""
        return F.normalize(network.projections.text(network.language.read(ids, mask)[:, 0]), dim=-1)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        ids, mask = first_texts(batch, self.codec.tokenizer.pad_id)
        features, frames = self._features(batch)
        image, text = self.embed_images(self, features, frames), self.embed_texts(self, ids, mask)
        with torch.no_grad():
            seen, _ = self._features(batch, self.momentum["vision"])
            image_m = self.embed_images(self.momentum, seen, frames)
            text_m = self.embed_texts(self.momentum, ids, mask)
        if self.training:
            self.features.append((image_m, text_m, batch.labels[IMAGE_ID]))
        found = contrast(
            (image, text),
            (image_m, text_m),
            queue=self.queue,
            temperature=self.heads.temperature,
            alpha=self.arguments["alpha"] * min(1.0, self.epochs_done / _RAMP[self.arguments["same_image"]]),
            ids=batch.labels[IMAGE_ID],
            real=batch.real,
        )
        wrong = self.wrong_weights(batch, found, image, text)
        made = {
            "itc": torch.where(batch.real, found.losses, 0.0).sum(),
            "itm": self.match_loss(batch, features, ids, mask, wrong),
        }
        if self.codec.writes:
            made["lm"] = self._write_loss(batch, features)
        return made

    @torch.no_grad()
    def wrong_weights(self, batch: Batch, found: Contrast, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """float[B, C] each: how likely a candidate is drawn as wrong text of an image, as wrong image of a text."""
        if not self.arguments["same_image"]:
            size = len(image)
            similar = (found.image_to_text[:, :size], found.text_to_image[:, :size])
            first, second = ((own.softmax(1) + 1e-4).fill_diagonal_(0) * batch.real for own in similar)
            return first, second
        others, real = candidates(batch.labels[IMAGE_ID], batch), candidates(batch.real, batch)
        allowed = (batch.labels[IMAGE_ID][:, None] != others) & real
        pairs = ((image, candidates(text, batch)), (text, candidates(image, batch)))
        first, second = ((own @ other.T / self.heads.temperature).softmax(1) * allowed for own, other in pairs)
        return first, second

    def pair_logits(self, ids: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        """float[N, 2]: that texts and images, pair by pair, do not and do belong together."""
        ids = with_first(ids, self.codec.tokenizer.token_id(ENCODER))
        return self.heads.match(self.language.read(ids, mask, features)[:, 0])

    def _write_loss(self, batch: Batch, features: Tensor) -> Tensor:
        states, smoothing = self._label_states(batch, features), self.arguments["label_smoothing"]
        return self.language.label_loss(states, batch.text, label_smoothing=smoothing)

    def label_logits(self, batch: Batch) -> Tensor:
        if not self.codec.writes:
            return super().label_logits(batch)
        return self.language.logits(self._label_states(batch, self._features(batch)[0]))

    def _label_states(self, batch: Batch, features: Tensor) -> Tensor:
        """float[L, D], what the head is given; a text is written from [DEC] on."""
        row = batch.text
        ids = with_first(row.padded(self.codec.tokenizer.pad_id).ids, self.codec.tokenizer.token_id(DECODER))
        if len(ids) != len(features):
            features = features[row.owner]
        hidden = self.language.write(ids, features)
        return hidden.flatten(0, 1)[row.padded_index()[row.label_positions]]

    def probe(self, batch: Batch) -> Tensor:
        ids, mask = first_texts(batch, self.codec.tokenizer.pad_id)
        features, frames = self._features(batch)
        similar = self.embed_images(self, features, frames) @ self.embed_texts(self, ids, mask).T
        return torch.cat([similar, self.pair_logits(ids, mask, features)], dim=1)

    # -- retrieval

    def embeddings(self, batch: Batch) -> Embeddings:
        row, pad_id = batch.text, self.codec.tokenizer.pad_id
        ids, mask = row.padded(pad_id)
        features, frames = self._features(batch)
        image, text = self.embed_images(self, features, frames), self.embed_texts(self, ids, mask)
        return Embeddings(image, text, row.owner, features, self.text_states(ids))

    def _features(self, batch: Batch, vision: nn.Module | None = None) -> tuple[Tensor, int]:
        """float[B, m, C] of the images of each sample, side by side, and how many each has.

        Raises:
            UserError: some samples have more images than others.
        """
        views, frames = batch.views[STREAM], batch.labels[IMAGES].shape[1]
        if len(views.image_of_view) != frames * len(batch.real):
            raise UserError(
                f"sample {batch.samples[0].id!r} and others of its batch have different numbers of images; videos are "
                "compared by equally many frames, so set the same number for all"
            )
        if vision is None:
            features = self.encode_images(batch)
        else:
            features = vision(views.pixels.to(next(vision.parameters()).dtype))
        return features.unflatten(0, (len(batch.real), frames)).flatten(1, 2), frames
