"""Places in pictures: as parts of a message, through every geometric transform, as text of each system, and back."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import GOLDEN
from tests.support.systems import make
from vlm.data import LlavaJson
from vlm.errors import SampleError
from vlm.geometry import Placement, View, bounds, corners
from vlm.prompts.regions import REGION_FORMS, Region, find_boxes, write_regions
from vlm.sample import ImageFile, RegionPart, parse_sample
from vlm.vision.preprocess import ImageTransform, RandomCropFlip

SQUARE = View(Placement(), (1000.0, 1000.0))


def _sample(*parts: dict, images: int = 1) -> object:
    content = [{"type": "image"}] * images + [{"type": "text", "text": "Where?"}]
    record = {
        "id": "s",
        "images": [f"{index}.png" for index in range(images)],
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": list(parts)}],
    }
    return parse_sample(record, source="boxes.json")


def _text(sample) -> str:
    return "".join(part.text for part in sample.messages[-1].content)


REF = {"type": "ref", "text": "the dog"}
BOX = {"type": "box", "box": [0.12, 0.3, 0.55, 0.8]}
OTHER = {"type": "box", "box": [0.0, 0.0, 1.0, 1.0]}
QUAD = {"type": "quad", "quad": [0.1, 0.1, 0.5, 0.1, 0.5, 0.2, 0.1, 0.2]}
POINT = {"type": "point", "point": [0.5, 0.25]}


@pytest.mark.parametrize(
    ("form", "parts", "text"),
    [
        ("llava", (REF, BOX), "the dog[0.12, 0.30, 0.55, 0.80]"),
        ("llava", (POINT,), "[0.50, 0.25]"),
        ("llava", (QUAD,), "[0.10, 0.10, 0.50, 0.10, 0.50, 0.20, 0.10, 0.20]"),
        ("qwen", (REF, BOX, OTHER), "<ref>the dog</ref><box>(120,300),(550,800)</box><box>(0,0),(999,999)</box>"),
        ("qwen", (REF, QUAD), "<ref>the dog</ref><quad>(100,100),(500,100),(500,200),(100,200)</quad>"),
        ("cogvlm", (BOX,), "[[120,300,550,800]]"),
        ("cogvlm", (BOX, OTHER), "[[120,300,550,800;000,000,999,999]]"),
        ("cogvlm", (POINT,), "[[500,250]]"),
        ("fuyu", (BOX,), "<box>150, 60, 400, 275</box>"),
        ("fuyu", (POINT,), "<point>250, 125</point>"),
    ],
)
def test_each_system_writes_places_as_published(form: str, parts: tuple, text: str) -> None:
    written = write_regions(_sample(*parts), REGION_FORMS[form], view=lambda image: SQUARE)
    assert _text(written) == text
    assert written.answers == ((text, 1.0),)  # what an answer is judged against


def test_qwen_boxes_of_the_official_tokenizer_are_found() -> None:
    cases = json.loads((GOLDEN / "qwen_vl_chatml__a" / "data.json").read_text())["box_parse"]
    assert cases
    for case in cases:
        found = find_boxes(case["text"], REGION_FORMS["qwen"])
        assert [[round(value * 1000) for value in box] for box in found] == [entry["box"] for entry in case["boxes"]]


@st.composite
def _boxes(draw) -> tuple[float, float, float, float]:
    x0, y0 = draw(st.floats(0, 0.9)), draw(st.floats(0, 0.9))
    return x0, y0, draw(st.floats(x0 + 0.05, 1)), draw(st.floats(y0 + 0.05, 1))


# largest error of a form: it cuts off or rounds to its step
STEPS = {"llava": 0.0051, "qwen": 0.00101, "qwen_999": 0.00101, "cogvlm": 0.00101, "fuyu": 0.00101}


@given(st.lists(_boxes(), min_size=1, max_size=4), st.sampled_from(sorted(REGION_FORMS)))
def test_what_was_written_is_read_back(boxes: list, form: str) -> None:
    parts = [{"type": "box", "box": list(box)} for box in boxes]
    text = _text(write_regions(_sample(*parts), REGION_FORMS[form], view=lambda image: SQUARE))
    found = REGION_FORMS[form].find(f"so: {text} there", size=SQUARE.size)
    assert [region.kind for region in found] == ["box"] * len(boxes)
    for region, box in zip(found, boxes, strict=True):
        assert np.allclose(region.points, corners(box), atol=STEPS[form])


SIZES = st.tuples(st.integers(20, 300), st.integers(20, 300))


@given(_boxes(), SIZES, st.sampled_from(["pad", "crop", "squash"]))
def test_a_box_goes_where_its_picture_goes(box, size, mode) -> None:
    """A white card on black is found at its box after the transform."""
    width, height = size
    transform = ImageTransform(64, mode=mode, pad_color=(0, 0, 0), interpolation="bilinear")
    pixel_box = [round(box[0] * width), round(box[1] * height), round(box[2] * width), round(box[3] * height)]
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), tuple(pixel_box))
    share = (pixel_box[0] / width, pixel_box[1] / height, pixel_box[2] / width, pixel_box[3] / height)
    moved = bounds(transform.placement(width, height)(corners(share)))
    back = bounds(transform.placement(width, height).inverse()(corners(moved)))
    assert np.allclose(back, share, atol=1e-9)
    seen = np.asarray(transform.square(image))[..., 0] / 255
    inside = [min(max(value, 0.0), 1.0) * 64 for value in moved]
    expected = max(0.0, inside[2] - inside[0]) * max(0.0, inside[3] - inside[1])
    edge = 2 * (inside[2] - inside[0] + inside[3] - inside[1]) + 8
    assert abs(seen.sum() - expected) <= edge  # area, but for a blurred rim
    for x, y in ((0.5, 0.5), (0.25, 0.75)):
        middle = (inside[0] + x * (inside[2] - inside[0]), inside[1] + y * (inside[3] - inside[1]))
        if inside[2] - inside[0] > 8 and inside[3] - inside[1] > 8:
            assert seen[int(middle[1]), int(middle[0])] > 0.9


@given(_boxes(), SIZES, st.integers(0, 1000))
def test_a_box_goes_with_a_random_crop_and_its_mirror(box, size, seed) -> None:
    width, height = size
    augment = RandomCropFlip(64)
    image = Image.new("RGB", size)
    pixel_box = (round(box[0] * width), round(box[1] * height), round(box[2] * width), round(box[3] * height))
    image.paste((255, 255, 255), pixel_box)
    share = (pixel_box[0] / width, pixel_box[1] / height, pixel_box[2] / width, pixel_box[3] / height)
    x0, y0, x1, y1 = (
        min(max(v, 0), 1) * 64 for v in bounds(augment.placement(width, height, seed=seed)(corners(share)))
    )
    seen = np.asarray(augment(image, seed=seed))[..., 0] / 255
    if x1 - x0 > 8 and y1 - y0 > 8:
        assert seen[int((y0 + y1) / 2), int((x0 + x1) / 2)] > 0.9
    assert abs(seen.sum() - (x1 - x0) * (y1 - y0)) <= 2 * (x1 - x0 + y1 - y0) + 16


def test_the_padded_square_is_what_llava_counts_from() -> None:
    transform = ImageTransform(336, mode="pad")
    view = View(transform.placement(200, 100), (336, 336))
    written = write_regions(
        _sample(BOX | {"box": [0.25, 0.0, 0.75, 1.0]}), REGION_FORMS["llava"], view=lambda image: view
    )
    assert _text(written) == "[0.25, 0.25, 0.75, 0.75]"


def test_a_mirrored_quad_starts_at_its_top_left() -> None:
    view = View(Placement(scale_x=-1, shift_x=1), (1000.0, 1000.0))
    text = _text(write_regions(_sample(QUAD), REGION_FORMS["qwen"], view=lambda image: view))
    assert text == "<quad>(500,100),(900,100),(900,200),(500,200)</quad>"


def test_pixels_are_counted_in_the_picture_they_name(tmp_path: Path) -> None:
    for name, size in (("a.png", (100, 50)), ("b.png", (400, 200))):
        Image.new("RGB", size).save(tmp_path / name)
    record = {
        "images": ["a.png", "b.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "image"}]},
            {
                "role": "assistant",
                "content": [{"type": "box", "box": [100, 50, 300, 150], "unit": "pixel", "image": 1}],
            },
        ],
    }
    sample = parse_sample(record, position=4, image_root=tmp_path)
    assert sample.messages[1].content == (RegionPart("box", ((100.0, 50.0), (300.0, 150.0)), 1, "pixel"),)
    assert _text(write_regions(sample, REGION_FORMS["cogvlm"], view=lambda image: SQUARE)) == "[[250,250,750,750]]"
    record["messages"][1]["content"][0]["image"] = 0
    with pytest.raises(SampleError, match=r"outside of its picture of 100x50 pixels"):
        write_regions(parse_sample(record, image_root=tmp_path), REGION_FORMS["cogvlm"], view=lambda image: SQUARE)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "box", "box": [0.5, 0.1, 0.2, 0.3]}, "empty or inverted"),
        ({"type": "box", "box": [0.5, 0.1, 0.5, 0.3]}, "empty or inverted"),
        ({"type": "box", "box": [0.5, 0.1, 1.5, 0.3]}, "'unit': 'pixel' for pixels"),
        ({"type": "box", "box": [-1, 0, 5, 5], "unit": "pixel"}, "pixels start at 0"),
        ({"type": "box", "box": [0.5, 0.1, 0.6]}, "takes 4 numbers"),
        ({"type": "box", "box": [0.5, 0.1, 0.6, "x"]}, "takes 4 numbers"),
        ({"type": "box", "box": [0.5, 0.1, 0.6, float("nan")]}, "takes 4 numbers"),
        ({"type": "quad", "quad": [0.5, 0.1, 0.6, 0.7]}, "takes 8 numbers"),
        ({"type": "point", "point": 3}, "takes 2 numbers"),
        ({"type": "point", "point": [0.1, 0.1], "image": 1}, "there are 1 images"),
        ({"type": "point", "point": [0.1, 0.1], "image": "a"}, "must be the number of a picture"),
        ({"type": "point", "point": [0.1, 0.1], "unit": "mm"}, "'unit' must be one of share, pixel"),
        ({"type": "ref", "text": " "}, "must be a phrase"),
    ],
)
def test_wrong_regions_are_named(part: dict, words: str) -> None:
    with pytest.raises(SampleError, match=words) as caught:
        _sample(part)
    assert "boxes.json" in str(caught.value)


def test_regions_that_a_system_cannot_show_or_write_are_errors() -> None:
    with pytest.raises(SampleError, match="cannot write a quad"):
        write_regions(_sample(QUAD), REGION_FORMS["cogvlm"], view=lambda image: SQUARE)
    cut = View(ImageTransform(64, mode="crop").placement(400, 100), (64.0, 64.0))
    hidden = _sample({"type": "box", "box": [0.0, 0.0, 0.2, 1.0]})
    with pytest.raises(SampleError, match="outside of what the system sees"):
        write_regions(hidden, REGION_FORMS["llava"], view=lambda image: cut)


def test_boxes_that_make_no_sense_are_not_drawn() -> None:
    text = "A [0.25, 0.5, 0.75, 1.0] b [.1,0,1,.2]; none: [1, 2, 3, 4] [0.5, 0.1, 0.2, 0.3] [0.1, 0.2]"
    assert find_boxes(text, REGION_FORMS["llava"]) == [(0.25, 0.5, 0.75, 1.0), (0.1, 0.0, 1.0, 0.2)]
    assert REGION_FORMS["llava"].find("[0.1, 0.2]") == [Region("point", ((0.1, 0.2),))]


def test_a_codec_writes_regions_before_it_counts_tokens(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100)).save(tmp_path / "0.png")
    codec = make("llava_1_5").codec
    sample = dataclasses.replace(
        _sample({"type": "box", "box": [0.25, 0.0, 0.75, 1.0]}), images=(ImageFile("0.png", tmp_path / "0.png"),)
    )
    encoded = codec.encode(sample)
    targets = encoded.text[0].targets
    assert codec.decode(targets[targets >= 0].tolist()).startswith("[0.25, 0.25, 0.75, 0.75]")
    assert encoded.info().answers == (("[0.25, 0.25, 0.75, 0.75]", 1.0),)
    seen = codec.find_boxes("[0.25, 0.25, 0.75, 0.75]", size=(336, 336))
    assert codec.view(200, 100).placement.inverse()(corners(seen[0])) == corners((0.25, 0.0, 0.75, 1.0))


def test_boxes_in_texts_of_llava_are_places(tmp_path: Path) -> None:
    """Written again they are the same; another system writes them in its own form."""
    Image.new("RGB", (96, 120)).save(tmp_path / "a.png")
    Image.new("RGB", (200, 100)).save(tmp_path / "b.png")
    turns = [
        ("human", "<image>\nWhere is it?"), ("gpt", "[0.53, 0.07, 0.87, 0.42]"),
        ("human", "[0.20, 0.10, 0.90, 1.00] or [0.9, 0.1, 0.2, 0.3], [1, 2, 3, 4]?<image>And here?"),
        ("gpt", "At [0.25, 0.30, 0.50, 0.70]."),
    ]  # fmt: skip
    record = {
        "id": "7", "image": ["a.png", "b.png"],
        "conversations": [{"from": who, "value": value} for who, value in turns],
        "answers": [{"text": turns[-1][1], "weight": 1.0}],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps([record]))
    plain, marked = (LlavaJson(tmp_path / "a.json", places=places)[0] for places in (False, True))
    transform = ImageTransform(336, mode="pad")

    def padded(image: int) -> View:
        return View(transform.placement(*marked.images[image].size(marked)), (336, 336))

    again = write_regions(marked, REGION_FORMS["llava"], view=padded)
    assert again.messages == plain.messages
    assert again.answers == plain.answers
    qwen = write_regions(marked, REGION_FORMS["qwen"], view=lambda image: View(Placement(), (448, 448)))
    assert _text(qwen) == "At <box>(250,100),(500,900)</box>."
    assert qwen.answers == (("At <box>(250,100),(500,900)</box>.", 1.0),)
    assert "".join(part.text for part in qwen.messages[1].content) == "<box>(537,70),(962,420)</box>"
