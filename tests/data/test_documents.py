"""Interleaved documents: where pictures stand, what is trained, where they are cut, and that none sees another."""

import vlm  # noqa: F401

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import GOLDEN, golden, golden_json
from callbacks import StageTransition
from tests.support.systems import RATE, build, make, picture
from tests.support.training import ListSource, trainer
from vlm.batch import IGNORE, Row, TokenSequence, next_token_targets
from vlm.codec import step_counts
from vlm.data import BatchSpec, Grouped, PretrainingData
from vlm.data.sources.interleave import interleave
from vlm.data.loading.encoder import Seeds
from vlm.data.modules.pretraining import draw_caption
from vlm.errors import SampleError, UserError
from vlm.functional import splice
from vlm.language.causal_lm import label_logits
from vlm.prompts import IMAGE, LlamaTokenizer, Tokenized, get_template
from vlm.prompts.documents import fit_document
from vlm.stages import Schedule
from vlm.sample import DOCUMENT, ImageFile, ImagePart, Message, TextPart, parse_sample

TOKENIZER = LlamaTokenizer(str(GOLDEN / "_shared/llama_sp_tokenizer.model"), legacy=False)
TEMPLATE = get_template("document")
MMC4 = [row for row in golden_json("vila_docs__a", "mmc4.json") if not row["image_following_text_only"]]


def document(content, images=(), name="d"):
    record = {"id": name, "images": list(images), "messages": [{"role": DOCUMENT, "content": content}]}
    return parse_sample(record)


def pictured(*sentences, every=1, name="d", folder=None):
    """A picture before each `every`-th sentence."""
    images = [(f"{name}{i}.png", i) for i in range(0, len(sentences), every)]
    content, kept = interleave(sentences, images, max_images=99)
    if folder is not None:
        kept = [picture(folder, file, (40 + i, 30), i) for i, file in enumerate(kept)]
    return document(content, kept, name)


# where pictures stand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", MMC4, ids=range(len(MMC4)))
def test_documents_of_mmc4_as_in_vila(row):
    doc = row["doc"]
    content, order = interleave(doc["text_list"], [(i["id"], i["matched_text_index"]) for i in doc["images"]])
    ids, labels = TEMPLATE.tokenize(document(content, map(str, order)).messages, TOKENIZER)
    if "official_code_raises" in row:  # a document without pictures, which is a document to us
        assert IMAGE not in ids
        assert labels[1:] == ids[1:]
        return
    assert order == row["image_order"]
    assert ids == row["input_ids"]
    # the published BOS label is never predicted by its own document, and at a seam of a pack by another one
    assert labels == [IGNORE, *(label if label != IMAGE else IGNORE for label in row["labels"][1:])]


@pytest.mark.parametrize("row", golden_json("vila_docs__a", "coyo.json"), ids=["group"])
def test_a_picture_and_its_caption_are_a_short_document_as_in_vila(row):
    for pair, ids, labels in zip(row["group"], row["input_ids"], row["labels"], strict=True):
        text = pair["text"].replace("<image>", "<IMAGE>")  # what the published reader does to the text
        chat = [Message("user", (ImagePart(), TextPart("Describe."))), Message("assistant", (TextPart(text),))]
        for messages in (chat, [Message(DOCUMENT, (ImagePart(), TextPart(text)))]):
            found = TEMPLATE.tokenize(messages, TOKENIZER)
            assert found.ids == ids
            assert found.labels == [IGNORE, IGNORE, *labels[2:]]


