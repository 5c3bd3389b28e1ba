"""A system as small as it can be: bytes are tokens, a picture is two slots and a 2x2 view of its id."""

import random
from collections.abc import Sequence

import torch

from vlm.batch import Batch, Row, TokenSequence, Views, next_token_targets
from vlm.codec import Codec, Encoded
from vlm.data.sources.base import Source
from vlm.sample import Message, Sample, TextPart, parse_sample

IMAGE_TOKENS = 2


class ByteCodec(Codec):
    """One causal row; targets are the assistant's bytes, of which the sample's seed leaves out one in four."""

    def num_tokens(self, width, height):
        return IMAGE_TOKENS

    def encode(self, sample, *, seed=None, generate=False):
        if "unusable" in sample.id:
            raise sample.error("cannot be used")
        if "bug" in sample.id:
            raise KeyError("a mistake in the code")
        chance = random.Random(seed or 0)
        ids: list[int] = []
        labels: list[int] = []
        slots: list[int] = []
        for message in sample.messages:
            for part in message.content:
                if isinstance(part, TextPart):
                    tokens = list(part.text.encode())
                    trained = message.role == "assistant"
                    ids += tokens
                    labels += [token if trained and chance.random() < 0.75 else -100 for token in tokens]
                else:
                    slots += range(len(ids), len(ids) + IMAGE_TOKENS)
                    ids += [0] * IMAGE_TOKENS
                    labels += [-100] * IMAGE_TOKENS
        targets = next_token_targets(torch.tensor(labels))
        text = TokenSequence(torch.tensor(ids), targets, slots={"image": torch.tensor(slots, dtype=torch.int64)})
        return Encoded(sample, (text,), counts={"lm": float((targets != -100).sum())}, seed=seed)

    def collate(self, items, *, counts, packs=1):
        sequences = [
            TokenSequence(s.ids, s.targets, s.weight, s.slots, owner) for owner, i in enumerate(items) for s in i.text
        ]
        owners = [owner for owner, item in enumerate(items) for _ in item.sample.images]
        pixels = [
            torch.full((1, 3, 2, 2), random.Random(item.seed or 0).random())
            for item in items
            for _ in item.sample.images
        ]
        views = Views(
            torch.cat(pixels) if pixels else torch.zeros(0, 3, 2, 2),
            torch.arange(len(owners)),
            torch.tensor(owners, dtype=torch.int64),
            ((1, 1),) * len(owners),
            ((2, 2),) * len(owners),
        )
        infos = tuple(item.info() for item in items)
        return Batch(Row.pack(sequences, ("image",)), {}, {"image": views}, infos, dict(counts), packs=packs)

    def decode(self, ids):
        return bytes(ids).decode()


class ListSource(Source):
    """Samples from memory."""

    def __init__(self, samples: Sequence[Sample], name: str = "list") -> None:
        self.samples = list(samples)
        self.name = name

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    def has_image(self, index):
        return bool(self.samples[index].images)


def sample(name: str, length: int, *, image: bool = False, **extra) -> Sample:
    """A sample of `length` + 2 tokens, and two more for an image."""
    question = [{"type": "image"}, {"type": "text", "text": "q"}] if image else "q"
    return parse_sample(
        {
            "id": name,
            "images": ["x.png"] if image else [],
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "a" + "b" * length}],
        }
        | extra
    )


def samples(n: int, *, seed: int = 0, prefix: str = "", longest: int = 40) -> ListSource:
    """`n` samples of very different length, every third one without a picture."""
    chance = random.Random(seed or 0)
    found = [sample(f"{prefix}{i}", chance.randint(1, longest), image=i % 3 > 0) for i in range(n)]
    return ListSource(found, prefix or "list")


def answer(message: Message) -> str:
    return "".join(part.text for part in message.content if isinstance(part, TextPart))
