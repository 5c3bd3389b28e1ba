"""Tokens and labels of the LLaVA family against the published ones, and what holds for any conversation."""

import vlm  # noqa: F401

import dataclasses
import itertools
import json
import pickle
import re
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from vlm.batch import IGNORE
from vlm.errors import UserError
from vlm.prompts import (
    IMAGE,
    HubTokenizer,
    ImageMark,
    LlamaTokenizer,
    TextSpan,
    Tokenizer,
    get_template,
    tokenize,
)
from vlm.sample import ImagePart, Message, TextPart

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA = str(GOLDEN / "_shared/llama_sp_tokenizer.model")
MPT = str(GOLDEN / "_shared/mpt_bpe_tokenizer.json")
MARKS = ("<|im_start|>", "<|im_end|>")

TOKENIZERS = {
    "llama_legacy": LlamaTokenizer(LLAMA),
    "llama_new": LlamaTokenizer(LLAMA, legacy=False),
    "llama_nobos_chatml_legacy": LlamaTokenizer(LLAMA, add_bos=False, added_tokens=MARKS),
    "llama_nobos_chatml_new": LlamaTokenizer(LLAMA, legacy=False, add_bos=False, added_tokens=MARKS),
    "mpt_bpe": HubTokenizer(MPT, pad_token="<|padding|>"),
}


def rows(name):
    return json.loads((GOLDEN / "llava_conversations__a" / name).read_text())


def message(role, text):
    pieces = [[TextPart(piece)] if piece else [] for piece in text.split("<image>")]
    content = pieces[0]
    for piece in pieces[1:]:
        content += [ImagePart(), *piece]
    return Message(role, tuple(content))


def chat(*texts):
    return [message(("user", "assistant")[index % 2], text) for index, text in enumerate(texts)]


def text_of(spans):
    return "".join(span.text if isinstance(span, TextSpan) else "<image>" for span in spans)


def trained_text(spans):
    return [span.text for span in spans if isinstance(span, TextSpan) and span.trained]


def row_id(row):
    return f"{row['template']}-{row['tokenizer']}-{row['name']}"


# Rows whose labels the published code threw away whole say nothing about masks
TRAINING = [
    row for name in ("training.json", "training_mpt_v101.json") for row in rows(name) if not row["mismatch_warning"]
]


def test_the_golden_rows_are_the_known_ones():
    assert len(TRAINING) == 75
    assert len(rows("inference.json")) == 31


@pytest.mark.parametrize("row", TRAINING, ids=row_id)
def test_training_rows_agree_token_by_token(row):
    template, tokenizer = get_template(row["template"]), TOKENIZERS[row["tokenizer"]]
    if row["mm_use_im_start_end"]:
        tokenizer = dataclasses.replace(tokenizer, added_tokens=("<im_start>", "<im_end>"))
        template = dataclasses.replace(
            template, training=dataclasses.replace(template.training, image="<im_start>{}<im_end>")
        )
    if row["template"].startswith("v0"):  # LLaVA's first release gives LLaMA a token to pad with
        tokenizer = dataclasses.replace(tokenizer, pad_token="[PAD]")
    roles = {"human": "user", "gpt": "assistant"}
    messages = [message(roles[turn["from"]], turn["value"]) for turn in row["conversation"]]
    assert text_of(template.render(messages)) == row["training_prompt"]
    ids, labels = template.tokenize(messages, tokenizer)
    length = row["model_max_length"]
    assert ids[:length] == row["input_ids"]
    assert labels[:length] == row["labels"]
    assert tokenizer.pad_id == row["pad_token_id"]


@pytest.mark.parametrize("row", rows("inference.json"), ids=row_id)
def test_inference_rows_agree(row):
    template, tokenizer = get_template(row["template"]), TOKENIZERS[row["tokenizer"]]
    messages = chat(*(turn for turn in row["turns"] if turn is not None))
    spans = template.render(messages, generate=True)
    assert text_of(spans) == row["prompt"]
    assert template.tokenize(messages, tokenizer, generate=True) == tokenize(spans, tokenizer)
    assert tokenize(spans, tokenizer) == (row["input_ids"], [IGNORE] * len(row["input_ids"]))
    assert "".join(template.stop) == row["stop_string"]


# --- tokenizer ---------------------------------------------------------------------------------------------------


@cache
def sentencepiece_model():
    return sentencepiece.SentencePieceProcessor(model_file=LLAMA)


