"""What a person does on the first day with their own files: read as it is meant, or refused in one line."""

import json
import tomllib
from pathlib import Path
from typing import Any

import vlm  # noqa: F401
import numpy as np
import pytest
import torch
from PIL import Image

import cli
from tests.commands.test_cli import World
from tests.checkpoints.test_export import finished
from tests.support.systems import LLAMA
from vlm.errors import SampleError
from vlm.sample import ImageFile, Sample


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def refusal(world: World, capfd: pytest.CaptureFixture[str], *options: str) -> str:
    capfd.readouterr()
    assert world.fit(*options) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("vlm: error: ")]
    assert len(lines) == 1
    return lines[0]


# -- own JSON


def _all(world: World, change: Any) -> None:
    for record in world.records:
        change(record)


def _as(write: Any) -> Any:
    return lambda w: setattr(w, "text", write(w.records))


OWN_JSON: dict[str, tuple[Any, list[str]]] = {
    "other tool's keys": (
        lambda w: _all(w, lambda r: r.update(messages=r.pop("conversations"))),
        ["'conversations' is missing", "vlm.data.MessagesJson"],
    ),
    "own keys": (
        lambda w: setattr(w, "records", [{"picture": "1.png", "question": "x", "answer": "y"}]),
        ["sample '0'", "found keys ['answer', 'picture', 'question']", "needs 'conversations'"],
    ),
    "role and content": (
        lambda w: w.records[2].update(conversations=[{"role": "user", "content": "x"}]),
        ["'s2'", "conversations[0]", "vlm.data.MessagesJson reads"],
    ),
    "a list inside an object": (_as(lambda r: json.dumps({"data": r})), ["the list that is under 'data'"]),
    "an object by id": (_as(lambda r: json.dumps({x["id"]: x for x in r})), ["'s0'", "a list of its values"]),
    "a list of lists": (_as(lambda r: json.dumps([r])), ["record 0 is a list", "JSON object"]),
    "not JSON": (_as(lambda r: "id,image\n1,2"), ["a list of records", "line 1"]),
    "Python's own writing": (_as(repr), ["broken JSON", "double quotes", "line 1 column 3"]),
    "cut off": (_as(lambda r: json.dumps(r)[:-30]), ["broken JSON", "line 1 column"]),
    "an empty file": (_as(lambda r: ""), ["holds no samples", "fill it"]),
    "Windows paths": (lambda w: w.records[2].update(image="sub\\2.png"), ["'s2'", "sub\\\\2.png", "write / for \\"]),
    "an address": (lambda w: w.records[2].update(image="https://a.b/2.png"), ["'s2'", "download it"]),
    "a number as picture": (lambda w: w.records[2].update(image=2), ["'s2'", "'image' must be a path"]),
    "no answer": (lambda w: w.records[2]["conversations"].pop(), ["'s2'", "no answer", "add one or drop it"]),
    "null as answer": (
        lambda w: w.records[2]["conversations"][1].update(value=None),
        ["'s2'", "conversations[1]", "'value' is null; write its text"],
    ),
    "pixels of 32 bits": (
        lambda w: Image.new("F", (4, 4)).save(w.folder / "2.png", "TIFF"),
        ["'s2'", "2.png", "32 bits", "save 8 bits"],
    ),
    "a folder as picture": (
        lambda w: ((w.folder / "2.png").unlink(), (w.folder / "2.png").mkdir()),
        ["'s2'", "2.png", "Is a directory"],
    ),
}


@pytest.mark.parametrize("case", OWN_JSON)
def test_own_json_is_refused_with_what_to_do(case: str, world: World, capfd) -> None:
    spoil, words = OWN_JSON[case]
    spoil(world)
    line = refusal(world, capfd)
    for word in ("data.json", *words):
        assert word in line, line


@pytest.mark.parametrize("form", ["one record a line", "records over several lines", "byte order mark"])
def test_forms_of_json_are_told_apart(form: str, world: World) -> None:
    lines = {"one record a line": None, "records over several lines": 2}
    if form in lines:
        world.text = "\n".join(json.dumps(record, indent=lines[form]) for record in world.records)
    else:
        world.text = "\ufeff" + json.dumps(world.records)
    assert world.fit() == 0