@given(
    sentences=st.lists(
        st.text("ab .", min_size=1, max_size=8).filter(lambda s: s == s.strip()), min_size=1, max_size=6
    ),
    places=st.lists(st.integers(0, 5), max_size=8),
)
def test_pictures_keep_their_sentence_and_text_is_never_lost(sentences, places):
    images = [(n, place % len(sentences)) for n, place in enumerate(places)]
    content, kept = interleave(sentences, images)
    assert sum(part["type"] == "image" for part in content) == len(kept) == min(6, len(images))
    assert set(kept) == set(range(len(images))[:6])
    text = " ".join(part["text"] for part in content if part["type"] == "text")
    assert text == " ".join(sentences)
    following = {}
    seen = 0
    for part in reversed(content):
        if part["type"] == "text":
            after = part["text"]
        else:
            following[kept[len(kept) - 1 - seen]] = after
            seen += 1
    assert all(following[n].startswith(sentences[place]) for n, place in images[:6])


def test_a_picture_of_no_sentence_is_refused():
    with pytest.raises(UserError, match=r"image 1 stands before sentence 2, but the document has 2 sentences"):
        interleave(["a", "b"], [("x", 0), ("y", 2)])


# what a document may be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"messages": [{"role": DOCUMENT, "content": [{"type": "image"}]}], "images": ["a"]}, "has no text"),
        ({"messages": [{"role": DOCUMENT, "content": "a"}, {"role": "user", "content": "b"}]}, "stands alone"),
        ({"messages": [{"role": DOCUMENT, "content": "a"}], "answers": ["b"]}, "leave other messages and 'answers'"),
    ],
)
def test_documents_that_cannot_be_are_refused(record, line):
    with pytest.raises(SampleError, match=re.escape(line)):
        parse_sample(record | {"id": "d"})


def test_a_template_of_turns_refuses_a_document():
    with pytest.raises(UserError, match=r"message 0: a document has no turns; set model\.template: document"):
        get_template("v1").render(document("a").messages)
    with pytest.raises(UserError, match="a document stands alone, found 2 messages"):
        TEMPLATE.render([*document("a").messages, Message("user", (TextPart("b"),))])


def test_a_document_as_a_prompt_ends_open_and_trains_nothing():
    spans = TEMPLATE.render(document("a b").messages, generate=True)
    assert [(span.text, span.trained) for span in spans] == [("a b", False)]
    assert draw_caption(document("a b"), Seeds(3, 0)) == document("a b")


def test_documents_of_one_sample_are_sequences_of_their_own(tmp_path: Path):
    codec = build("llava_1_5", {"connector": RATE}, template="document", max_tokens=48).codec
    pairs = [
        parse_sample({"id": str(n), "images": [str(picture(tmp_path, f"p{n}", (20, 20), n).path)], "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe."}]},
            {"role": "assistant", "content": "A ball. " * (n + 1)}]})
        for n in range(7)
    ]  # fmt: skip
    groups = Grouped(ListSource(pairs), size=3)
    assert len(groups) == 2
    assert groups.image_mask().tolist() == [True, True]
    for number, group in enumerate(groups):
        item = codec.encode(group)
        alone = [codec.encode(pair) for pair in pairs[3 * number : 3 * number + 3]]
        assert [s.ids.tolist() for s in item.text] == [one.text[0].ids.tolist() for one in alone]
        assert [s.targets.tolist() for s in item.text] == [one.text[0].targets.tolist() for one in alone]
        assert item.counts["lm"] == sum(one.counts["lm"] for one in alone)
        assert item.sample.images == tuple(
            image for pair in pairs[3 * number : 3 * number + 3] for image in pair.images
        )
        counts = step_counts([item])
        together, apart = (codec.collate(items, counts=counts) for items in ([item], alone))
        assert torch.equal(together.text.cu_seqlens, apart.text.cu_seqlens)
        assert torch.equal(together.views["image"].pixels, apart.views["image"].pixels)
        assert torch.equal(together.text.slots["image"], apart.text.slots["image"])
    documents = [pictured(*["A red ball."] * 3, name=name, folder=tmp_path) for name in "gh"]
    item = codec.encode(Grouped(ListSource(documents), size=2)[0])  # each is cut by itself
    assert [len(s.ids) for s in item.text] == [41, 41]
    assert len(item.sample.images) == 4
    assert item.counts["cut_documents"] == 2
    with pytest.raises(SampleError, match="only documents and pairs of one answer are grouped"):
        Grouped(ListSource([dataclasses.replace(pairs[0], messages=pairs[0].messages * 2)]), size=1)[0]