def published_ids(text, *, legacy, added):
    """The slow tokenizer's rule with nothing but sentencepiece (tests/golden/_shared/README.md)."""
    special = {"<unk>": 0, "<s>": 1, "</s>": 2} | {token: 32000 + i for i, token in enumerate(added)}
    ids, after_special = [], False
    for piece in re.split("(" + "|".join(map(re.escape, special)) + ")", text):
        if piece in special:
            ids.append(special[piece])
        elif piece and (legacy or not after_special):
            ids += sentencepiece_model().encode(piece)
        elif piece:
            ids += sentencepiece_model().encode("\n" + piece)[2:]
        after_special = piece in special if piece else after_special
    return ids


# words, blanks, byte fallback, Chinese, special tokens: what differs between implementations
PIECES = [
    "a",
    " ",
    "  ",
    "\n",
    "the",
    "ing",
    "12",
    "=",
    "#",
    "▁",
    "é",
    "你好",
    "🦙",
    "</s>",
    "<s>",
    "<|im_end|>",
    "<0x0A>",
]
TEXT = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=20).map("".join))


@settings(max_examples=300, deadline=None)
@given(text=TEXT, legacy=st.booleans())
@example(text="  two leading blanks", legacy=True)
@example(text="</s>  x</s>USER", legacy=False)
def test_llama_ids_are_those_of_the_published_tokenizer(text, legacy):
    tokenizer = TOKENIZERS["llama_nobos_chatml_legacy" if legacy else "llama_nobos_chatml_new"]
    ids, offsets = tokenizer.encode(text)
    assert ids == published_ids(text, legacy=legacy, added=MARKS)
    assert all(0 <= start < end <= len(text) for start, end in offsets)
    assert [end for _, end in offsets] == sorted(end for _, end in offsets)
    assert set(range(len(text))) == {at for start, end in offsets for at in range(start, end)}


def test_symbols_that_the_model_itself_defines(tmp_path):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(Path(LLAMA).read_bytes())
    for index, symbol in enumerate(MARKS):  # as in Yi's model
        proto.pieces[31000 + index].piece, proto.pieces[31000 + index].type = symbol, 4
    path = tmp_path / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ("<|im_start|>user\n你好 🦙<|im_end|>", " <|im_end|><|im_start|> the", "the <|im_ end"):
        assert LlamaTokenizer(str(tmp_path)).encode(text)[0] == plain.encode(text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_travel_light_and_decode(name):
    tokenizer = TOKENIZERS[name]
    ids, _ = tokenizer.encode("A dog, 你好 🦙.")
    packed = pickle.dumps(tokenizer)
    assert len(packed) < 500
    again = pickle.loads(packed)
    assert again == tokenizer
    assert hash(again) == hash(tokenizer)
    assert again.encode("A dog, 你好 🦙.")[0] == ids
    assert tokenizer.decode(ids) == "A dog, 你好 🦙."
    assert len(tokenizer) == {"mpt_bpe": 410}.get(name, 32002 if "chatml" in name else 32000)


def test_marks_and_new_tokens():
    llama = LlamaTokenizer(LLAMA, pad_token="[PAD]", added_tokens=["<im_start>"])
    assert (llama.bos_id, llama.eos_id, llama.pad_id, llama.token_id("<im_start>")) == (1, 2, 32000, 32001)
    assert llama.decode([1, 32001, 2], skip_special=False) == "<s><im_start></s>"
    assert llama.decode([1, 32001, 2]) == ""
    assert TOKENIZERS["llama_nobos_chatml_new"].bos_id is None
    mpt = HubTokenizer(MPT, eos_token="<|endoftext|>", added_tokens=("<new>",))
    assert (mpt.eos_id, mpt.token_id("<new>"), mpt.bos_id) == (0, 410, None)
    with pytest.raises(UserError, match="no token '<box>'"):
        llama.token_id("<box>")
    with pytest.raises(UserError, match="pad_token"):
        _ = HubTokenizer(MPT).pad_id


@pytest.mark.parametrize("name", TOKENIZERS)
def test_saved_tokenizers_open_in_transformers_with_the_same_ids(name, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = TOKENIZERS[name]
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for row in [row for row in TRAINING if row["tokenizer"] == name][:10]:
        for text in (row["training_prompt"], "  two  blanks</s> \n🦙"):
            assert theirs(text)["input_ids"] == bos + tokenizer.encode(text)[0]
    assert type(tokenizer)(str(tmp_path), add_bos=tokenizer.add_bos).encode("Hi")[0] == tokenizer.encode("Hi")[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_description_stands_in_yaml():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--tokenizer", type=Tokenizer)
    described = {"class_path": "vlm.prompts.LlamaTokenizer", "init_args": {"path": LLAMA, "added_tokens": list(MARKS)}}
    made = parser.instantiate_classes(parser.parse_object({"tokenizer": described})).tokenizer
    assert made == LlamaTokenizer(LLAMA, added_tokens=MARKS)


@pytest.mark.parametrize("cls", [LlamaTokenizer, HubTokenizer])
def test_bad_files_are_named(cls, tmp_path):
    expected = "tokenizer.model" if cls is LlamaTokenizer else "tokenizer.json"
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=f"{path}.*expected.*{expected}"):
            cls(str(path)).encode("a")
    (tmp_path / expected).write_text("neither")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / expected))):
        cls(str(tmp_path)).encode("a")


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(UserError, match="surrogate"):
        TOKENIZERS["llama_legacy"].encode("a\ud83d")


