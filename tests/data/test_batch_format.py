"""The batch format carries every shape the sixteen systems need.

One small codec per shape, on bytes as tokens and real pictures. For each: the numbers by hand for one sample, and that
two samples in a pack are the two alone, one after the other.
"""

import dataclasses
import hashlib
import io
import pickle
import random
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from PIL import Image

from vlm.batch import IGNORE, Batch, Row, TokenSequence, Views, next_token_targets
from vlm.codec import Codec, Encoded, step_counts
from vlm.sample import ImagePart, TextPart, parse_sample

PAD, BOS, EOS, SLOT = 0, 1, 2, 3
FIRST_BYTE = 4


def tokens(text):
    return [byte + FIRST_BYTE for byte in text.encode()]


def causal(pieces, *, slots=None, weight=1.0):
    """A decoder's sequence from (ids, trained) pieces."""
    ids = [i for piece, _ in pieces for i in piece]
    labels = [i if trained else IGNORE for piece, trained in pieces for i in piece]
    targets = next_token_targets(torch.tensor(labels))
    placed = {name: torch.tensor(places, dtype=torch.int64) for name, places in (slots or {}).items()}
    return TokenSequence(torch.tensor(ids), targets, weight, placed)


def unlabelled(ids):
    return TokenSequence(torch.tensor(ids), torch.full((len(ids),), IGNORE))


def words(message):
    return "".join(part.text for part in message.content if isinstance(part, TextPart))


def trained(*sequences):
    return float(sum(s.weight * int((s.targets != IGNORE).sum()) for s in sequences))


class FormatCodec(Codec):
    """`resolutions` are the streams of views: their name, pixels per side and tokens per picture."""

    resolutions: ClassVar = {"image": 8}
    tokens_per_image = 4

    def num_tokens(self, width, height):
        return self.tokens_per_image

    def decode(self, ids):
        return bytes(i - FIRST_BYTE for i in ids if i >= FIRST_BYTE).decode()

    def labels(self, items):
        return {}

    def collate(self, items, *, counts, packs=1):
        def owned(sequences_of):
            return [dataclasses.replace(s, owner=at) for at, item in enumerate(items) for s in sequences_of(item)]

        pictures = [(at, image.read(item.sample)) for at, item in enumerate(items) for image in item.sample.images]
        views = {name: self.views(pictures, side) for name, side in self.resolutions.items()}
        names = sorted({name for item in items for name in item.rows})
        return Batch(
            text=Row.pack(owned(lambda item: item.text), tuple(self.resolutions)),
            rows={name: Row.pack(owned(lambda item, name=name: item.rows[name])) for name in names},
            views=views,
            samples=tuple(item.info() for item in items),
            counts=dict(counts),
            labels=self.labels(items),
            packs=packs,
        )

    @staticmethod
    def views(pictures, side):
        pixels = [
            torch.frombuffer(bytearray(image.resize((side, side)).tobytes()), dtype=torch.uint8)
            .view(side, side, 3)
            .permute(2, 0, 1)
            .float()
            / 255
            for _, image in pictures
        ]
        return Views(
            torch.stack(pixels) if pixels else torch.zeros(0, 3, side, side),
            image_of_view=torch.arange(len(pictures)),
            sample_of_image=torch.tensor([at for at, _ in pictures], dtype=torch.int64),
            grid=((1, 1),) * len(pictures),
            size=tuple(image.size for _, image in pictures),
        )


class LLaVA(FormatCodec):
    """Image slots in a causal row, labels on the answers."""

    all_text = False

    def encode(self, sample, *, seed=None, generate=False):
        pieces, slots, length = [([BOS], False)], [], 1
        for message in sample.messages:
            answer = message.role == "assistant"
            for part in message.content:
                if isinstance(part, ImagePart):
                    slots += range(length, length + self.tokens_per_image)
                    pieces.append(([SLOT] * self.tokens_per_image, False))
                else:
                    pieces.append((tokens(part.text), answer or self.all_text))
                length += len(pieces[-1][0])
            if answer:
                pieces.append(([EOS], True))
                length += 1
        row = causal(pieces, slots=dict.fromkeys(self.resolutions, slots))
        return Encoded(sample, (row,), counts={"lm": trained(row)}, seed=seed)


