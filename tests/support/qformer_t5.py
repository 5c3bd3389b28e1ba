"""A system that is unlike the spliced decoders: a Q-Former in front of an encoder-decoder language model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from vlm.batch import IGNORE, Batch, Row, TokenSequence
from vlm.codec import Codec, Encoded, ViewStream, pack_rows, read_views
from vlm.connectors import Linear, QFormer
from vlm.functional import splice
from vlm.language import Decoding
from vlm.language.generation import DecoderPrompt, generate
from vlm.functional import token_loss, zero_from
from vlm.module import VisionLanguageModule
from vlm.prompts.tokenizer import Tokenizer
from vlm.sample import Sample, TextPart
from vlm.seeding import seed_from
from vlm.vision import TimmTower, TowerFacts
from vlm.vision.preprocess import ImageTransform


@dataclass(frozen=True)
class T5:
    """Description of the language model; `config` as in `T5Config`."""

    config: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None

    def build(self) -> T5ForConditionalGeneration:
        return T5ForConditionalGeneration(T5Config(**self.config))

    def initialise(self, model: Any, module: nn.Module) -> None:
        """Transformers draws a layer of T5 from the one above it; asked layer by layer, it would be far off."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.5 * model.config.d_model**-0.5)
        else:
            model._init_weights(module)


class QFormerT5Codec(Codec):
    """Encoder row: the queries of each picture, then the question (and the start of the caption); decoder row: the
    answer. With `split_prefix` a caption is cut at a point of its first half that belongs to the sample (BLIP-2)."""

    def __init__(self, tokenizer: Tokenizer, num_queries: int, image_size: int, *, split_prefix: bool) -> None:
        self.tokenizer = tokenizer
        self.num_queries = num_queries
        self.transform = ImageTransform(size=image_size, mode="squash")
        self.split_prefix = split_prefix

    def num_tokens(self, width: int, height: int) -> int:
        return self.num_queries

    def encode(self, sample: Sample, *, seed: int | None = None, generate: bool = False) -> Encoded:
        turns = list(sample.messages)
        target = turns.pop() if turns[-1].role == "assistant" else None
        question, answer = (
            "".join(part.text for turn in chosen for part in turn.content if isinstance(part, TextPart))
            for chosen in (turns, [target] if target else [])
        )
        slots = self.num_queries * len(sample.images)
        asked, told = self.tokenizer.encode(question)[0], self.tokenizer.encode(answer)[0]
        if self.split_prefix and seed is not None and len(told) > 1:
            point = 1 + seed_from(seed, "prefix") % (len(told) // 2)
            asked, told = asked + told[:point], told[point:]
        ids = torch.tensor([0] * slots + asked + [self.tokenizer.eos_id])
        text = TokenSequence(ids, torch.full_like(ids, IGNORE), slots={"image": torch.arange(slots)})
        if generate:
            return Encoded(sample, (text,))
        if not told:
            raise sample.error("no answer to train on; add one")
        targets = torch.tensor([*told, self.tokenizer.eos_id])
        decoder = TokenSequence(torch.tensor([self.tokenizer.pad_id, *told]), targets)
        return Encoded(sample, (text,), {"decoder": (decoder,)}, {"lm": float(len(targets))}, seed)

    def collate(self, items: Sequence[Encoded], *, counts: Mapping[str, float], packs: int = 1) -> Batch:
        text, rows = pack_rows(items, streams=["image"])
        views = read_views(items, lambda sample, seed: {"image": ViewStream(self.transform)})
        infos = tuple(item.info() for item in items)
        return Batch(text, rows, views, infos, dict(counts), packs=packs)

    def normalization(self, stream: str) -> tuple[Sequence[float], Sequence[float]]:
        return self.transform.mean, self.transform.std

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids).strip()


class QFormerT5(VisionLanguageModule):
    """pixels -> tower -> Q-Former -> linear -> spliced into the encoder's row -> T5 -> label positions."""

    system = "qformer_t5"

    def __init__(
        self,
        *,
        vision: TimmTower,
        qformer: QFormer,
        connector: Linear,
        language: T5,
        tokenizer: Tokenizer,
        split_prefix: bool = False,
        seed: int = 0,
    ) -> None:
        kept = {"tokenizer": tokenizer, "split_prefix": split_prefix, "seed": seed}
        super().__init__(vision=vision, qformer=qformer, connector=connector, language=language, **kept)

    @cached_property
    def tower(self) -> TowerFacts:
        return self.arguments["vision"].facts()

    def make_codec(self) -> QFormerT5Codec:
        tokenizer, qformer, split = (self.arguments[n] for n in ("tokenizer", "qformer", "split_prefix"))
        return QFormerT5Codec(tokenizer, qformer.num_queries, self.tower.image_size, split_prefix=split)

    def build_parts(self) -> dict[str, nn.Module]:
        language = self.arguments["language"].build()
        return {
            "vision": self.arguments["vision"].build(),
            "qformer": self.arguments["qformer"].build(self.tower.dim),
            "connector": self.arguments["connector"].build(self.arguments["qformer"].dim, language.config.d_model),
            "language": language,
        }

    def encode_images(self, pixels: Tensor) -> Tensor:
        features = self.vision(pixels.to(self.qformer.queries.dtype))
        return self.connector(self.qformer(features)).flatten(0, 1)

    def image_features(self, batch: Batch) -> Tensor:
        if "image" in batch.views:
            return self.encode_images(batch.views["image"].pixels)
        if batch.counts["images"]:  # another rank has one
            size = self.tower.image_size
            return self.encode_images(torch.zeros(1, 3, size, size, device=batch.text.ids.device))[:0]
        idle = (self.vision, self.qformer, self.connector)
        unused = zero_from(parameter for part in idle for parameter in part.parameters())
        return torch.zeros(0, self.language.config.d_model, device=batch.text.ids.device) + unused

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """float[S, max_len, D] and the mask bool[S, max_len]."""
        row = batch.text
        mask = row.padded(0).mask
        embeds = splice(self.language.get_input_embeddings()(row.ids), self.image_features(batch), row.slots["image"])
        padded = embeds.new_zeros(mask.numel(), embeds.shape[1]).index_copy(0, row.padded_index(), embeds)
        return self.language.encoder(inputs_embeds=padded.unflatten(0, mask.shape), attention_mask=mask)[0], mask

    def label_row(self, batch: Batch) -> Row:
        return batch.rows["decoder"]

    def label_logits(self, batch: Batch) -> Tensor:
        row, (encoded, mask) = self.label_row(batch), self.encode(batch)
        ids = row.padded(self.codec.tokenizer.pad_id).ids
        outputs = self.language(encoder_outputs=(encoded,), attention_mask=mask, decoder_input_ids=ids, use_cache=False)
        return outputs.logits.flatten(0, 1)[row.padded_index()[row.label_positions]]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        row = self.label_row(batch)
        return {"lm": token_loss(self.label_logits(batch), row.targets, row.weights)}

    def answers(self, batch: Batch, decoding: Decoding) -> list[str]:
        encoded, mask = self.encode(batch)
        tokenizer = self.codec.tokenizer
        start = torch.tensor([tokenizer.pad_id], device=encoded.device)
        answers = generate(
            self.language,
            [DecoderPrompt(features[real], start) for features, real in zip(encoded, mask, strict=True)],
            decoding=decoding,
            seeds=[seed_from(decoding.seed, sample.id) for sample in batch.samples],
            end_ids=[tokenizer.eos_id],
            pad_id=tokenizer.pad_id,
            synced=self.is_sharded,
        )
        return [self.codec.decode(ids) for ids in answers]
