"""`vlm run instruct`: wrong records and options end in one line."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.instruct import ROOT, command_line, records, write
from vlm.errors import UserError
from vlm.procedures import main


# -- wrong input


WRONG_RECORDS = [
    (
        [{"id": "a", "image": "a.png"}],
        "conversation",
        r"sample 'a': conversation needs 'captions', a list of texts; found",
    ),
    ([{"id": "a", "captions": ["x"]}], "conversation", "conversation needs 'image', a path"),
    ([{"id": "a", "image": "a.png", "captions": "x"}], "detail", "'captions' must be a list of texts, found 'x'"),
    (
        [{"image": "no.png", "question": "?"}],
        "image-answer",
        "sample '0': image 'no.png' does not exist .*--image_root",
    ),
    ([{"image": "../no.png", "question": "?"}], "image-answer", "lies outside the image root"),
    ([{"image": "a.png"}], "image-answer", "image-answer needs 'question'"),
    ([{"image": "a.png", "question": "<image> x"}], "image-answer", "'question' holds <image>; leave it out"),
    ([{"conversations": [{"from": "gpt", "value": "x"}]}], "in-context", "human and gpt must take turns"),
    ([{"conversations": [{"from": "robot", "value": "x"}]}], "in-context", r"conversations\[0\] must be"),
    (records(1) * 2, "conversation", "sample 'r0': this id stands twice"),
    ([], "conversation", "holds no samples"),
    (
        [{"conversations": [{"from": "human", "value": "\ud83d"}, {"from": "gpt", "value": "x"}]}],
        "in-context",
        "sample '0': holds half a surrogate pair",
    ),
    (
        [{"image": "a.png", "captions": ["x"], "boxes": [{"name": "dog", "box": [10, 20, 30, 40]}]}],
        "detail",
        r"boxes\[0\]: box \[10, 20, 30, 40\] leaves 0..1; divide pixels by",
    ),
    (
        [{"image": "a.png", "captions": ["x"], "boxes": [{"name": "dog", "box": [0.5, 0.2, 0.3, 0.4]}]}],
        "detail",
        "has no area; it must be left, top, right, bottom",
    ),
    ([{"image": "a.png", "captions": ["x"], "boxes": [[0, 0, 1, 1]]}], "detail", r"boxes\[0\] must be {'name'"),
    (
        [{"image": "a.png", "captions": ["x"], "boxes": [{"name": "dog", "box": [0, "a", 1, 1]}]}],
        "detail",
        "'box' must hold four numbers",
    ),
]


@pytest.mark.parametrize(("source", "kind", "message"), WRONG_RECORDS)
def test_wrong_records_end_in_one_line(source: Any, kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        main(command_line(tmp_path, "http://127.0.0.1:9/v1", source=source, kind=kind))
    assert "\n" not in str(error.value)
    assert "in.json" in str(error.value)
    assert not list(tmp_path.glob("out*"))


WRONG_OPTIONS = [
    (["--endpoint", "localhost:80"], "--endpoint localhost:80: no address; write http://HOST:PORT/v1"),
    (["--endpoint", "https://me:secret@host/v1"], "keep name and password out of the address"),
    (["--key_env", "NOT_SET_ANYWHERE"], "--key_env NOT_SET_ANYWHERE: this environment variable is not set"),
    (["--request", "top_k"], "--request top_k: write FIELD=JSON"),
    (["--request", 'model="x"'], "model, messages and stream are not to be set"),
    (["--parallel", "0"], "--parallel 0: must be at least 1"),
    (["--requests_per_minute", "0"], "--requests_per_minute 0: must be above 0"),
    (["--local", "x"], "give --endpoint or --local, not both"),
    (["--weights", "x"], "--weights: conversation is written from text"),
    (["--instances", "x"], "--instances goes with --captions"),
    (["--captions", "x"], "give --records FILE, or COCO's"),
    (["--top_p", "2"], "--top_p 2: must be above 0 and at most 1"),
    (["--styles", "none.txt"], "--styles none.txt: cannot be read"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
def test_wrong_options_end_in_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        main(command_line(tmp_path, "http://127.0.0.1:9/v1", *options))
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_wrong_combinations_end_in_one_line(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", [{"id": "0", "image": "in.json"}])
    base = ["instruct", "--records", str(source), "--out", str(tmp_path / "o.json"), "--kind"]
    for options, message in (
        (["detail"], "detail needs a model: give --endpoint URL --model NAME or --local FOLDER"),
        (["image-detail"], "image-detail needs a model: give --endpoint URL --model NAME or --weights ARTEFACT"),
        (["image-detail", "--local", "x"], "--local sees no pictures, which image-detail shows"),
        (["curate", "--weights", "x"], "curate needs a model"),
        (["curate", "--local", "x"], "give --endpoint, or add --weights"),
        (["image-detail", "--endpoint", "http://x"], "--endpoint and --model go together"),
        (["image-detail", "--weights", "x", "--key_env", "HOME"], "--key_env goes with --endpoint"),
    ):
        with pytest.raises(UserError, match=message):
            main([*base, *options])
    (tmp_path / "chat").mkdir()
    write(tmp_path / "in.json", records(1))
    with pytest.raises(UserError, match="chat: no folder of a transformers model"):
        main([*base, "detail", "--local", str(tmp_path / "chat")])
    shutil.copytree(ROOT / "vlm/demo/assets/llama", tmp_path / "llama")
    with pytest.raises(UserError, match="its tokenizer has no chat template"):
        main([*base, "detail", "--local", str(tmp_path / "llama")])