class Interleaved(LLaVA):
    """A document: every text token is trained, pictures stand between (VILA, MMC4)."""

    all_text = True


class TwoViews(LLaVA):
    """CogAgent: the small view fills slots; the large one is attended to and fills none."""

    resolutions: ClassVar = {"image": 8, "high": 32}

    def encode(self, sample, *, seed=None, generate=False):
        encoded = super().encode(sample, seed=seed)
        (row,) = encoded.text
        return dataclasses.replace(encoded, text=(dataclasses.replace(row, slots={"image": row.slots["image"]}),))


class PrefixT5(FormatCodec):
    """BLIP-2 with FlanT5: the caption is split at a point of the sample's own; one half is read, one written."""

    def encode(self, sample, *, seed=None, generate=False):
        text = words(sample.messages[-1]).split(" ")
        split = random.Random(seed).randint(1, len(text) - 1)
        prefix, suffix = " ".join(text[:split]), " ".join(text[split:])
        encoder = unlabelled([SLOT] * self.tokens_per_image + tokens(prefix) + [EOS])
        encoder = dataclasses.replace(encoder, slots={"image": torch.arange(self.tokens_per_image)})
        written = [*tokens(suffix), EOS]
        decoder = TokenSequence(torch.tensor([PAD, *written[:-1]]), torch.tensor(written))  # T5 starts with its pad id
        return Encoded(sample, (encoder,), {"decoder": (decoder,)}, {"lm": trained(decoder)}, seed)


class InstructBLIP(LLaVA):
    """One instruction, two tokenisations: the Q-Former's has markers of its own and no picture."""

    def encode(self, sample, *, seed=None, generate=False):
        encoded = super().encode(sample, seed=seed)
        qformer = unlabelled([101, *tokens(words(sample.messages[0]).lower()), 102])
        return dataclasses.replace(encoded, rows={"qformer": (qformer,)})


class WeightedAnswers(FormatCodec):
    """BLIP VQA: k answers to one question, each weighted by how many people gave it."""

    def encode(self, sample, *, seed=None, generate=False):
        question = unlabelled([BOS, *tokens(words(sample.messages[0])), EOS])
        answers = tuple(
            causal([([BOS], False), (tokens(text), True), ([EOS], True)], weight=weight)
            for text, weight in sample.answers
        )
        return Encoded(sample, (question,), {"answers": answers}, {"vqa": 1.0}, seed)


class Retrieval(FormatCodec):
    """Captions of one picture are positives of each other, so a pair carries the id of its picture."""

    def encode(self, sample, *, seed=None, generate=False):
        return Encoded(sample, (unlabelled([BOS, *tokens(words(sample.messages[0]))]),), counts={"itc": 1.0}, seed=seed)

    def labels(self, items):
        digests = [hashlib.blake2b(item.sample.group.encode(), digest_size=8).digest() for item in items]
        return {"image_id": torch.tensor([int.from_bytes(d, "big") >> 1 for d in digests])}


def picture(width, height, colour):
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


RED, BLUE = picture(20, 10, "red"), picture(6, 30, "blue")


def chat(name, *parts, images=(), answer=None, **extra):
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return parse_sample({"id": name, "messages": messages, "images": list(images)} | extra)


ONE = chat("1", None, "what?", images=[RED], answer="a red box", answers=["red", "dark red"], group="7.png")
TWO = chat("2", "and ", None, " or ", None, images=[BLUE, RED], answer="blue and red ones", answers=["b"], group="8")
TEXT = chat("3", "only text", answer="yes it is", answers=["y", "yes", "yep"], group="7.png")
CODECS = [LLaVA, Interleaved, TwoViews, PrefixT5, InstructBLIP, WeightedAnswers, Retrieval]