# --- templates ---------------------------------------------------------------------------------------------------

NASTY = st.lists(
    st.sampled_from(
        ["a", "Brown", " ", "\n", "###", "</s>", "ASSISTANT:", "USER: ", "[/INST]", "{}", "42", "你", "🦙"]
    ),
    min_size=1,
    max_size=6,
).map("".join)
NASTY_OR_NONE = st.just("") | NASTY
EXCHANGES = st.lists(st.tuples(NASTY, NASTY), min_size=1, max_size=3)


def published_prompt(name, system, exchanges):
    """The prompt string, built turn by turn as `Conversation.get_prompt` and v0's training code say."""
    if name == "v1":
        return f"{system} " + "".join(f"USER: {q} ASSISTANT: {a}</s>" for q, a in exchanges)
    if name == "v0":
        return f"{system}\n\n" + "".join(f"### Human: {q}\n### Assistant: {a}\n" for q, a in exchanges) + "### "
    if name == "chatml_direct":
        start = f"<|im_start|>system\n{system}<|im_end|>"
        user, assistant = "<|im_start|>user\n", "<|im_start|>assistant\n"
        return start + "".join(f"{user}{q}<|im_end|>{assistant}{a}<|im_end|>" for q, a in exchanges)
    (first, answer), *others = exchanges
    text = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{first} [/INST] {answer} </s>"
    return text + "".join(f"<s>[INST] {q} [/INST] {a} </s>" for q, a in others)


TRAINED = {
    "v1": lambda a: f" {a}</s>",
    "v0": lambda a: f"### Assistant: {a}\n",
    "chatml_direct": lambda a: f"{a}<|im_end|>",
    "llama_2": lambda a: f" {a} </s>",
}


@settings(max_examples=60, deadline=None)
@given(exchanges=EXCHANGES, system=NASTY, name=st.sampled_from(sorted(TRAINED)))
def test_text_is_the_published_prompt_and_answers_are_trained(exchanges, system, name):
    turns = [text for exchange in exchanges for text in exchange]
    spans = get_template(name).render([message("system", system), *chat(*turns)])
    assert text_of(spans) == published_prompt(name, system, exchanges)
    expected = "".join(TRAINED[name](answer) for _, answer in exchanges)
    if name == "v0":  # and the mark that ends every answer, written at the head of the next turn
        expected = "".join("###" + TRAINED[name](answer) for _, answer in exchanges) + "### "
    assert "".join(trained_text(spans)) == expected


@settings(max_examples=60, deadline=None)
@given(
    exchanges=EXCHANGES,
    name=st.sampled_from(["v1", "llama_2", "mistral_instruct", "chatml_direct"]),
    tokenizer=st.sampled_from(["llama_legacy", "llama_new", "llama_nobos_chatml_new"]),
    images=st.integers(0, 3),
)
def test_the_answer_is_trained_whole_and_follows_the_prompt(exchanges, name, tokenizer, images):
    messages = chat(*(text for exchange in exchanges for text in exchange))
    messages[0] = Message("user", (*[ImagePart()] * images, *messages[0].content))
    template, tokenizer = get_template(name), TOKENIZERS[tokenizer]
    prompt, _ = template.tokenize(messages, tokenizer, generate=True)
    ids, labels = template.tokenize(messages, tokenizer)
    assert ids[: len(prompt)] == prompt
    assert labels[len(prompt) :] == ids[len(prompt) :]
    assert ids.count(IMAGE) == images
    assert IMAGE not in labels
    assert len(labels) == len(ids)
    # an earlier answer is trained from the same place on as when it was the last one
    earlier = template.tokenize(messages[:2], tokenizer)
    assert labels[: len(earlier.ids) - 1] == earlier.labels[:-1]


