"""What is wrong with records as people have them: nothing is lost in silence, and one bad record is one bad record."""

import copy
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import vlm.data
import pytest
import torch
from PIL import Image

from tests.support.systems import SYSTEMS, TOKENIZER, llava_1_5
from vlm.batch import IGNORE, Row
from vlm.codec import step_counts
from vlm.data import ImageFolder, LlavaJson, WebDataset
from vlm.errors import SampleError, UserError
from vlm.prompts import LlamaTokenizer, get_template
from vlm.sample import Message, Sample, TextPart, parse_sample
from vlm.systems.encoder_decoder import EncoderDecoderCodec
from vlm.systems.row import RowCodec

ASKED = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A boat."}]
LLAVA = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A boat."}]
FORMS: dict[str, dict[str, Any]] = {
    "llava": {"id": "7", "image": "a.png", "conversations": LLAVA},
    "llava_text": {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A boat."}]},
    "sharegpt": {"system": "Be brief.", "images": ["a.png"], "conversations": LLAVA},
    "chatml": {
        "image": "a.png",
        "conversations": [{"from": "user", "value": "<image>\nWhat?"}, {"from": "assistant", "value": "A boat."}],
    },
    "qwen": {
        "conversations": [
            {"from": "user", "value": "Picture 1: <img>a.png</img>\nWhat?"},
            {"from": "assistant", "value": "<ref>A boat.</ref><box>(10,20),(30,40)</box>"},
        ]
    },
    "qwen_human": {
        "conversations": [{"from": "human", "value": "<img>a.png</img>\nWhat?"}, {"from": "gpt", "value": "A boat."}]
    },
    "messages": {"messages": ASKED, "images": ["a.png"]},
    "messages_image": {"messages": ASKED, "image": "a.png"},
    "parts": {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A boat."},
        ],
    },
    "own_paths": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A boat."},
        ]
    },
    "openai": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "a.png"}},
                    {"type": "text", "text": "What?"},
                ],
            },
            {"role": "assistant", "content": "A boat."},
        ]
    },
    "mmc4": {"text_list": ["A boat."], "image_info": [{"image_name": "a.png", "matched_text_index": 0}]},
    "obelics": {"images": ["a.png", None], "texts": [None, "A boat."]},
    "grit": {"image": "a.png", "caption": "A boat.", "ref_exps": [[0, 7, 0.1, 0.2, 0.5, 0.9, 0.98]]},
    "refcoco": {"image": "a.png", "bbox": [1, 1, 2, 2], "sentences": ["A boat."]},
    "qwen_refcoco": {"image": "a.png", "sent": "A boat.", "bbox": [1, 1, 2, 2], "width": 8, "height": 8},
    "ocr": {"image": "a.png", "lines": [{"text": "A boat.", "quad": [0, 0, 2, 0, 2, 2, 0, 2]}]},
    "screens": {"image": "a.png", "elements": [{"html": "A boat.", "box": [1, 1, 2, 2]}]},
    "chart": {"imgname": "a.png", "query": "What?", "label": "A boat."},
    "pairs": {"images": ["a.png"], "question": "What?", "answer": "A boat."},
    "qwen_vqa": {"image": "a.png", "question": "What?", "question_id": 7, "answer": "A boat."},
    "flan": {"question": "What?", "answer": "A boat.", "image": ["a.png"]},
    "flan_text": {"inputs": "What?", "targets": "A boat."},
    "folder": {"file_name": "a.png", "text": "A boat."},
    "text": {"text": "A boat."},
    "coco": {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "A boat."}]},
    "karpathy": {
        "images": [{"imgid": 0, "filename": "a.png", "split": "test", "sentences": [{"raw": "A boat."}]}],
        "dataset": "flickr30k",
    },
    "docvqa": {"data": [{"questionId": 7, "question": "What?", "image": "a.png", "answers": ["A boat."]}]},
}
READS: dict[str, set[str]] = {
    "LlavaJson": {"llava", "llava_text", "sharegpt"},
    "MessagesJson": {
        *("llava", "llava_text", "sharegpt", "chatml"),
        *("messages", "messages_image", "parts", "own_paths", "openai"),
    },
    "ChatJson": {"parts", "own_paths", "openai"},
    "QwenJson": {"qwen"},
    "Mmc4": {"mmc4"},
    "Mmc4Pairs": {"mmc4"},
    "Obelics": {"obelics"},
    "GroundedCaptions": {"grit"},
    "ReferringExpressions": {"refcoco"},
    "QwenReferring": {"qwen_refcoco"},
    "TextLines": {"ocr"},
    "ScreenElements": {"screens"},
    "ChartQA": {"chart"},
    "ImagePairs": {"pairs"},
    "QwenQuestions": {"qwen_vqa"},
    "VisualFlan": {"flan", "flan_text", "qwen_vqa"},
    "PlainText": {"text"},
    "ImageFolder": {"folder"},
    "CocoCaptions": {"coco"},
    "KarpathyCaptions": {"karpathy"},
    "DocVQA": {"docvqa"},
}
"""Which forms each reader takes. All other pairs have to be refused."""
READER_OF = {form: [name for name in READS if form in READS[name]] for form in FORMS}


