"""`vlm check-data` on data that is broken in every way, and the training that its list makes possible."""

import html.parser
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cli
from tests.commands.test_cli import World, _truncated
from vlm.batch import IGNORE
from vlm.commands.check_data.facts import hashed, script_of
from vlm.commands.check_data.statistics import histogram
from vlm.data import ReferringExpressions
from vlm.errors import SampleError
from vlm.prompts import IMAGE, Tokenized
from vlm.prompts.documents import fit_document
from vlm.sample import parse_sample

PICTURE = [{"type": "image"}]
WORDS = [{"type": "text", "text": "Once upon a time."}]


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.command, made.stage = "check-data", "2_finetune"
    made.options = ["--workers=0", f"--out={tmp_path / 'out'}"]
    return made


def chat(name: str, *content: Any, answer: str = "A ball.", images: tuple[str, ...] = ("0.png",)) -> dict[str, Any]:
    parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": "\nWhat is it?"}]
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}, *content]}
    return {"id": name, "images": list(images), "messages": [{"role": "user", "content": parts}, said]}


def box(*numbers: float, **more: Any) -> dict[str, Any]:
    return {"type": "box", "box": list(numbers), **more}


def _weighted(name: str, weight: float) -> dict[str, Any]:
    record = chat(name)
    record["messages"][1]["weight"] = weight
    return record


def _huge(folder: Path) -> str:
    Image.new("1", (20000, 20000)).save(folder / "huge.png")
    return "huge.png"


def source(path: Path, kind: str = "ChatJson") -> dict[str, Any]:
    return {"class_path": f"vlm.data.{kind}", "init_args": {"path": str(path)}}


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def quarantine(world: World) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world.folder / "out" / "quarantine.jsonl").read_text().splitlines()]