# cutting ------------------------------------------------------------------------------------------------------------


@given(
    kinds=st.lists(st.sampled_from("it"), min_size=1, max_size=20),
    widths=st.lists(st.integers(1, 5), min_size=20, max_size=20),
    limit=st.integers(2, 60),
)
def test_a_cut_keeps_whole_pictures_that_have_text_behind_them(kinds, widths, limit):
    ids = [1, *(IMAGE if kind == "i" else 7 for kind in kinds)]
    content = tuple(ImagePart() if kind == "i" else TextPart("t") for kind in kinds)
    images = tuple(ImageFile(str(i)) for i in range(kinds.count("i")))
    sample = dataclasses.replace(document("x"), messages=(Message(DOCUMENT, content),), images=images)
    widths = widths[: len(images)]
    tokens = Tokenized(ids, [7 if i == 7 else IGNORE for i in ids])
    fits = [
        end
        for end in range(2, len(ids) + 1)
        if ids[end - 1] == 7 and sum(widths[: ids[:end].count(IMAGE)]) + end - ids[:end].count(IMAGE) <= limit
    ]
    whole = len(ids) - len(images) + sum(widths) <= limit
    if not whole and not fits:
        with pytest.raises(SampleError, match="no text is left to train on; raise max_tokens"):
            fit_document(sample, tokens, widths, max_tokens=limit)
        return
    cut = fit_document(sample, tokens, widths, max_tokens=limit)
    if whole:
        assert cut == (sample, tokens, widths, {})
        return
    assert cut.tokens.ids == ids[: max(fits)]
    kept = cut.tokens.ids.count(IMAGE)
    assert cut.image_tokens == widths[:kept]
    assert [image.name for image in cut.sample.images] == [str(i) for i in range(kept)]
    assert sum(isinstance(part, ImagePart) for part in cut.sample.messages[0].content) == kept
    assert cut.events == {"cut_documents": 1.0, "dropped_images": len(images) - kept}
    assert len(cut.tokens.labels) == len(cut.tokens.ids)


def test_a_system_cuts_documents_and_counts_it(tmp_path: Path):
    sample = pictured("A red ball.", "It is blue.", "It is green.", folder=tmp_path)
    codec = build("llava_1_5", {"connector": RATE}, template="document", max_tokens=48).codec
    whole = build("llava_1_5", {"connector": RATE}, template="document").codec.encode(sample)
    assert whole.num_tokens == 1 + 3 * (16 + 4) + 1
    item = codec.encode(sample)
    assert len(item.sample.images) == 2
    assert item.num_tokens == 1 + 2 * (16 + 4)
    assert item.counts["cut_documents"] == 1
    assert item.counts["dropped_images"] == 1
    short = pictured("A red ball.", folder=tmp_path, name="s")
    counts = step_counts([item, codec.encode(sample), codec.encode(short)])
    assert counts["cut_documents"] == 2
    assert counts["images"] == 5
    batch = codec.collate([item, codec.encode(short)], counts=counts)
    assert batch.views["image"].pixels.shape[0] == 3
    assert len(batch.text.slots["image"]) == 48
    with pytest.raises(SampleError, match="no text is left to train on"):
        build("llava_1_5", {"connector": RATE}, template="document", max_tokens=17).codec.encode(short)
    with pytest.raises(SampleError, match="over the limit of 48"):
        codec.encode(sample, generate=True)