def read(folder: Path, reader: str, *records: Any) -> Any:
    file = folder / ("metadata.jsonl" if reader == "ImageFolder" else "data.json")
    single = len(records) == 1 and reader in ("CocoCaptions", "KarpathyCaptions", "DocVQA")
    file.write_text(json.dumps(records[0]) if single else "\n".join(json.dumps(record) for record in records))
    task = {"task": "vqa"} if reader == "QwenQuestions" else {}
    return getattr(vlm.data, reader)(folder if reader == "ImageFolder" else file, **task)


@pytest.mark.parametrize("reader", READS)
def test_every_reader_reads_a_form_rightly_or_names_the_reader_for_it(tmp_path: Path, reader: str) -> None:
    for form, record in FORMS.items():
        if form in READS[reader]:
            source = read(tmp_path, reader, record)
            sample: Sample = source[0]
            shown = form not in ("llava_text", "flan_text", "text")
            assert source.has_image(0) == bool(source.image_mask()[0]) == shown, form
            assert [image.name for image in sample.images] == ["a.png"] * shown, form
            texts = [part.text for message in sample.messages for part in message.content if hasattr(part, "text")]
            assert any("A boat." in text for text in texts), form
            assert sample.messages[0].role == "system" or form != "sharegpt"
            continue
        with pytest.raises(UserError) as caught:
            read(tmp_path, reader, record)[0]
        message = str(caught.value)
        named = {name for name in READS if f"vlm.data.{name}" in message}
        if (reader, form) == ("QwenJson", "qwen_human"):
            assert "unknown role 'human'; use one of system, user, assistant" in message
        else:
            assert named & (set(READER_OF[form]) or {"QwenJson"}), (form, message)
        assert "\n" not in message
        assert len(message) < 1000


