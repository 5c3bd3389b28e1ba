"""Files of samples: what is read, what is refused and how, and that memory does not grow with the file."""

import json
import pickle
import subprocess
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlm.data.sources.json_records as records
from vlm.data import ChatJson, LlavaJson
from vlm.data.sources.base import Concat
from vlm.errors import SampleError, UserError
from vlm.sample import ImagePart, TextPart

LLAVA = {
    "id": "7",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\n What? "}, {"from": "gpt", "value": " A boat.\n"}],
}
TEXT_ONLY = {"id": 8, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
CHAT = {
    "id": "9",
    "images": ["a.png"],
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A boat."},
    ],
    "answers": [{"text": "boat", "weight": 0.5}],
}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def llava(**changes):
    return {key: value for key, value in (LLAVA | changes).items() if value is not None}


def test_llava_records_keep_their_text_and_place_their_images(tmp_path):
    many = llava(
        id="7",  # a repeated id is no error
        image=["a.png", "sub/b.png"],
        conversations=[
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "one<image><image> two"},
            {"from": "gpt", "value": "x"},
        ],
        answers=["x"],
    )
    source = LlavaJson(write(tmp_path / "train.json", [LLAVA, TEXT_ONLY, many]))
    assert (source.name, len(source)) == ("train", 3)
    assert [source.has_image(i) for i in range(3)] == [True, False, True] == source.image_mask().tolist()
    first, second, third = (source[i] for i in range(3))
    assert first.messages[0].content == (ImagePart(), TextPart("\n What? "))
    assert first.messages[1].content == (TextPart(" A boat.\n"),)
    assert first.images[0].path == tmp_path / "a.png"
    assert (second.id, second.images, second.source) == ("8", (), str(tmp_path / "train.json"))
    assert [m.role for m in third.messages] == ["system", "user", "assistant"]
    assert third.messages[1].content == (TextPart("one"), ImagePart(), ImagePart(), TextPart(" two"))
    assert third.answers == (("x", 1.0),)
    with pytest.raises(IndexError):
        source[3]