def pack(codec, *samples, seed=5):
    items = [codec.encode(sample, seed=seed + at) for at, sample in enumerate(samples)]
    return codec.collate(items, counts=step_counts(items))


def segments(row):
    bounds = row.cu_seqlens.tolist()
    return [row.ids[a:b].tolist() for a, b in pairwise(bounds)]


def check_row(row, streams=()):
    """What holds for every row."""
    lengths = row.cu_seqlens.diff()
    assert (row.cu_seqlens.dtype, row.ids.dtype, row.weights.dtype) == (torch.int32, torch.int64, torch.float32)
    assert row.cu_seqlens[0] == 0
    assert int(row.cu_seqlens[-1]) == len(row.ids) == len(row.positions)
    assert row.max_len == int(lengths.max())
    assert type(row.max_len) is int
    assert torch.equal(row.positions, torch.cat([torch.arange(int(n)) for n in lengths]))
    assert len(row.owner) == len(lengths)
    assert row.label_positions.shape == row.targets.shape == row.weights.shape
    assert (row.targets != IGNORE).all()
    assert set(row.slots) == set(streams)
    assert {slots.dtype for slots in row.slots.values()} <= {torch.int64}
    padded = row.padded(PAD)
    assert padded.ids.shape == padded.mask.shape == (len(lengths), row.max_len)
    assert [ids[mask].tolist() for ids, mask in zip(padded.ids, padded.mask, strict=True)] == segments(row)
    assert (padded.ids[~padded.mask] == PAD).all()
    assert torch.equal(padded.mask, torch.arange(row.max_len) < lengths[:, None])


def test_shared_positions_do_not_move_tokens():
    """A rectangle knows a row's bounds alone; positions and visual tokens of a system's own go through unchanged."""
    sequences = [
        TokenSequence(
            torch.arange(1, n + 1),
            torch.full((n,), IGNORE),
            slots={"image": torch.tensor([1, 2])},
            positions=torch.tensor([0, 1, 1, 1, 2, 3, 4])[:n],
            visual=visual,
        )
        for n, visual in ((5, torch.tensor([1])), (7, None), (4, torch.tensor([], dtype=torch.int64)))
    ]
    row = Row.pack(sequences, ["image"])
    assert row.positions.tolist() == [0, 1, 1, 1, 2, 0, 1, 1, 1, 2, 3, 4, 0, 1, 1, 1]
    assert row.visual.tolist() == [1, 6, 7]  # by default the slots
    padded = row.padded(PAD)
    assert [ids[mask].tolist() for ids, mask in zip(padded.ids, padded.mask, strict=True)] == segments(row)


def check_joined(whole, left, right, samples_left):
    """`whole` is `left` and then `right`."""
    shift = len(left.ids)
    assert segments(whole) == segments(left) + segments(right)
    assert torch.equal(whole.label_positions, torch.cat([left.label_positions, right.label_positions + shift]))
    for name in ("targets", "weights"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(left, name), getattr(right, name)]))
    assert torch.equal(whole.owner, torch.cat([left.owner, right.owner + samples_left]))
    for name in whole.slots:
        assert torch.equal(whole.slots[name], torch.cat([left.slots[name], right.slots[name] + shift]))