def turns(**changes: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A boat."} | changes]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"videos": ["a.mp4"]}, "key 'videos': nothing here reads it; leave the record out"),
        ({"video": "a.mp4"}, "key 'video'"),
        ({"audio": {"path": "a.wav"}}, "key 'audio'"),
        ({"tools": [{"name": "f"}]}, "key 'tools': no system here is told of tools"),
        ({"rejected": "No."}, "preferences are not trained on"),
        ({"loss_weight": 0.5}, "weights stand in the assistant's turns"),
        ({"img": "a.png"}, "key 'img': did you mean 'image"),
        ({"imagess": ["a.png"]}, "key 'imagess': did you mean 'image"),
        ({"Image": "a.png"}, "key 'Image' is not read in this form; did you mean 'image"),
        ({"image_path": "b/a.JPEG"}, "key 'image_path': did you mean 'image"),
        ({"file_name": "a.jpg"}, "key 'file_name': did you mean 'image"),
        ({"picture": {"bytes": "x", "path": None}}, "key 'picture': did you mean 'image"),
        ({"system_prompt": "Be brief."}, "key 'system_prompt': did you mean 'system'"),
        ({"messages": turns(tool_calls=[{"id": 1}])}, r"messages\[1\]: key 'tool_calls'"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, r"messages\[0\]: key 'tool_calls'"),
        ({"messages": turns(content=None)}, r"messages\[1\]: 'content' is null; write its text"),
        ({"messages": turns(reasoning_content="Hm.")}, "key 'reasoning_content': write it into the answer's text"),
        ({"messages": turns(image="a.png")}, "images are named in the record or in a part of the turn"),
        ({"messages": turns(weigth=0)}, "key 'weigth': did you mean 'weight'"),
        ({"messages": turns(weight=-1)}, "'weight' must be a number of at least 0, found -1"),
        ({"messages": turns(weight=float("nan"))}, "'weight' must be a number of at least 0"),
        ({"messages": turns(weight="0")}, "'weight' must be a number of at least 0, found '0'"),
        ({"messages": turns(loss=2.3)}, "'loss' must be true or false, found 2.3; a factor is called 'weight'"),
        ({"messages": turns(weight=0.5, loss_weight=0.7)}, "'weight' and 'loss_weight' differ"),
        ({"messages": turns(train=False)}, "no answer is trained"),
        ({"messages": [turns()[0] | {"train": True}, turns()[1]]}, "asks to train on a turn of the user"),
        ({"system": "x", "messages": [{"role": "system", "content": "y"}, *turns()]}, "has both a key 'system' and"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "image": "a"}]}]},
            "of type 'text' na",
        ),
        ({"messages": ASKED}, "1 image marks in the text but 0 images; .* stands in a part"),
        ({"messages": FORMS["own_paths"]["messages"], "images": ["b.png"]}, "named both under 'images' and in parts"),
    ],
)
def test_keys_that_mean_something_are_obeyed_or_refused(tmp_path: Path, changes: dict, message: str) -> None:
    source = read(tmp_path, "MessagesJson", {"messages": turns()} | changes)
    with pytest.raises(SampleError, match=message):
        source[0]


def test_keys_of_ones_own_pass(tmp_path: Path) -> None:
    own = {
        **{"source": "web", "license": "CC", "url": "https://x.org/a.png", "height": 4, "width": 5, "split": "train"},
        **{"image_id": 7, "imageId": 7, "image_size": [4, 5], "image_w": 4, "caption": "A boat.", "answer": "A boat."},
        **{"model": "gpt", "conversation_id": "a", "message_count": 2, "score": 0.3, "weight": 12.5, "dataset": "x"},
        **{"videos": [], "tools": "[]", "audio": None, "img": None, "file_name": "notes.md", "system": ""},
    }
    chat = [
        {"from": "human", "value": "Hi", "weight": 0, "name": "Ann"},
        {"from": "gpt", "value": "Hello", "weight": 1},
    ]
    record = {"conversations": chat, **own}
    for reader in ("LlavaJson", "MessagesJson"):
        assert read(tmp_path, reader, record)[0].messages[1].content == (TextPart("Hello"),)
    shown = FORMS["llava"] | {"image_url": "https://x.org/a.png", "img_path": "thumbs/a.png", "file_name": "a.png"}
    assert [image.name for image in read(tmp_path, "LlavaJson", shown)[0].images] == ["a.png"]


def test_a_mark_can_be_written_as_text(tmp_path: Path) -> None:
    said = [{"type": "text", "text": "What is <image>, what <img>a.png</img>?"}]
    answer = {"from": "gpt", "value": [{"type": "text", "text": "A mark."}]}
    for reader, role in (("LlavaJson", "human"), ("MessagesJson", "human"), ("QwenJson", "user")):
        answer["from"] = "assistant" if role == "user" else "gpt"
        sample = read(tmp_path, reader, {"conversations": [{"from": role, "value": said}, answer]})[0]
        assert sample.messages[0].content == (TextPart("What is <image>, what <img>a.png</img>?"),)
        assert sample.images == ()


# Weights of answers


def weighted(*weights: Any) -> Sample:
    messages = []
    for at, weight in enumerate(weights):
        messages += [
            {"role": "user", "content": f"Question {at}?"},
            {"role": "assistant", "content": f"Answer {at}."} | weight,
        ]
    return parse_sample({"messages": messages})


ROW_SYSTEMS = {name: system for name, system in SYSTEMS.items() if not system.needs_image and system.uses[-1:] != ["x"]}


def row_codecs() -> Iterator[tuple[str, RowCodec]]:
    for name, system in SYSTEMS.items():
        codec = system.make().codec
        if isinstance(codec, RowCodec) and not system.needs_image and not isinstance(codec, EncoderDecoderCodec):
            yield name, codec