def test_everything_that_can_be_wrong(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    _truncated(world)
    (world.folder / "text.png").write_text("<script>alert(1)</script>")
    broken = {
        "fine": (chat("fine"), None),
        "keys": ({"id": "keys", "images": []}, "schema: key 'messages' is missing"),
        "role": ({"id": "role", "messages": [{"role": "robot", "content": "x"}]}, "schema: messages[0]: unknown role"),
        "marks": (chat("marks") | {"images": []}, "marks: 1 image marks in the text but 0 images"),
        "missing": (chat("missing", images=("nowhere.png",)), "image: image 'nowhere.png' does not exist"),
        "cut": (chat("cut", images=("2.png",)), "image: image '2.png' cannot be decoded"),
        "script": (chat("<b>script</b>", images=("text.png",)), "image: image 'text.png' is not a readable"),
        "huge": (chat("huge", images=(_huge(world.folder),)), "image: image 'huge.png' is too large"),
        "root": (chat("root", images=("../x.png",)), "image: image '../x.png' lies outside the image root"),
        "range": (chat("range", box(0.1, 0.1, 1.5, 0.5)), "region: messages[1].content[1]: box [0.1, 0.1, 1.5, 0.5]"),
        "inverted": (chat("inverted", box(0.5, 0.1, 0.1, 0.5)), "region: messages[1].content[1]: box"),
        "pixels": (chat("pixels", box(1, 1, 300, 20, unit="pixel")), "region: box [1, 1, 300, 20] lies outside of its"),
        "which": (chat("which", box(0, 0, 1, 1, image=4)), "region: messages[1]: a box of image 4"),
        "long": (chat("long", answer="a b " * 2000), "too long: 4062 tokens (16 of them"),
        "label": ({"id": "label", "messages": [{"role": "user", "content": "x"}]}, "no label: message 0: the user's"),
        "good box": (chat("good box", {"type": "ref", "text": "it"}, box(0.1, 0.1, 0.5, 0.9)), None),
        "nul": (chat("nul", images=("a\0.png",)), "image: image 'a\\x00.png' has a character that no path has"),
        "content": (chat("content", images=("/9j/" + "A" * 6000,)), "image: image '/9j/AAAA"),
        "film": (chat("film") | {"videos": ["a.mp4"]}, "schema: key 'videos': nothing here reads it"),
        "name": (chat("name", images=()) | {"img": "0.png"}, "schema: key 'img': did you mean 'images'?"),
        "half": (chat("half", answer="\ud800"), "encoding: text holds half a surrogate pair"),
        "switched off": (_weighted("switched off", 0), "no label: no answer is trained"),
        "halved": (_weighted("halved", 0.5), None),
        "two": (chat("two", images=("0.png", "2.png")), "image: image '2.png' cannot be decoded"),
    }
    data = write(world.folder / "chat.jsonl", [record for record, _ in broken.values()])
    world.options.append(f"--data.init_args.sources={json.dumps([source(data)])}")
    assert world.fit() == 1
    expected = {
        (record["id"], index): reason for index, (record, reason) in enumerate(broken.values()) if reason is not None
    }
    found = {(entry["id"], entry["index"]): entry for entry in quarantine(world)}
    assert found.keys() == expected.keys()
    for key, reason in expected.items():
        assert found[key]["reason"].startswith(reason.partition(": ")[2]), (key, found[key])
        assert found[key]["source"] == "chat"
    report = json.loads((world.folder / "out" / "report.json").read_text())
    kinds = [reason.partition(": ")[0] for reason in expected.values()]
    assert report["summaries"][0]["bad by kind"] == {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    assert report["bad"] == len(expected) == report["summaries"][0]["bad"]
    out = capfd.readouterr().out
    assert "bad: 8 image missing, broken or too large" in out
    assert max(map(len, out.splitlines())) < 300
    assert f"--data.init_args.quarantine={world.folder / 'out' / 'quarantine.jsonl'}" in out
    page = (world.folder / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;b&gt;script&lt;/b&gt;" in page
    assert _Page(page).external == []
    assert "data:image/jpeg;base64," in page
    # what is left trains
    world.command, world.options = "fit", world.options[2:]
    assert world.fit("--data.init_args.batch.size=2") == 2
    assert world.fit(f"--data.init_args.quarantine={world.folder / 'out' / 'quarantine.jsonl'}") == 0
    assert "quarantine: 21 samples are left out of the training" in capfd.readouterr().out


@pytest.mark.parametrize("command", ["check-data", "show-data", "fit"])
def test_a_missing_tokenizer_is_one_line_and_no_samples_fault(
    world: World, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out = f"--out={world.folder / ('page.html' if command == 'show-data' else 'out')}"
    world.command, world.options = command, {"check-data": ["--workers=0", out], "show-data": [out]}.get(command, [])
    for path, remedy in (("nobody/nothing", "`hf download nobody/nothing`"), ("./nowhere", "does not exist")):
        assert (
            world.fit(f"--model.init_args.tokenizer.init_args.path={path}", "--data.init_args.max_bad_samples=9") == 2
        )
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("vlm: error: ")]
        assert len(errors) == 1
        assert remedy in errors[0]
        assert "sample" not in errors[0]


def test_readers_say_what_kind_of_fault_it_is(tmp_path: Path) -> None:
    (tmp_path / "refs.json").write_text(json.dumps([{"image": "0.png", "sentences": ["it"], "bbox": [4, 4, 0, 9]}]))
    with pytest.raises(SampleError, match="has no area") as flat:
        ReferringExpressions(tmp_path / "refs.json")[0]
    words = Tokenized([5] * 40, [5] * 40)
    marked = Tokenized([IMAGE, *words.ids], [IGNORE, *words.labels])
    document = parse_sample({"images": ["0.png"], "messages": [{"role": "document", "content": [*PICTURE, *WORDS]}]})
    with pytest.raises(SampleError, match="over the limit of 16") as long:
        fit_document(document, marked, [20], max_tokens=16)
    assert [error.value.kind for error in (flat, long)] == ["region", "too long"]
    assert pickle.loads(pickle.dumps(flat.value)).kind == "region", "lost between a worker and the trainer"


class _Page(html.parser.HTMLParser):
    """What a page wants from elsewhere, and whether its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.external: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.external += [
            str(value) for name, value in attrs if name in ("src", "href") and not str(value).startswith("data:")
        ]
        if tag not in ("img", "meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_sound_data(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    for i in range(6):  # different content
        Image.effect_noise((30 + i, 40), 50).convert("RGB").save(world.folder / f"{i}.png")
    turns = [{"from": "human", "value": "天空是什么颜色？"}, {"from": "gpt", "value": "蓝色。"}]
    world.records.append({"id": "text", "conversations": turns})
    assert world.fit() == 0
    assert quarantine(world) == []
    out = capfd.readouterr().out
    assert "nothing is wrong with any of them" in out
    assert "note:" not in out
    (summary,) = json.loads((world.folder / "out" / "report.json").read_text())["summaries"][1:]
    assert (summary["samples"], summary["pictures"]["different"]) == (7, 6)
    assert summary["images per sample"] == {"0": 1, "1": 6}
    assert summary["text only"] == pytest.approx(1 / 7)
    assert summary["scripts"] == {"latin": pytest.approx(6 / 7), "han": pytest.approx(1 / 7), "other": 0, "none": 0}
    assert summary["visual tokens"]["max"] == 16
    assert (summary["pictures"]["width"]["min"], summary["pictures"]["width"]["max"]) == (30, 35)
    assert sum(count for _, _, count in summary["histogram"]) == 7


def test_workers_find_the_same(world: World) -> None:
    (world.folder / "3.png").unlink()
    world.records = world.records * 30  # more than one chunk
    assert world.fit() == 1
    alone, lines = (world.folder / "out" / "report.json").read_text(), quarantine(world)
    assert len(lines) == 30
    assert world.fit("--workers=2") == 1
    assert (world.folder / "out" / "report.json").read_text() == alone
    assert quarantine(world) == lines


def test_a_picture_is_decoded_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.sample import ImageFile

    read, decoded = ImageFile.read, []
    world.records = world.records * 20
    monkeypatch.setattr("vlm.commands.check_data.command.write_report", lambda *_: None)
    monkeypatch.setattr(ImageFile, "read", lambda self, sample: decoded.append(self.name) or read(self, sample))
    assert world.fit() == 0
    assert sorted(decoded) == [f"{i}.png" for i in range(6)]
    decoded.clear()
    assert world.fit("--headers-only") == 0
    assert decoded == []


def test_pictures_inside_of_a_shard_are_told_apart(world: World) -> None:
    """They share a path, and ids come again in another shard."""
    shard = world.folder / "shard.tar"
    (world.folder / "4.png").write_bytes(b"no picture")
    with tarfile.open(shard, "w") as tar:
        for i in range(6):
            for name, data in ((f"{i}.png", (world.folder / f"{i}.png").read_bytes()), (f"{i}.txt", b"a shade of red")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    shards = {"class_path": "vlm.data.WebDataset", "init_args": {"path": str(shard)}}
    assert world.fit(f"--data.init_args.sources={json.dumps([shards])}") == 1
    assert [entry["index"] for entry in quarantine(world)] == [4]
    report = json.loads((world.folder / "out" / "report.json").read_text())
    assert report["summaries"][0]["pictures"]["different"] == 5


def test_copies_are_noted_and_refused_on_request(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    for i in range(6):
        Image.effect_noise((30 + i, 40), 50).convert("RGB").save(world.folder / f"{i}.png")
    (world.folder / "copy.png").write_bytes((world.folder / "1.png").read_bytes())
    world.records.append(world.records[1] | {"image": "copy.png", "id": "other name"})
    world.records.append(world.records[0] | {"image": "5.png"})
    held_out = write(world.folder / "held.jsonl", [world.records[2] | {"id": "held out"}])
    world.options.append(f"--data.init_args.val_sources={json.dumps([source(held_out, 'LlavaJson')])}")
    assert world.fit() == 0
    out = capfd.readouterr().out
    assert "note: 1 sample with the id of an earlier sample ('s0')" in out
    assert "note: 1 sample with the text and pictures of an earlier sample ('other name')" in out
    assert "note: 1 sample of the validation that the training has, too ('held out')" in out
    assert world.fit("--duplicates") == 1
    assert [(entry["id"], entry["reason"]) for entry in quarantine(world)] == [
        ("other name", "a copy of sample 's1' (number 1 of data)"),
        ("held out", "a copy of sample 's2' (number 2 of data)"),
    ]


def test_the_list_in_use_is_not_trusted(world: World) -> None:
    """A list that is made anew must hold what the old one held."""
    (world.folder / "3.png").unlink()
    assert world.fit() == 1
    first = quarantine(world)
    assert world.fit(f"--data.init_args.quarantine={world.folder / 'out' / 'quarantine.jsonl'}") == 1
    assert quarantine(world) == first


def test_limit_epochs_and_validation(world: World) -> None:
    """Validation may end with a question; captions of later epochs are looked at on request."""
    world.stage = "1_align"
    asked = world.records[0] | {"id": "asked", "conversations": world.records[0]["conversations"][:1]}
    val = write(world.folder / "val.jsonl", [asked])
    world.options.append(f"--data.init_args.val_sources={json.dumps([source(val, 'LlavaJson')])}")
    world.records[0]["answers"] = ["a short one", "b c d " * 800]
    first, many = world.fit("--epochs=1"), world.fit("--epochs=20")
    assert many == 1
    assert [entry["id"] for entry in quarantine(world)] == ["s0"]
    assert first in (0, 1)  # as chance has it
    world.fit("--limit=2")
    report = json.loads((world.folder / "out" / "report.json").read_text())
    assert [(s["part"], s["samples"]) for s in report["summaries"]] == [("all", 3), ("training", 2), ("validation", 1)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--limit=0"], ["--limit must be at least 1"]),
        (["--workers=x"], ["--workers", "check-data --help"]),
        (["--demo"], ["--demo and --stage go with --recipe"]),
        (["--recipe=nowhere"], ["nowhere", "no such system"]),
        (["--recipe=llava_1_5"], ["say which stage", "1_align, 2_finetune"]),
        (["--recipe=llava_1_5", "--stage=9"], ["--stage 9", "1_align"]),
        (["--data.init_args.sources=[]"], ["data.sources is empty"]),
        (["--bogus=1"], ["bogus"]),
    ],
)
def test_what_a_person_does_wrong(
    world: World, options: list[str], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert world.fit(*options) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("vlm: error: ")]
    for word in words:
        assert word in line


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["check-data", "--help"])
    assert ended.value.code == 0
    assert "1 if some are bad" in " ".join(capsys.readouterr().out.split())


def test_small_things() -> None:
    assert [script_of(text) for text in ("a cat", "一只猫 ok", "кот", "123 !", "")] == [0, 1, 2, 3, 3]
    assert hashed("ab", "c") != hashed("a", "bc")
    bars = histogram(np.array([3, 4, 40, 119]))
    assert sum(count for _, _, count in bars) == 4
    assert bars[0] == (0, 9, 2)
    assert bars[-1] == (110, 119, 1)