@pytest.mark.parametrize("name", ["v1", "llama_2", "chatml_direct", "qwen_vl_chat", "fuyu", "v0"])
def test_an_answer_that_is_begun_is_gone_on_with(name):
    """Its prompt is a prompt, then the start of the answer as the whole answer is trained."""
    template = get_template(name)
    begun = [*chat("What is it?"), Message("assistant", (TextPart("The answer is"),), begun=True)]
    whole = chat("What is it?", "The answer is 42.")
    asked, found = (text_of(template.render(messages, generate=True)) for messages in (whole, begun))
    assert found.startswith(asked)
    assert found.endswith("The answer is")
    form = template.generation or template.training
    finished = dataclasses.replace(template, training=form, generation=None).render(whole)
    assert text_of(finished).startswith(found)
    assert not trained_text(template.render(begun, generate=True))
    with pytest.raises(UserError, match="message 1: an answer that is only begun; it has no end to train on"):
        template.render(begun)
    with pytest.raises(UserError, match="message 1: an answer that is only begun; only the last one may be"):
        template.render([*begun, *chat("And now?")], generate=True)


def test_a_counted_mask_is_the_spans_where_the_stop_mark_splits_as_in_llama(tmp_path):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(Path(LLAMA).read_bytes())
    for piece in proto.pieces:  # LLaMA knows `###` behind a blank only; inside a line it is `##` and `#`
        if re.fullmatch("#{3,}", piece.piece):
            piece.piece += "\ue000"
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer, template = LlamaTokenizer(str(tmp_path)), get_template("v0")
    assert len(tokenizer.encode("###")[0]) == 1
    assert len(tokenizer.encode("a\n###")[0]) == 4
    for turns in (("Hi!", "Hello"), ("<image>\nWhat?", "A dog."), ("Hi!", "12 + 30", "And?", "</s>", "Thanks", "You")):
        spans = itertools.chain.from_iterable(template.turns(chat(*turns)))
        assert template.tokenize(chat(*turns), tokenizer) == tokenize(spans, tokenizer)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("What?<image>", "<image>\nWhat?"),
        ("<image>", "<image>"),
        ("see <image> here \n", "<image>\nsee  here"),
        (" no image ", " no image "),
        ("<image><image>Compare.", "<image>\n<image>\nCompare."),
        ("Left: <image>\nRight:<image>", "Left: <image>\nRight:\n<image>"),
    ],
)
def test_places_of_images(content, text):
    spans = get_template("chatml_direct").render(chat("Hi", "Hello", content, "Yes"))
    assert f"<|im_start|>user\n{text}<|im_end|>" in text_of(spans)


def test_text_that_spells_an_image_stays_text():
    spans = get_template("v1").render([Message("user", (TextPart("<image> {}"),)), *chat("", "ok")[1:]])
    assert not any(isinstance(span, ImageMark) for span in spans)


def test_plain_trains_on_the_caption_alone():
    plain = get_template("plain")
    picture = chat("Describe it.<image>", "a dog")
    assert plain.render(picture) == [ImageMark(), TextSpan("a dog\n", trained=True)]
    assert plain.render(picture, generate=True) == [ImageMark(), TextSpan("\nDescribe it.\n")]
    assert plain.render(chat("<image>"), generate=True) == [ImageMark()]


@pytest.mark.parametrize(
    "name", ["v1", "llama_2", "mpt", "plain", "mini_gemini_gemma", "qwen_vl_chat", "llava_llama_3"]
)
def test_leading_answers_are_left_out(name):
    template = get_template(name)
    turns = chat("<image>\nHi", "Hello")
    assert template.render([message("assistant", "Welcome!"), *turns]) == template.render(turns)


def published_v0(system, turns, tokenizer):
    """Ids and labels as `preprocess`, `_add_speaker_and_signal` and `_mask_targets` of LLaVA's `train.py` make them."""

    def ids_of(text):
        pieces = [tokenizer.encode(piece)[0] for piece in text.split("<image>")]
        return [tokenizer.bos_id, *pieces[0], *(token for piece in pieces[1:] for token in (IMAGE, *piece))]

    names = {"user": "Human", "assistant": "Assistant"}
    said = [f"### {names[role]}: {text}\n" for role, text in turns]
    ids = ids_of(system + "\n\n" + "".join(said) + "### ")
    at = len(ids_of(system + "\n\n"))
    labels = [IGNORE] * at + ids[at:]
    for (role, _), text in zip(turns, said, strict=True):
        length = len(ids_of(text))
        if role == "user":
            labels[at + 2 : at + length] = [IGNORE] * len(labels[at + 2 : at + length])
        at += length
    return ids, [IGNORE if label == IMAGE else label for label in labels]