CODECS = dict(row_codecs())


@pytest.mark.parametrize("name", CODECS)
def test_an_answer_counts_as_much_as_it_says(name: str) -> None:
    codec = CODECS[name]
    plain = codec.encode(weighted({}, {}, {}))
    item = codec.encode(weighted({"loss": False}, {"weight": 0.25}, {"train": True, "loss_weight": 3}))
    assert torch.equal(item.text[0].ids, plain.text[0].ids)
    off, half, more = (
        {at for at, target in enumerate(codec.encode(weighted(*chosen)).text[0].targets.tolist()) if target != IGNORE}
        for chosen in (
            ({}, {"train": 0}, {"train": 0}),
            ({"train": 0}, {}, {"train": 0}),
            ({"train": 0}, {"weight": 0}, {}),
        )
    )
    marks = half & more  # Qwen-VL trains the marks of turns, whoever speaks
    trained = {at for at, target in enumerate(item.text[0].targets.tolist()) if target != IGNORE}
    assert trained == half | more
    assert {at for at, target in enumerate(plain.text[0].targets.tolist()) if target != IGNORE} == off | half | more
    assert all(turn - marks for turn in (off, half, more))
    row = Row.pack([*item.text, *plain.text], ["image"])
    expected = [1.0 if at in marks else 0.25 if at in half else 3.0 for at in sorted(trained)]
    assert row.weights.tolist() == [*expected, *[1.0] * int(plain.counts["lm"])]
    assert step_counts([item, plain])["lm"] == row.weights.double().sum().item()


def test_every_template_leaves_out_an_answer_of_weight_0() -> None:
    tokenizer = LlamaTokenizer(TOKENIZER.path, added_tokens=("<im_start>", "<im_end>"))
    asked = (Message("user", (TextPart("One?"),)), Message("assistant", (TextPart("first"),)))
    again = (Message("user", (TextPart("Two?"),)), Message("assistant", (TextPart("second"),)))
    for name in ("v0", "v0_first", "v1", "llama_2", "mpt", "mistral_instruct", "mini_gemini_gemma", "qwen_vl"):
        silent = Message("assistant", asked[1].content, weight=0.0)
        tokens = get_template(name).tokenize([asked[0], silent, *again], tokenizer)
        said = tokenizer.decode([label for label in tokens.labels if label != IGNORE])
        assert "second" in said, name
        assert "first" not in said, name


# Text that spells control tokens


@pytest.mark.parametrize("name", CODECS)
def test_text_of_data_spells_no_control_token(name: str) -> None:
    """In turns of everybody, beside template's own marks, which stay what they are."""
    codec = CODECS[name]
    added = codec.tokenizer._opened.backend.get_added_tokens_decoder()
    special = {index: token.content for index, token in added.items() if token.special}
    spelled = [*special.values(), "<image>", "</s>", "<s>", "<|im_end|>", "<img>", "|ENDOFTEXT|", "<|endoftext|>"]
    spelled = list(dict.fromkeys([*spelled[:24], *spelled[-32:]]))

    def encoded(text: str) -> tuple[list[int], str]:
        turns = [("system", f"s {text}"), ("user", f"u {text} u"), ("assistant", f"a {text}")]
        item = codec.encode(parse_sample({"messages": [{"role": role, "content": said} for role, said in turns]}))
        ids = item.text[0].ids.tolist()
        return [token for token in ids if token in special], codec.tokenizer.decode(ids, skip_special=False)

    expected, _ = encoded("word")
    for at in range(0, len(spelled), 4):
        text = " ".join(spelled[at : at + 4])
        found, decoded = encoded(text)
        assert found == expected, text
        assert decoded.count(text) == 3, decoded