def test_chat_records_are_read_as_they_are(tmp_path):
    source = ChatJson(write(tmp_path / "chat.jsonl", json.dumps(CHAT).encode() + b"\n\n" + json.dumps(CHAT).encode()))
    assert len(source) == 2
    assert source.has_image(1)
    assert source[1].answers == (("boat", 0.5),)
    assert source[1].messages[1].content == (TextPart("A boat."),)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    found=st.lists(st.dictionaries(st.text(max_size=6), json_values, max_size=4), min_size=1, max_size=8),
    form=st.sampled_from(["list", "indented", "lines"]),
    ascii_only=st.booleans(),
    bom=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_every_record_is_found_wherever_the_file_is_cut(tmp_path, monkeypatch, found, form, ascii_only, bom, chunk):
    """Chunks of a few bytes cut numbers, escapes and multi-byte characters at every place."""
    monkeypatch.setattr(records, "CHUNK", chunk)
    if form == "lines":
        text = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in found)
    else:
        text = json.dumps(found, ensure_ascii=ascii_only, indent=1 if form == "indented" else None)
    path = write(tmp_path / "x.json", b"\xef\xbb\xbf" * bom + text.encode("utf-8", "surrogatepass"))
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate is no UTF-8
        with pytest.raises(UserError, match="not UTF-8"):
            records.RecordFile(path, flag=bool)
        return
    file = records.RecordFile(path, flag=bool)
    assert [file[i] for i in range(len(file))] == found
    assert file.flags.tolist() == [bool(record) for record in found]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"train\.json: cannot be read \(No such file"),
        (b"", "holds no samples"),
        (b" [ ] ", "holds no samples"),
        (b"42", "top level must be a list"),
        (b'[{"id": 1},\n  {"id": 2,]', r"broken JSON: .*line 2 column 12"),
        (b'[{"id": 1}\n{"id": 2}]', r"expected ',' or '\]' after a record, at line 2 column 1"),
        (b'[{"id": 1},', "the list is never closed, at line 1 column 12"),
        (b'[{"id": "1', "broken JSON: Unterminated string"),
        (b'[{"id": 1}] x', "unexpected text after the end of the list, at line 1 column 13"),
        (b"[[2], 12]", "record 0 is a list; none of the 2 is a JSON object"),
        (b'{"id": 1}\nnonsense', "broken JSON: Expecting value, at line 2 column 1"),
        (b'[{"id": "\xff"}]', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "train.json"
    if content is not None:
        write(path, content)
    with pytest.raises(UserError, match=message) as caught:
        len(LlavaJson(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        len(LlavaJson(tmp_path))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (llava(conversations=None), r"'conversations' is missing; found keys \['id', 'image'\]"),
        (llava(conversations=[]), "at least one"),
        (llava(conversations="x"), "must be a list"),
        (llava(conversations=[{"from": "human"}]), r"conversations\[0\] must be an object with 'from' and 'value'"),
        (
            llava(conversations=[{"from": "user", "value": "x"}]),
            "unknown role 'from': 'user'; use one of system, human",
        ),
        (llava(conversations=[{"from": ["gpt"], "value": "x"}]), "unknown role"),
        (llava(conversations=[{"from": "human", "value": 3}]), "'value' must be a string or a list of parts, found 3"),
        (llava(image=None), "1 image marks in the text but 0 images"),
        (llava(image=["a.png", "b.png"]), "1 image marks in the text but 2 images"),
        (llava(images=["a.png"]), "both 'image' and 'images'"),
        (llava(image=7), "'image' must be a path or a list of paths, found 7"),
        (llava(image=[7]), "an image must be a path, found 7"),
        (llava(image="../a.png"), "outside the image root"),
        (llava(image="/etc/passwd"), "outside the image root .*; set image_root"),
        (llava(conversations=[*LLAVA["conversations"][:1], {"from": "gpt", "value": " \n"}]), "answer is empty"),
    ],
)
def test_a_bad_record_is_refused_by_file_and_id(tmp_path, record, message):
    path = write(tmp_path / "train.json", [TEXT_ONLY, record])
    source = LlavaJson(path)
    assert source[0].id == "8"
    with pytest.raises(SampleError, match=message) as caught:
        source[1]
    assert str(caught.value).startswith(f"{path}: sample '7': ")
    assert "\n" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # as a worker sends it
    assert (str(again), again.sample_id) == (str(caught.value), "7")


def test_a_record_without_id_is_named_by_its_place(tmp_path):
    source = LlavaJson(write(tmp_path / "x.json", [TEXT_ONLY, {"image": "a.png"}]))
    with pytest.raises(SampleError, match="sample '1': key 'conversations' is missing"):
        source[1]


def test_a_file_that_changes_while_in_use_is_noticed(tmp_path):
    path = write(tmp_path / "x.json", [TEXT_ONLY, LLAVA])
    source = LlavaJson(path)
    assert len(source) == 2
    write(path, [LLAVA, TEXT_ONLY])
    with pytest.raises(UserError, match="changed or vanished while in use"):
        source[1]


def test_concatenated_sources_count_through(tmp_path):
    a = LlavaJson(write(tmp_path / "a.json", [LLAVA, TEXT_ONLY]))
    b = ChatJson(write(tmp_path / "b.json", [CHAT]))
    both = Concat([a, b])
    assert [both[i].id for i in range(len(both))] == ["7", "8", "9"]
    assert both.image_mask().tolist() == [both.has_image(i) for i in range(3)] == [True, False, True]
    with pytest.raises(UserError, match=r"data\.sources is empty"):
        Concat([])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_over_a_long_file(tmp_path):
    """200,000 records, 100 MB: the scan may add no more than their offsets and the window that slides over the file."""
    path = tmp_path / "long.json"
    turns = [{"from": "human", "value": "<image>\n" + "word " * 60}, {"from": "gpt", "value": "x"}]
    body = json.dumps({"image": "a.png", "conversations": turns})[1:]
    with open(path, "w") as file:
        file.write("[")
        file.writelines(f'{"," if i else ""}\n{{"id": {i}, {body}' for i in range(200_000))
        file.write("]")
    code = """
        import pathlib, pickle, re, sys
        from vlm.data.sources.base import LlavaJson
        # not getrusage: its maximum is inherited from the process that starts this one
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024
        source = LlavaJson(sys.argv[1])
        before = peak()
        assert len(source) == 200_000 and source[199_999].id == "199999"
        print(peak() - before, len(pickle.dumps(source)) / 2**20)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], capture_output=True, text=True, check=True
    )
    grown, pickled = map(float, done.stdout.split())
    assert path.stat().st_size > 80e6
    path.unlink()
    assert grown < 16, f"the scan took {grown:.0f} MiB"
    assert pickled < 4, f"a pickled source takes {pickled:.1f} MiB"  # 17 bytes a record