@pytest.mark.parametrize("name", ["v0", "v0_mmtag", "v0_first"])
@pytest.mark.parametrize("greetings", [0, 1])
def test_v0_keeps_and_trains_an_answer_before_the_first_question(name, greetings):
    turns = [("assistant", "Welcome, 1 + 1!")] * greetings + [("user", "Hi, who?"), ("assistant", "I am here.")]
    template, tokenizer = get_template(name), TOKENIZERS["llama_legacy"]
    messages = [message(role, text) for role, text in turns]
    ids, labels = published_v0(template.system, turns, tokenizer)
    assert template.tokenize(messages, tokenizer) == (ids, labels)
    trained = tokenizer.decode([label for label in labels if label != IGNORE])
    assert ("Welcome, 1 + 1!" in trained) == bool(greetings)
    asked = text_of(template.render(messages, generate=True))
    greeting = "Assistant: Welcome, 1 + 1!###" * greetings
    assert asked == f"{template.system}###{greeting}Human: Hi, who?###Assistant:"
    with pytest.raises(UserError, match="message 1: two messages of the assistant in a row"):
        template.render([message("assistant", "Welcome!"), message("assistant", "And?"), *messages[-2:]])


FRONT = ["v1", "llama_2", "mistral_instruct", "chatml_direct", "v0", "v1_mmtag", "mini_gemini_mistral_instruct"]


@settings(max_examples=100, deadline=None)
@given(before=NASTY_OR_NONE, after=NASTY_OR_NONE, name=st.sampled_from(FRONT))
@example(before="Look at ", after=" and count", name="mini_gemini_mistral_instruct")
def test_an_image_anywhere_in_a_turn_moves_to_its_front(before, after, name):
    """As `preprocess_multimodal` of LLaVA and Mini-Gemini: the mark goes, the blanks around it stay inside the text."""
    moved = ("<image>\n" + (before + after).strip()).strip()
    content = [TextPart(before)] * bool(before) + [ImagePart()] + [TextPart(after)] * bool(after)
    found = text_of(get_template(name).render([Message("user", tuple(content)), message("assistant", "A")]))
    if name == "v1_mmtag":
        moved = moved.replace("<image>", "<Image><image></Image>")
    user = {"v1": "USER: {} ", "v0": "### Human: {}\n", "v1_mmtag": "USER: {} "}
    form = user.get(name, "<|im_start|>user\n{}<|im_end|>" if name == "chatml_direct" else "{} [/INST]")
    assert form.replace("{}", moved) in found


@pytest.mark.parametrize(
    ("roles", "line"),
    [
        ("sa", "no message of the user"),
        ("", "no message of the user"),
        ("uu", "message 1: two messages of the user in a row"),
        ("uaa", "message 2: two messages of the assistant in a row"),
        ("uau", "message 2: the user's last message has no answer"),
        ("usa", "message 1: a system message may only come first"),
    ],
)
def test_misordered_messages_are_refused(roles, line):
    names = {"s": "system", "u": "user", "a": "assistant"}
    with pytest.raises(UserError, match=line):
        get_template("v1").render([message(names[role], "text") for role in roles])


def test_content_without_a_place_is_refused():
    with pytest.raises(UserError, match="message 1: an image in a message of the assistant"):
        get_template("v1").render(chat("Draw", "<image>"))
    with pytest.raises(UserError, match="message 0: the user's turn is empty"):
        get_template("v1").render(chat("", "text"))
    with pytest.raises(UserError, match=r"unknown template 'v2'; use one of .*chatml_direct, .*vicuna_v1"):
        get_template("v2")


def test_a_hub_name_is_looked_up_there(monkeypatch):
    import huggingface_hub

    def only_the_model(repository, name, local_files_only):
        if name != "tokenizer.model":
            raise huggingface_hub.errors.LocalEntryNotFoundError(name)
        assert repository == "some/llama"
        return LLAMA

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", only_the_model)
    assert LlamaTokenizer("some/llama").encode("Hi") == LlamaTokenizer(LLAMA).encode("Hi")
    with pytest.raises(UserError, match="'some/llama': neither on this disk nor to be had from the hub"):
        HubTokenizer("some/llama").encode("Hi")
