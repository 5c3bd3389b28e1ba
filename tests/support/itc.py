"""BLIP's objectives at the smallest size: contrast with momentum copies and a queue, matching with hard negatives."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.batch import IGNORE, Batch, Row, TokenSequence
from vlm.codec import Codec, Encoded, ViewStream, pack_rows, read_views
from vlm.evaluation.retrieval import Embeddings
from vlm.in_batch import draw_uniform, gather_detached
from vlm.module import VisionLanguageModule
from vlm.moving import update_copies
from vlm.prompts.tokenizer import Tokenizer
from vlm.sample import Sample, TextPart
from vlm.vision import TimmTower
from vlm.vision.preprocess import ImageTransform


class PairCodec(Codec):
    """A row of captions; every sample has one picture and one caption."""

    needs_image = True

    def __init__(self, tokenizer: Tokenizer, image_size: int) -> None:
        self.tokenizer = tokenizer
        self.transform = ImageTransform(size=image_size, mode="squash")

    def num_tokens(self, width: int, height: int) -> int:
        return 0

    def encode(self, sample: Sample, *, seed: int | None = None, generate: bool = False) -> Encoded:
        if len(sample.images) != 1:
            raise sample.error(f"{len(sample.images)} images where one is compared; give it one")
        texts = [part.text for message in sample.messages for part in message.content if isinstance(part, TextPart)]
        ids = torch.tensor(self.tokenizer.encode("".join(texts))[0])
        sequence = TokenSequence(ids, torch.full_like(ids, IGNORE))
        return Encoded(sample, (sequence,), counts={"itc": 1.0, "itm": 3.0}, seed=seed)

    def collate(self, items: Sequence[Encoded], *, counts: Mapping[str, float], packs: int = 1) -> Batch:
        text, rows = pack_rows(items)
        views = read_views(items, lambda sample, seed: {"image": ViewStream(self.transform)})
        infos = tuple(item.info() for item in items)
        return Batch(text, rows, views, infos, dict(counts), packs=packs)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)


class TextEncoder(nn.Module):
    """Row -> float[S, dim]: the mean of a caption's tokens."""

    def __init__(self, vocabulary: int, dim: int, *, dropout: float) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(vocabulary, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, row: Row) -> Tensor:
        owner = torch.repeat_interleave(torch.arange(len(row.owner)), row.cu_seqlens.diff().long())
        tokens = self.dropout(torch.tanh(self.up(self.table(row.ids))))
        sums = tokens.new_zeros(len(row.owner), tokens.shape[1]).index_add(0, owner, tokens)
        return sums / row.cu_seqlens.diff()[:, None]


class Projections(nn.Module):
    def __init__(self, image_dim: int, text_dim: int, dim: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(image_dim, dim), nn.Linear(text_dim, dim)


class Head(nn.Module):
    """The temperature of the contrast, and whether a picture and a caption match."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.empty(1))
        self.match = nn.Linear(dim, 2)

    def initialise_new(self) -> None:
        nn.init.constant_(self.temperature, 0.07)


class FeatureQueue(nn.Module):
    """The momentum features of the last samples: float32[D, size] of each kind, written round and round."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        for kind in ("image", "text"):
            self.register_buffer(kind, torch.empty(dim, size))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))

    def initialise_new(self) -> None:
        for features in (self.image, self.text):
            features.copy_(F.normalize(torch.randn(features.shape), dim=0))
        self.place.zero_()

    def push(self, image: Tensor, text: Tensor) -> None:
        """Takes in float[N, D] of each kind; the place is a tensor, so that no device is waited for."""
        size = self.image.shape[1]
        assert size % len(image) == 0, "the queue holds whole steps"
        places = (self.place + torch.arange(len(image), device=self.place.device)) % size
        self.image.index_copy_(1, places, image.T.to(self.image))
        self.text.index_copy_(1, places, text.T.to(self.text))
        self.place.copy_((self.place + len(image)) % size)