@pytest.mark.parametrize("name", sorted(SYSTEMS.keys() - CODECS.keys()))
def test_what_an_image_is_asked_spells_no_control_token(name: str, tmp_path: Path) -> None:
    """In systems without one row of a conversation: every row has as many marks as with words in their place."""
    codec, [sample] = SYSTEMS[name].make().codec, SYSTEMS[name].pool(tmp_path, 1)
    tokenizers = [codec.tokenizer, *([codec.reader] if getattr(codec, "reader", None) else [])]

    def marks(text: str) -> list[int]:
        said = [replace(m, content=(*m.content, TextPart(f" {text}"))) for m in sample.messages]
        item = codec.encode(replace(sample, messages=tuple(said)))
        rows = [*item.text, *(sequence for row in item.rows.values() for sequence in row)]
        return [sum(int((row.ids == mark).sum()) for mark in special) for row in rows]

    for tokenizer in tokenizers:
        added = tokenizer._opened.backend.get_added_tokens_decoder()
        special = [index for index, token in added.items() if token.special]
        spelled = [token.content for token in added.values() if token.special][:12]
        # a placeholder of image slots is 0, which is a mark of some tokenizers: of both texts alike
        assert marks(" ".join(spelled)) == marks(" ".join(["word"] * len(spelled)))


@pytest.mark.parametrize("template", ["plain", "document"])
def test_captions_and_documents_spell_no_control_token(template: str) -> None:
    codec = llava_1_5(template=template).codec
    text = "a <s>struck</s> word <unk>"
    if template == "document":
        messages = [{"role": "document", "content": text}]
    else:
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]
    ids = codec.encode(parse_sample({"messages": messages})).text[0].ids.tolist()
    assert [token for token in ids if token < 3] == ([1, 2] if template == "document" else [1])
    assert codec.tokenizer.decode(ids).strip() == text


def test_spans_of_spelled_tokens_are_those_of_the_text() -> None:
    """A template's marks between pieces of data: ids of the tokens, and for each the characters it stands for."""
    for legacy in (True, False):
        tokenizer = LlamaTokenizer(TOKENIZER.path, legacy=legacy)
        text = "a</s>b</s> c<s> d</s>"
        ids, spans = tokenizer.encode(text, literal=[(0, 6), (11, 16)])
        marks = [text[start:end] for token, (start, end) in zip(ids, spans, strict=True) if token in (1, 2)]
        assert marks == ["</s>", "</s>"]
        assert [span for token, span in zip(ids, spans, strict=True) if token == 2] == [(6, 10), (17, 21)]
        plain = text.replace("</s>b", "<|s>b").replace("<s>", "<|>")
        assert tokenizer.encode(plain, literal=[(0, 6)])[0] == tokenizer.encode(plain)[0]


# One record that is bad in any way


NASTY: list[Any] = [
    *(None, True, -1, 1e308, float("inf"), float("nan"), 10**400, 0.5, "", " ", [], {}, [[]], [None], {"a": 1}),
    *(
        "a\0b.png",
        "\ud800",
        "../x.png",
        "/etc/passwd",
        "A" * 9000,
        "iVBORw0KGgo" + "A" * 5000,
        "data:image/png;base64,A",
    ),
    *(["x"] * 3000, [[["x"] * 50]] * 50, {"k" * 3000: "v" * 3000}, "<image>" * 50, "<img>" + "y" * 300 + "</img>"),
]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def refusal(source: Any, index: int) -> str | None:
    """What is said of a sample that cannot be read with its images."""
    try:
        sample = source[index]
        for image in sample.images:
            image.read(sample)
    except SampleError as error:
        return str(error)
    return None