@pytest.mark.parametrize("codec", [cls() for cls in CODECS], ids=lambda codec: type(codec).__name__)
@pytest.mark.parametrize("pair", [(ONE, TWO), (TWO, TEXT), (TEXT, ONE)], ids=["images", "then text", "text first"])
def test_two_samples_in_a_pack_are_the_two_alone(codec, pair):
    whole = pack(codec, *pair)
    left, right = pack(codec, pair[0], seed=5), pack(codec, pair[1], seed=6)
    check_row(whole.text, codec.resolutions)
    check_joined(whole.text, left.text, right.text, 1)
    assert set(whole.rows) == set(left.rows) == set(right.rows)
    for name in whole.rows:
        check_row(whole.rows[name])
        check_joined(whole.rows[name], left.rows[name], right.rows[name], 1)
    for name, views in whole.views.items():
        a, b = left.views[name], right.views[name]
        assert torch.equal(views.pixels, torch.cat([a.pixels, b.pixels]))
        assert torch.equal(views.image_of_view, torch.cat([a.image_of_view, b.image_of_view + len(a.size)]))
        assert torch.equal(views.sample_of_image, torch.cat([a.sample_of_image, b.sample_of_image + 1]))
        assert (views.grid, views.size) == (a.grid + b.grid, a.size + b.size)
    for name in whole.labels:
        assert torch.equal(whole.labels[name], torch.cat([left.labels[name], right.labels[name]]))
    assert whole.samples == left.samples + right.samples
    assert whole.counts == {name: left.counts[name] + right.counts[name] for name in left.counts}
    assert whole.counts["images"] == sum(len(sample.images) for sample in pair)


@pytest.mark.parametrize("codec", [cls() for cls in CODECS], ids=lambda codec: type(codec).__name__)
def test_a_pack_travels_and_moves_whole(codec):
    batch = pack(codec, ONE, TWO, TEXT)
    assert str(pickle.loads(pickle.dumps(batch))) == str(batch)
    assert type(pickle.loads(pickle.dumps(codec))) is type(codec)
    moved = batch.to("meta")
    assert (moved.samples, moved.counts, moved.packs) == (batch.samples, batch.counts, batch.packs)
    rows, moved_rows = [batch.text, *batch.rows.values()], [moved.text, *moved.rows.values()]
    views, moved_views = list(batch.views.values()), list(moved.views.values())
    for old, new in zip([*rows, *views], [*moved_rows, *moved_views], strict=True):
        for field in dataclasses.fields(old):
            before, after = getattr(old, field.name), getattr(new, field.name)
            if isinstance(before, torch.Tensor):
                assert (after.device.type, after.shape, after.dtype) == ("meta", before.shape, before.dtype)
            elif field.name == "slots":
                assert {slot.device.type for slot in after.values()} <= {"meta"}
            else:
                assert after == before  # plain numbers stay where they are
    assert all(label.device.type == "meta" for label in moved.labels.values())


def test_llava_slots_and_targets():
    batch = pack(LLaVA(), TWO)
    text = "and ", " or ", "blue and red ones"
    starts = [1 + len(text[0]), 1 + len(text[0]) + 4 + len(text[1])]
    assert batch.text.slots["image"].tolist() == [*range(starts[0], starts[0] + 4), *range(starts[1], starts[1] + 4)]
    assert (batch.text.ids[batch.text.slots["image"]] == SLOT).all()
    answer = [*tokens(text[2]), EOS]
    assert batch.text.targets.tolist() == answer
    first = len(batch.text.ids) - len(answer)
    assert batch.text.label_positions.tolist() == list(range(first - 1, len(batch.text.ids) - 1))
    assert batch.counts == {"samples": 1.0, "images": 2.0, "lm": float(len(answer))}
    assert batch.views["image"].pixels.shape == (2, 3, 8, 8)
    assert batch.views["image"].size == ((6, 30), (20, 10))
    assert torch.equal(batch.views["image"].pixels[0, :, 0, 0], torch.tensor([0.0, 0.0, 1.0]))


def test_a_pack_without_pictures_has_empty_views():
    batch = pack(TwoViews(), TEXT)
    assert batch.views["image"].pixels.shape == (0, 3, 8, 8)
    assert batch.views["high"].pixels.shape == (0, 3, 32, 32)
    assert batch.text.slots["image"].shape == (0,)
    assert batch.text.slots["image"].dtype == torch.int64
    assert batch.counts["images"] == 0