# -- own machine


def test_a_device_that_is_not_there(world: World, capfd) -> None:
    if torch.cuda.is_available():
        pytest.skip("has one")
    line = refusal(world, capfd, "--trainer.accelerator=gpu")
    assert "accelerator=gpu" in line
    assert "leave it at auto" in line
    assert "strategy=foo" in refusal(world, capfd, "--trainer.strategy=foo")
    run = finished(world.folder / "weights")
    capfd.readouterr()
    assert cli.main(["predict", "--weights", str(run), "--prompt", "x", "--device", "cuda"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("vlm: error: device cuda: ")
    assert "leave it out" in error


def test_an_old_python_is_refused_by_pip() -> None:
    """And by `make setup`, before it."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"


# -- own settings


def test_settings_that_do_not_fit_together(world: World, capfd) -> None:
    source = {"class_path": "vlm.data.LlavaJson", "init_args": {"path": str(world.folder / "data.json")}}
    validated = f"--data.init_args.val_sources={json.dumps([source])}"
    line = refusal(world, capfd, "--trainer.val_check_interval=999", validated)
    assert "val_check_interval=999 is more than the 2 packs of an epoch" in line
    small = json.dumps(dict(LLAMA, vocab_size=100))
    line = refusal(world, capfd, f"--model.init_args.language.init_args.config={small}")
    assert "llama_sp_tokenizer.model) makes ids up to 31999, but the language model has 100 token embeddings" in line


# -- own pictures


def _read(path: Path) -> Image.Image:
    return ImageFile(path.name, path).read(Sample("s", ()))


def test_pictures_of_every_kind_are_read_as_the_published_pipelines_read_them(tmp_path: Path) -> None:
    """Which is `Image.open(path).convert("RGB")`."""
    colors = Image.effect_noise((12, 8), 90).convert("RGB").resize((24, 16))
    cases = {
        "grey.png": colors.convert("L"),
        "grey-alpha.png": colors.convert("LA"),
        "alpha.png": Image.merge("RGBA", (*colors.split(), colors.convert("L"))),
        "palette.png": colors.quantize(16),
        "two-colors.png": colors.convert("1"),
        "cmyk.jpg": colors.convert("CMYK"),
        "moving.gif": colors.quantize(16),
    }
    for name, image in cases.items():
        path = tmp_path / name
        image.save(path, **({"save_all": True, "append_images": [image.rotate(180)]} if name == "moving.gif" else {}))
        found = _read(path)
        assert found.mode == "RGB", name
        assert found.size == (24, 16), name
        assert np.array_equal(np.asarray(found), np.asarray(Image.open(path).convert("RGB"))), name


def test_palettes_with_transparency_make_no_noise(tmp_path: Path, recwarn) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    image.save(tmp_path / "a.png", transparency=b"\x00\x80")
    assert _read(tmp_path / "a.png").getpixel((0, 0)) == (9, 8, 7)
    assert not recwarn.list


def test_sixteen_bits_of_grey_are_not_cut_off(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        grey = np.asarray(_read(tmp_path / name))
        assert np.array_equal(grey[..., 0], np.arange(256).reshape(16, 16))
        assert np.array_equal(grey[..., 0], grey[..., 2])


def test_a_rotation_in_exif_is_not_applied(tmp_path: Path) -> None:
    """The published pipelines do not either: the model and the boxes in the data know the picture as it is stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert _read(tmp_path / "a.jpg").size == (20, 10)
    sample = Sample("s", ())
    assert ImageFile("a", tmp_path / "a.jpg").size(sample) == (20, 10)


def test_the_content_counts_and_not_the_name(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert _read(tmp_path / "a.jpg").size == (20, 10)
    (tmp_path / "b.jpg").write_text("hello")
    with pytest.raises(SampleError, match=r"'b.jpg' is not a readable picture .*; save it as PNG or JPEG"):
        _read(tmp_path / "b.jpg")