def test_a_run_logs_what_was_cut(tmp_path: Path):
    module = make("llava_1_5", {"connector": RATE}, template="document", max_tokens=48)
    documents = [pictured("A red ball.", "It is blue.", "It is green.", name=n, folder=tmp_path) for n in "abc"]
    data = PretrainingData([ListSource([*documents, document("Just text.")])], batch=BatchSpec(4))
    transition = StageTransition("1", {"connector": RATE}, schedule=Schedule("constant"))
    trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[transition]).fit(module, data)
    metrics = module.trainer.callback_metrics
    assert metrics["train/cut_documents"] == 3
    assert metrics["train/dropped_images"] == 3
    assert metrics["train/loss"] > 0


# packs --------------------------------------------------------------------------------------------------------------


def test_documents_of_a_pack_do_not_see_each_other(tmp_path: Path):
    module = build("llava_1_5", {"connector": RATE, "language": RATE}, template="document").double()
    made = [
        pictured("A red ball.", "It is blue.", "Night comes.", every=2, name="a", folder=tmp_path),
        document("No picture at all.", name="b"),
        pictured("Only one sentence here, but a longer one.", name="c", folder=tmp_path),
    ]
    items = [module.codec.encode(sample) for sample in made]
    counts = step_counts(items)
    packed = module.codec.collate(items, counts=counts)
    text = packed.text
    # all text but each document's first token is predicted, and nothing else
    slots = set(text.slots["image"].tolist())
    starts = set(text.cu_seqlens.tolist())
    predicted = {at for at in range(len(text.ids)) if at not in slots and at not in starts}
    assert {at + 1 for at in text.label_positions.tolist()} == predicted
    assert counts["lm"] == len(predicted)
    with torch.no_grad():
        whole = label_logits(module.language, module.embed_row(packed), text)
        alone = [module.codec.collate([item], counts=counts) for item in items]
        parts = torch.cat([label_logits(module.language, module.embed_row(one), one.text) for one in alone])
    assert (whole - parts).abs().max() < 1e-12


def test_a_row_is_the_published_one_without_padding():
    """VILA packs by length into padded rows; ours is one row, in which each sequence is the same to the bit."""
    tensors = golden("vila_repack__a")
    embed = tensors["weights/model.embed_tokens.weight"]
    projected = torch.nn.functional.linear(
        tensors["inputs/tower_features"],
        tensors["weights/model.mm_projector.weight"],
        tensors["weights/model.mm_projector.bias"],
    )
    sequences, labels = [], []
    for ids, mask in zip(tensors["inputs/input_ids"], tensors["inputs/attention_mask"].bool(), strict=True):
        own, slots = [], []
        for token in ids[mask].tolist():
            if token == IMAGE:
                slots += range(len(own), len(own) + 4)
            own += [0] * 4 if token == IMAGE else [token]
        wide = torch.tensor([IGNORE if at in slots or at == 0 else token for at, token in enumerate(own)])
        labels.append(wide)
        sequence = TokenSequence(
            torch.tensor(own), next_token_targets(wide), slots={"image": torch.tensor(slots).long()}
        )
        sequences.append(sequence)
    row = Row.pack(sequences, ["image"])
    embeds = splice(embed[row.ids], projected.flatten(0, 1), row.slots["image"])
    keep = tensors["outputs/spliced_mask"].bool()
    assert torch.allclose(embeds, tensors["outputs/spliced_embeds"][keep], atol=1e-6)
    published = tensors["outputs/spliced_labels"][keep]
    expected = published.clone()
    expected[row.cu_seqlens[:-1].long()] = IGNORE
    assert torch.cat(labels).tolist() == expected.tolist()
    packed = tensors["outputs/packed_mask"].bool()
    lengths = sorted(row.cu_seqlens.diff().tolist(), reverse=True)
    assert lengths == tensors["outputs/sorted_seqlens"].tolist()
    ours = positioned(row.positions, embeds)
    assert ours == positioned(tensors["outputs/packed_position_ids"][packed], tensors["outputs/packed_embeds"][packed])


def positioned(positions, embeds):
    return sorted(
        (int(at), *(round(v, 4) for v in row[:3].tolist())) for at, row in zip(positions, embeds, strict=True)
    )