def test_an_interleaved_document_trains_all_its_text():
    batch = pack(Interleaved(), TWO)
    text = tokens("and ") + tokens(" or ") + tokens("blue and red ones") + [EOS]
    assert batch.text.targets.tolist() == text  # the text after a picture is predicted from the last of its slots
    after_first = int(batch.text.slots["image"][3])
    assert after_first in batch.text.label_positions.tolist()
    assert not set(batch.text.slots["image"][:3].tolist()) & set(batch.text.label_positions.tolist())


def test_two_views_of_a_picture():
    batch = pack(TwoViews(), ONE, TWO)
    small, large = batch.views["image"], batch.views["high"]
    assert (small.pixels.shape, large.pixels.shape) == ((3, 3, 8, 8), (3, 3, 32, 32))
    assert small.sample_of_image.tolist() == large.sample_of_image.tolist() == [0, 1, 1]
    assert len(batch.text.slots["image"]) == 12
    assert len(batch.text.slots["high"]) == 0


def test_prefix_split_belongs_to_the_sample():
    codec = PrefixT5()
    decoded = set()
    for seed in range(20):
        batch = pack(codec, TWO, seed=seed)
        again = pack(codec, ONE, TWO, seed=seed - 1)  # the same seed at another place of another pack
        prefix, suffix = codec.decode(batch.text.ids.tolist()), codec.decode(batch.rows["decoder"].targets.tolist())
        assert f"{prefix} {suffix}" == "blue and red ones"
        assert segments(again.rows["decoder"])[1] == segments(batch.rows["decoder"])[0]
        assert batch.rows["decoder"].ids.tolist() == [PAD, *batch.rows["decoder"].targets.tolist()[:-1]]
        assert len(batch.text.targets) == 0
        assert batch.counts["lm"] == len(suffix) + 1
        decoded.add(prefix)
    assert decoded == {"blue", "blue and", "blue and red"}


def test_one_instruction_in_two_tokenisations():
    batch = pack(InstructBLIP(), chat("1", None, "What?", images=[RED], answer="x"), TEXT)
    assert segments(batch.rows["qformer"]) == [[101, *tokens("what?"), 102], [101, *tokens("only text"), 102]]
    assert segments(batch.text)[0] == [BOS, *[SLOT] * 4, *tokens("What?"), *tokens("x"), EOS]
    assert batch.rows["qformer"].owner.tolist() == batch.text.owner.tolist() == [0, 1]
    assert len(batch.rows["qformer"].targets) == 0


def test_weighted_answers_know_their_question():
    people = [{"text": "red", "weight": 0.7}, {"text": "no", "weight": 0.3}]
    batch = pack(WeightedAnswers(), chat("1", "colour?", answers=people), chat("2", "why?", answers=["so"]))
    answers = batch.rows["answers"]
    assert batch.text.owner.tolist() == [0, 1]
    assert answers.owner.tolist() == [0, 0, 1]
    assert segments(answers) == [[BOS, *tokens(text), EOS] for text in ("red", "no", "so")]
    assert answers.weights.tolist() == pytest.approx([0.7] * 4 + [0.3] * 3 + [1.0] * 3)
    assert answers.targets.tolist() == [*tokens("red"), EOS, *tokens("no"), EOS, *tokens("so"), EOS]
    assert batch.counts["vqa"] == 2.0  # the loss is the weighted sum over tokens by the number of questions
    assert batch.samples[0].answers == (("red", 0.7), ("no", 0.3))


def test_captions_of_one_picture_share_its_id():
    ids = pack(Retrieval(), ONE, TWO, TEXT).labels["image_id"]
    assert (ids.dtype, ids.shape) == (torch.int64, (3,))
    assert ids[0] == ids[2] != ids[1]
    assert ids[0] == pack(Retrieval(), TEXT).labels["image_id"][0]  # on every rank, in every pack


def test_a_row_needs_a_sequence():
    with pytest.raises(ValueError, match="at least one sequence"):
        Row.pack([])
