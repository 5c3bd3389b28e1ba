"""`vlm show-data`: the page shows the tokens, labels, pictures and boxes of a training, and nothing else."""

import base64
import html
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cli
from tests.support.systems import llava_1_5
from tests.commands.test_check_data import _Page, box, chat, source, write
from tests.commands.test_cli import World
from vlm.commands.check_data.parts import Part, parts_of
from vlm.data import BatchSpec, ChatJson, InstructionData
from vlm.drawing.html import figure
from vlm.drawing.panels import Piece, pieces_of
from vlm.commands.show_data import look_at, tokens_as_html
from vlm.vision.preprocess import RandomCropFlip


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.command, made.stage = "show-data", "2_finetune"
    made.options = [f"--out={tmp_path / 'page.html'}"]
    return made


def page(world: World) -> str:
    text = (world.folder / "page.html").read_text(encoding="utf-8")
    assert _Page(text).external == []
    return text


def spans(text: str, style: str) -> list[str]:
    body = text[text.index("<div class='card'>") :]
    return [html.unescape(found) for found in re.findall(rf'<span class="{style}"[^>]*>([^<]*)</span>', body)]


def test_tokens_labels_and_counts(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    world.records[1]["conversations"][1]["value"] = "<b>bold</b> & so on"
    assert world.fit("--index=1") == 0
    assert f"{world.folder / 'page.html'}: 1 samples" in capfd.readouterr().out
    text = page(world)
    assert "".join(spans(text, "trained")) == " <b>bold</b> & so on</s>"
    assert "".join(spans(text, "")).endswith("What is it? ASSISTANT:")
    assert spans(text, "mark") == ["16 image tokens"]
    ids = re.findall(r'class="trained" title="([\d ]+)"', text[text.index("<div class='card'>") :])
    assert ids[-1] == "2"
    assert f'<span class="chip ">{len(ids)} trained</span>' in text
    assert "<b>s1</b>" in text
    assert "data 1" in text
    assert "1.png (31 x 40), 28 x 28" in text


def test_captions_of_several_epochs(world: World) -> None:
    world.stage = "1_align"
    world.records = [world.records[0] | {"answers": ["one", "two", "three"]}]
    assert world.fit("--epoch", "0", "1", "2", "3", "4", "5") == 0
    text = page(world)
    assert text.count("<h3>epoch ") == 6
    trained = ["".join(spans(f"<div class='card'>{part}", "trained")) for part in text.split("<h3>epoch ")[1:]]
    assert {caption.strip("\u21b5 ") for caption in trained} == {"one", "two", "three"}


def test_samples_are_chosen(world: World) -> None:
    held_out = write(world.folder / "held.jsonl", [world.records[2] | {"id": "held out"}])
    world.options.append(f"--data.init_args.val_sources={json.dumps([source(held_out, 'LlavaJson')])}")
    for option, expected in {
        "--num=3": ["s0", "s2", "s4"],
        "--num=50": [f"s{i}" for i in range(6)],
        "--id=s5": ["s5"],
        "--validation": ["held out"],
    }.items():
        assert world.fit(option) == 0
        assert re.findall(r"<div class='head'><b>([^<]*)</b>", page(world)) == expected


def test_a_bad_sample_says_why(world: World) -> None:
    (world.folder / "0.png").unlink()
    world.records[1]["conversations"][0]["value"] = "no mark"
    assert world.fit() == 0
    reasons = [html.unescape(found) for found in re.findall(r"<p class='reason'>([^<]*)</p>", page(world))]
    assert [reason.split(";")[0][:27] for reason in reasons] == [
        "image '0.png' does not exis",
        "0 image marks in the text b",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--index=6"], ["--index 6", "6 samples"]),
        (["--id=nobody"], ["--id nobody"]),
        (["--validation"], ["data.val_sources is empty"]),
        (["--num=0"], ["--num"]),
        (["--epoch=-1"], ["--epoch"]),
        (["--num=x"], ["show-data --help"]),
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
        cli.main(["show-data", "--help"])
    assert ended.value.code == 0
    assert "token by token" in " ".join(capsys.readouterr().out.split())


def _part(folder: Path, records: list, **model: object) -> Part:
    data = InstructionData([ChatJson(write(folder / "x.jsonl", records))], batch=BatchSpec(1))
    (part,) = parts_of(data, llava_1_5(**model).codec)
    return part


@pytest.mark.parametrize("unit", ["share", "pixel"])
def test_boxes_lie_where_the_picture_went(tmp_path: Path, unit: str) -> None:
    """A red field on blue, its box around it: cut and mirrored together, in every epoch."""
    pixels = np.full((120, 160, 3), (0, 0, 255), dtype=np.uint8)
    pixels[40:80, 60:120] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    numbers = (60, 40, 120, 80) if unit == "pixel" else (60 / 160, 40 / 120, 120 / 160, 80 / 120)
    record = chat("x", {"type": "ref", "text": "the red field"}, box(*numbers, unit=unit))
    part = _part(tmp_path, [record], augment=RandomCropFlip(size=112, scale=(0.7, 1.0)))
    seen = set()
    for epoch in range(6):
        look = look_at(part, 0, epoch=epoch)
        (picture,) = look.pictures
        ((label, (x0, y0, x1, y1)),) = picture.boxes
        seen.add((x0, y0))
        assert label == "the red field"
        field = np.asarray(picture.image.convert("RGB"))
        red = (field[..., 0] > 128) & (field[..., 2] < 128)
        rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
        found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 28
        assert found == pytest.approx([x0, y0, x1, y1], abs=1.5 / 28)
    assert len(seen) > 1


def test_boxes_of_a_text_and_of_the_second_picture(tmp_path: Path) -> None:
    for name in "01":
        Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
    written = chat("text", answer="It is at [0.25, 0.25, 0.50, 1.00].")
    point = {"type": "point", "point": [0.5, 0.5]}
    second = chat("second", box(0.5, 0.0, 1.0, 0.5, image=1), point, images=("0.png", "1.png"))
    part = _part(tmp_path, [written, second])
    (picture,) = look_at(part, 0, epoch=0).pictures
    assert picture.boxes == [("", (0.25, 0.25, 0.5, 1.0))]
    first, other = look_at(part, 1, epoch=0).pictures
    assert other.boxes == [("", (0.5, 0.0, 1.0, 0.5))]
    assert first.boxes[0][1] == pytest.approx((0.488, 0.488, 0.512, 0.512))


def test_all_tokens_are_shown(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    part = _part(tmp_path, [chat("x", answer="word " * 700)], max_tokens=1000)
    look = look_at(part, 0, epoch=0)
    ((_, pieces),) = look.rows
    (sequence,) = look.item.text
    slots = set(sequence.slots["image"].tolist())
    ids = [token for piece in pieces for token in piece.ids]
    assert ids == [token for at, token in enumerate(sequence.ids.tolist()) if at not in slots]
    assert len(ids) > 700
    tokenizer = part.encoder.codec.tokenizer  # type: ignore[attr-defined]
    assert len(pieces_of(sequence, tokenizer.decode)) < 700  # a panel of TensorBoard is cut


def test_signs_for_what_cannot_be_seen() -> None:
    shown = tokens_as_html([Piece("a\n\n", ids=(5, 6)), Piece("\t<"), Piece(""), Piece("\x04")])
    assert shown == (
        '<div class=\'tokens\'><span class="" title="5 6">a\u21b5\u21b5</span>\n\n'
        '<span class="">\u21e5&lt;</span><span class="">\u2205</span>'
        '<span class="">&lt;0x04&gt;</span></div>'
    )


def test_a_figure_is_a_picture_with_its_boxes() -> None:
    made = figure(Image.new("RGB", (50, 100), "white"), 'a "name"', side=200, boxes=[("", (0.2, 0.2, 0.8, 0.8))])
    assert 'alt="a &quot;name&quot;"' in made
    data = base64.b64decode(re.search(r"base64,([^\"]+)", made)[1])  # type: ignore[index]
    image = Image.open(io.BytesIO(data))
    assert image.size == (100, 200)
    assert np.asarray(image)[100, 21].tolist() != [255, 255, 255]
    assert np.asarray(image)[100, 50].min() > 240