@pytest.mark.parametrize("form", FORMS)
def test_a_bad_record_is_one_bad_record(tmp_path: Path, form: str) -> None:
    """Whatever stands at whatever place: it is read, or refused in a short line; the record behind it is read."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    readers = [name for name in READER_OF[form] if name not in ("CocoCaptions", "KarpathyCaptions", "DocVQA")]
    records = []
    for path in places(FORMS[form]):
        for nasty in NASTY:
            record: Any = copy.deepcopy(FORMS[form]) if path else nasty
            if path:
                inner = record
                for key in path[:-1]:
                    inner = inner[key]
                inner[path[-1]] = nasty
            records.append(record)
    for reader in readers:
        source = read(tmp_path, reader, FORMS[form], *records, FORMS[form])
        total = len(source)
        refused = 0
        for index in range(total):
            if (said := refusal(source, index)) is not None:
                refused += 1
                assert len(said) < 1200
                assert "\n" not in said
        assert refused > total / 3
        last = source[total - 1]
        assert all(image.size(last) == (8, 8) for image in last.images)


def test_records_that_cannot_be_decoded_are_passed(tmp_path: Path) -> None:
    good = json.dumps(FORMS["llava"])
    deep = '{"id": ' + "[" * 50_000 + r'"]]\""' + "]" * 50_000 + "}"
    long = good.replace('"7"', "9" * 5000)
    for text in (f"[{good}, {deep}, [1], {long}, 7, {good}]", "\n".join([good, deep, "[1]", long, "7", good])):
        (tmp_path / "x.json").write_text(text)
        source = LlavaJson(tmp_path / "x.json")
        assert source.image_mask().tolist() == [True, False, False, True, False, True]
        assert source[0].id == source[5].id == "7"
        assert source[3].id == "inf"
        for index, message in {1: "is nested too deeply", 2: "is a list", 4: "is a int"}.items():
            with pytest.raises(SampleError, match=f"record {index} {message}; every record must be a JSON object"):
                source[index]


def test_links_of_ones_own_are_followed(tmp_path: Path) -> None:
    """A hub's cache has links to blobs without an ending; images lie on other disks."""
    blobs, snapshot, disk = (tmp_path / name for name in ("hub/blobs", "hub/snapshots/1f", "disk"))
    for folder in (blobs, snapshot, disk / "deep"):
        folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(blobs / "9e107d", "PNG")
    Image.new("RGB", (6, 6)).save(disk / "deep/b.png")
    (disk / "deep/b.txt").write_text("A boat.")
    (snapshot / "a.png").symlink_to("../../blobs/9e107d")
    (snapshot / "more").symlink_to(disk, target_is_directory=True)
    (disk / "deep/round").symlink_to(disk, target_is_directory=True)
    (snapshot / "data.json").symlink_to(tmp_path / "hub/blobs/77")
    (tmp_path / "mine").symlink_to(snapshot, target_is_directory=True)
    for root, entries in (
        (snapshot, ["a.png", "more/deep/b.png", f"{snapshot}/a.png", "more/../a.png"]),
        (tmp_path / "mine", ["a.png", f"{snapshot}/a.png", f"{tmp_path}/mine/more/deep/b.png"]),
    ):
        (blobs / "77").write_text(json.dumps([FORMS["llava"] | {"image": entry} for entry in entries]))
        source = LlavaJson(root / "data.json")
        assert [source[at].images[0].size(source[at])[0] for at in range(len(source))] == [
            6 if entry.endswith("b.png") else 8 for entry in entries
        ]
    for outside in ("../a.png", "more/../../x.png", str(disk / "deep/b.png"), "a/../../../x"):
        (blobs / "77").write_text(json.dumps([FORMS["llava"] | {"image": outside}]))
        with pytest.raises(SampleError, match="outside the image root"):
            LlavaJson(snapshot / "data.json")[0]
    (snapshot / "a.txt").write_text("Another.")
    (snapshot / "._a.png").write_bytes(b"macOS")
    folder = ImageFolder(snapshot)
    assert [folder[at].id for at in range(len(folder))] == ["a.png", "more/deep/b.png"]


def tar(path: Path, *names: str) -> Path:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(path, "w") as file:
        for name in names:
            data = picture.getvalue() if name.endswith(".png") else name.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def test_members_belong_together_wherever_they_stand(tmp_path: Path) -> None:
    names = ["1.png", "2.png", "._1.png", "3.txt", "1.txt", "._1.txt", "x/1.txt", "2.txt", "4.json", "x/1.png"]
    source = WebDataset(tar(tmp_path / "a.tar", *names))
    captions = [source[at].messages[1].content[0].text for at in range(len(source))]
    assert captions == ["1.txt", "2.txt", "x/1.txt"]
    assert all(source[at].images[0].size(source[at]) == (8, 8) for at in range(3))
    [note] = source.notes()
    assert "1 of 4 keys lack an image or KEY.txt and are left out, such as 3 (.txt)" in note
    joined = WebDataset(tar(tmp_path / "b.tar", "1.png", "1.txt", "2.png", "2.txt", "1.png", "1.txt"))
    assert (len(joined), joined.notes()) == (3, [])