def contrast(
    image: Tensor, text: Tensor, image_m: Tensor, text_m: Tensor, *, queue: Any, temperature: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """BLIP's soft contrast of a pack.

    Args:
        image, text: float[B, D], normalised; `_m` of the momentum copies.
        alpha: share of the momentum copies' own similarities in the targets.

    Returns:
        Sum of the loss over the pack, and float[B, B]: how likely each caption is a hard negative of an image, and each
        image one of a caption.
    """
    texts, images = (torch.cat([own.T, old.clone()], 1) for own, old in ((text_m, queue.text), (image_m, queue.image)))
    loss, weights = torch.zeros((), device=image.device), []
    for features, features_m, others in ((image, image_m, texts), (text, text_m, images)):
        similar = features @ others / temperature
        hard = torch.zeros_like(similar).fill_diagonal_(1)
        with torch.no_grad():
            targets = alpha * (features_m @ others / temperature).softmax(1) + (1 - alpha) * hard
            weights.append((similar[:, : len(image)].softmax(1) + 1e-4).fill_diagonal_(0))
        loss = loss - (similar.log_softmax(1) * targets).sum() / 2
    return loss, weights[0], weights[1]


class ITC(VisionLanguageModule):
    """images, captions -> two encoders -> contrast with the momentum copies' features and their queue -> matching."""

    system = "itc"
    in_batch_terms = ("itc", "itm")
    moving = ("momentum", "queue")

    def __init__(
        self,
        *,
        vision: TimmTower,
        tokenizer: Tokenizer,
        queue: int = 16,
        dim: int = 16,
        momentum: float = 0.9,
        alpha: float = 0.4,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            vision=vision,
            tokenizer=tokenizer,
            queue=queue,
            dim=dim,
            momentum=momentum,
            alpha=alpha,
            dropout=dropout,
            seed=seed,
        )
        self.copies = {f"momentum.{part}": part for part in ("vision", "text", "projections")}
        self.features: list[tuple[Tensor, Tensor]] = []

    def make_codec(self) -> PairCodec:
        return PairCodec(self.arguments["tokenizer"], self.arguments["vision"].facts().image_size)

    def build_parts(self) -> dict[str, nn.Module]:
        vision, dim = self.arguments["vision"], self.arguments["dim"]

        def encoders() -> dict[str, nn.Module]:
            return {
                "vision": vision.build(),
                "text": TextEncoder(len(self.arguments["tokenizer"]), dim, dropout=self.arguments["dropout"]),
                "projections": Projections(vision.facts().dim, dim, dim),
            }

        return {
            **encoders(),
            "head": Head(2 * dim),
            "momentum": nn.ModuleDict(encoders()),
            "queue": FeatureQueue(dim, self.arguments["queue"]),
        }

    @torch.no_grad()
    def on_step_start(self) -> None:
        self.head.temperature.clamp_(0.001, 0.5)
        update_copies(self, self.arguments["momentum"])
        self.features = []

    def on_step_end(self) -> None:
        image, text = (self._in_pack_order(torch.stack(kind)) for kind in zip(*self.features, strict=True))
        self.queue.push(image, text)

    def _in_pack_order(self, values: Tensor) -> Tensor:
        """[micro-batches, B, D] of each rank -> [samples of the step, D]: a step's packs go to the ranks in turn."""
        everywhere = gather_detached(values).unflatten(0, (self.trainer.world_size, len(values)))
        return everywhere.transpose(0, 1).flatten(0, 2)

    def encode(self, batch: Batch, encoders: Any) -> tuple[Tensor, Tensor]:
        """float[B, D] of images and captions, normalised."""
        pixels = batch.views["image"].pixels.to(encoders.projections.image.weight.dtype)
        image = encoders.projections.image(encoders.vision(pixels).mean(1))
        text = encoders.projections.text(encoders.text(batch.text))
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        image, text = self.encode(batch, self)
        with torch.no_grad():
            image_m, text_m = self.encode(batch, self.momentum)
        itc, captions, images = contrast(
            *(image, text, image_m, text_m),
            queue=self.queue,
            temperature=self.head.temperature,
            alpha=self.arguments["alpha"] * min(1.0, self.epochs_done / 2),
        )
        if self.training:
            self.features.append((image_m, text_m))
        chance = draw_uniform(batch, 2)
        wrong_text, wrong_image = (_draw(w, chance[:, i]) for i, w in enumerate((captions, images)))
        pairs = torch.cat(
            [torch.cat([image, image[wrong_image], image]), torch.cat([text, text, text[wrong_text]])], dim=1
        )
        labels = torch.arange(len(pairs), device=pairs.device) < len(image)
        itm = F.cross_entropy(self.head.match(pairs), labels.long(), reduction="sum")
        return {"itc": itc, "itm": itm}

    def embeddings(self, batch: Batch) -> Embeddings:
        image, text = self.encode(batch, self)
        return Embeddings(image, text, torch.arange(len(text), device=text.device), image, text)

    def pair_logits(self, image_states: Tensor, text_states: Tensor) -> Tensor:
        return self.head.match(torch.cat([image_states, text_states], dim=1))


def _draw(weights: Tensor, chance: Tensor) -> Tensor:
    """int64[B]: one column of each row, as likely as its weight, by a number in [0, 1) for each row."""
    sums = weights.cumsum(1)
    return (
        torch.searchsorted(sums, chance[:, None].to(sums) * sums[:, -1:], right=True)
        .squeeze(1)
        .clamp_max(weights.shape[1] - 1)
    )
