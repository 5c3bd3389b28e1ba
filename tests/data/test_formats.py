"""The embedded world in every published layout, read back and compared with the scenes; and broken files of each."""

import io
import itertools
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import vlm.data
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import cli
from vlm.data import (
    CaptionList,
    ChartQA,
    CocoCaptions,
    DocVQA,
    GroundedCaptions,
    ImagePairs,
    LlavaJson,
    Mmc4,
    Obelics,
    Parquet,
    PlainText,
    ReferringExpressions,
    ScreenElements,
    TextLines,
    VQAv2Training,
    WebDataset,
)
from vlm.data.sources.captions import without_overlap
from vlm.demo import tasks, write_format
from vlm.demo.formats import FORMATS, NOISE
from vlm.demo.pages import make_chart, make_page, make_screen
from vlm.demo.scenes import COLORS
from vlm.demo.write import scenes
from vlm.errors import SampleError, UserError
from vlm.prompts import get_template
from vlm.sample import DOCUMENT, ImagePart, RefPart, RegionPart, Sample, TextPart

NUM = 9


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    assert cli.main(["demo-data", str(folder), "--format", "all", "--num", str(NUM)]) == 0
    return folder


@pytest.fixture(scope="module")
def drawn() -> list:
    return list(scenes("train", num=NUM, size=96, seed=0))


def source(world: Path, name: str, **options: Any) -> Any:
    folder = world / name
    return {
        "blip": lambda: CaptionList(folder / "captions_train.json", image_root=folder / "images", **options),
        "coco_captions": lambda: CocoCaptions(folder / "captions.json", image_root=folder / "images", **options),
        "vqav2": lambda: VQAv2Training(
            folder / "questions.json", folder / "annotations.json", "demo_{:012d}.png", image_root=folder / "images"
        ),
        "refs": lambda: ReferringExpressions(folder / "refs.json", image_root=folder / "images", **options),
        "grit": lambda: GroundedCaptions(folder / "grit.jsonl", image_root=folder / "images", **options),
        "ocr": lambda: TextLines(folder / "ocr.jsonl", image_root=folder / "images", **options),
        "document_qa": lambda: DocVQA(folder / "docvqa.json", image_root=folder / "images"),
        "chart_qa": lambda: ChartQA(folder / "chartqa.json", image_root=folder / "images"),
        "screens": lambda: ScreenElements(folder / "screens.jsonl", image_root=folder / "images", **options),
        "gui": lambda: ScreenElements(folder / "screens.jsonl", image_root=folder / "images", **options),
        "large_pages": lambda: LlavaJson(folder / "train.json", image_root=folder / "images", **options),
        "pairs": lambda: ImagePairs(folder / "pairs.jsonl", image_root=folder / "images", **options),
        "mmc4": lambda: Mmc4(folder / "mmc4.jsonl", image_root=folder / "images", **options),
        "obelics": lambda: Obelics(folder / "obelics.jsonl", image_root=folder / "images"),
        "webdataset": lambda: WebDataset(folder / "{00000..00001}.tar", **options),
        "parquet": lambda: Parquet(folder / "train.parquet"),
        "text": lambda: PlainText(folder / "text.jsonl"),
        "articles": lambda: LlavaJson(folder / "composition.json", image_root=folder / "images"),
    }[name]()


def test_articles_teach_what_their_author_is_asked(world: Path) -> None:
    """The requests of `vlm run compose`; the one right image of a choice is the one that the line tells of."""
    found = source(world, "articles")
    by_image = dict(scenes("train", num=NUM, size=96, seed=0))
    answers = [words(found[index]) for index in range(6)]
    assert answers[1] == "适合插入图像的行是<Seg1>, <Seg2>"
    for place, at in ((0, 2), (1, 4)):
        caption = answers[at].removeprefix('标题是"').removesuffix('"')
        assert f"Here is {caption}." == answers[0].split("\n")[place + 1]
        sample, letter = found[at + 1], answers[at + 1].removeprefix("最合适的图是")
        offered = [image.name.removesuffix(".png") for image in sample.images[place:]]
        told = [caption in tasks.caption(by_image[name], "en") for name in offered]
        assert [at for at, is_it in enumerate(told) if is_it] == ["ABCD".index(letter)]


def test_large_pages_hold_words_back(world: Path) -> None:
    """Four signs of a training page are asked about, one of a page of the test, which no training page may have."""
    train, test = (
        LlavaJson(world / "large_pages" / f"{name}.json", image_root=world / "large_pages/images")
        for name in ("train", "test")
    )
    assert [len(train), len(test)] == [NUM, 2]
    assert {len(train[index].messages) for index in range(NUM)} == {8}
    for sample in test:
        assert sample.task == "page"
        assert sample.answers == ((words(sample), 1.0),)
        assert min(sample.images[0].size(sample)) == 3 * 96 or sample.images[0].size(sample) == (4 * 96, 4 * 96)


def words(sample: Sample, message: int = -1) -> str:
    return "".join(part.text for part in sample.messages[message].content if isinstance(part, TextPart | RefPart))


def regions(sample: Sample, message: int = -1) -> list[RegionPart]:
    return [part for part in sample.messages[message].content if isinstance(part, RegionPart)]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_by_its_reader(name: str, world: Path) -> None:
    found = source(world, name)
    assert len(found) == {"mmc4": 3, "obelics": 3, "articles": 4 * 6}.get(name, NUM)
    mask = found.image_mask()
    copy = pickle.loads(pickle.dumps(found))
    for index in range(len(found)):
        sample = copy[index]
        assert sample == found[index] or name in ("parquet", "webdataset")  # whose pictures are opened where they lie
        assert bool(mask[index]) == found.has_image(index) == bool(sample.images)
        assert name == "articles" or bool(sample.images) == (name != "text")
        for image in sample.images:
            assert image.read(sample).size == image.size(sample)
        template = get_template("document" if sample.messages[0].role == DOCUMENT else "v1")
        if not any(regions(sample, at) for at in range(len(sample.messages))):
            assert template.render(sample.messages)
    assert len({found[index].id for index in range(len(found))}) == len(found)
    with pytest.raises(IndexError):
        found[len(found)]


def test_pictures_are_those_of_the_scenes(world: Path, drawn: list) -> None:
    for name in ("coco_captions", "grit", "refs", "vqav2", "parquet", "webdataset", "pairs"):
        found = source(world, name)
        for index, (_, scene) in enumerate(drawn):
            picture = found[index].images[0].read(found[index])
            assert np.array_equal(np.asarray(picture), np.asarray(scene.draw())), name


def test_captions(world: Path, drawn: list) -> None:
    coco = source(world, "coco_captions", prompt="Describe it.")
    for index, (_, scene) in enumerate(drawn):
        expected = [tasks.caption(scene, language) for language in tasks.LANGUAGES]
        assert [text for text, _ in coco[index].answers] == expected
        assert words(coco[index]) == expected[0]
        assert words(coco[index], 0) == "\nDescribe it."
        assert words(source(world, "parquet")[index]) == expected[0]


def test_grounded_captions_hold_every_thing_with_its_box(world: Path, drawn: list) -> None:
    expressions, chunks = source(world, "grit"), source(world, "grit", phrases="noun_chunks", prompt="What is there?")
    for index, (_, scene) in enumerate(drawn):
        sample = expressions[index]
        assert words(sample) == ", ".join(f"{thing.noun.name} on {thing.color}" for thing in scene.things)
        assert [tuple(c for p in part.points for c in p) for part in regions(sample)] == [t.box for t in scene.things]
        refs = [part.text for part in chunks[index].messages[-1].content if isinstance(part, RefPart)]
        assert refs == [thing.noun.name for thing in scene.things]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)), max_size=12))
def test_of_overlapping_phrases_the_longer_stays(spans: list[tuple[int, int]]) -> None:
    given_spans = {(start, start + length): 0 for start, length in spans}
    kept = without_overlap(given_spans)
    assert kept == sorted(kept)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(kept))
    for start, end in given_spans.keys() - set(kept):
        rivals = [k for k in kept if k[0] < end and start < k[1]]
        assert rivals
        assert max(k[1] - k[0] for k in rivals) >= end - start


def test_referring_expressions_go_both_ways(world: Path, drawn: list) -> None:
    ground, refer = source(world, "refs"), source(world, "refs", direction="refer")
    for index, (name, scene) in enumerate(drawn):
        thing = Random(f"refs 0 {name}").choice(scene.things)
        there, back = ground[index], refer[index]
        assert (there.task, back.task) == ("ground", "refer")
        assert len(there.messages) == len(back.messages) == 4
        for sample, message in ((there, 1), (there, 3), (back, 0), (back, 2)):
            [region] = regions(sample, message)
            shares = [(x / scene.width, y / scene.height) for x, y in region.points]
            assert np.allclose(np.array(shares).ravel(), thing.box, atol=2e-4)
            assert region.unit == "pixel"
        assert words(there, 0).endswith(f"the {thing.noun.name} at the {thing.place}")
        assert words(back, 3) == f"the {thing.color} card at the {thing.place}"


def test_words_and_elements_lie_where_they_are_drawn(world: Path) -> None:
    for index in range(NUM):
        _, lines = make_page(Random(f"page 0 {index}"), size=96)
        sample = source(world, "ocr")[index]
        assert [part.text for part in sample.messages[1].content if isinstance(part, RefPart)] == [
            x.text for x in lines
        ]
        picture = np.asarray(sample.images[0].read(sample))
        for region, line in zip(regions(sample), lines, strict=True):
            assert region.kind == "quad"
            (x0, y0), _, (x1, y1), _ = region.points
            assert (x0, y0, x1, y1) == line.box
            assert (picture[int(y0) : int(y1), int(x0) : int(x1)] < 128).any()
        assert words(source(world, "ocr", places=False)[index]) == "\n".join(line.text for line in lines)
        _, buttons = make_screen(Random(f"screen 0 {index}"), size=96)
        for direction, message in (("ground", 1), ("refer", 0)):
            sample = source(world, "screens", direction=direction)[index]
            assert len(sample.messages) == 2 * len(buttons)
            for at, button in enumerate(buttons):
                [region] = regions(sample, 2 * at + message)
                assert tuple(value for point in region.points for value in point) == button.box
                assert f"<button>{button.text}</button>" in words(sample, 2 * at + 1 - message)


def test_questions_have_true_answers(world: Path, drawn: list) -> None:
    for index, (name, scene) in enumerate(drawn):
        vqa = source(world, "vqav2")[index]
        turns = {turn.question: turn.answer for turn in tasks.questions(scene, "en", Random(f"vqav2 0 {name}"))}
        answer = turns[words(vqa, 0).lstrip("\n")]
        assert words(vqa) == answer
        assert dict(vqa.answers) == {answer: 0.9, "unknown": 0.1}
        _, lines = make_page(Random(f"page 0 {index}"), size=96)
        page = source(world, "document_qa")[index]
        expected = lines[0 if "first" in words(page, 0) else -1].text
        assert [text for text, _ in page.answers] == [expected, expected.lower()]
        chart, heights = make_chart(Random(f"chart 0 {index}"), size=96)
        sample = source(world, "chart_qa")[index]
        if "tallest" in words(sample, 0):
            assert heights[words(sample)] == max(heights.values())
        rows = {
            color: min(np.argwhere((np.asarray(chart) == COLORS[color]).all(-1))[:, 0]) for color in heights
        }  # the higher the bar, the nearer its top to row 0
        assert sorted(heights, key=heights.__getitem__) == sorted(rows, key=lambda color: -rows[color])
        pair = source(world, "pairs", mark="Picture {}: ")[index]
        counts = [len(drawn[(index + k) % NUM][1].things) for k in (0, 1)]
        assert words(pair) == (
            "neither" if counts[0] == counts[1] else f"the {('first', 'second')[counts[1] > counts[0]]}"
        )
        assert words(pair, 0).startswith("Picture 1: \nPicture 2: \n")


def test_documents_show_pictures_before_their_text(world: Path, drawn: list) -> None:
    for name in ("mmc4", "obelics"):
        found = source(world, name)
        for index in range(3):
            [message] = found[index].messages
            assert message.role == DOCUMENT
            for k in range(3):
                at = [i for i, part in enumerate(message.content) if isinstance(part, ImagePart)][k]
                caption = tasks.caption(drawn[3 * index + k][1], "en")
                assert message.content[at + 1].text.startswith(caption)
    assert len(source(world, "mmc4", max_images=2)[0].images) == 2
    assert not source(world, "mmc4", min_similarity=0.95)[0].images
    lines = PlainText(world / "text" / "text.txt")
    assert [words(lines[i]) for i in range(NUM)] == [words(source(world, "text")[i]) for i in range(NUM)]


def test_web_pairs_have_the_noise_that_is_said(tmp_path: Path) -> None:
    write_format(tmp_path / "web", "webdataset", num=120, size=32)
    found = WebDataset(tmp_path / "web" / "*.tar", caption="caption")
    plain = WebDataset(tmp_path / "web" / "*.tar")
    drawn = list(scenes("train", num=120, size=32, seed=0))
    right = [words(found[i]) == tasks.caption(scene, "en") for i, (_, scene) in enumerate(drawn)]
    assert [words(plain[i]) for i in range(120)] == [words(found[i]) for i in range(120)]
    assert abs((1 - np.mean(right)) - NOISE) < 0.1


def test_parquet_with_captions(tmp_path: Path, drawn: list) -> None:
    import pyarrow
    from pyarrow import parquet

    stream = io.BytesIO()
    drawn[0][1].draw().save(stream, "PNG")
    rows = [{"image": {"bytes": stream.getvalue(), "path": None}, "TEXT": text, "url": ""} for text in ("a boat ", " ")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "web.parquet")
    found = Parquet(tmp_path / "web.parquet", caption="TEXT", prompt="Describe it.")
    assert (words(found[0]), words(found[0], 0)) == ("a boat", "\nDescribe it.")
    assert np.array_equal(np.asarray(found[0].images[0].read(found[0])), np.asarray(drawn[0][1].draw()))
    with pytest.raises(SampleError, match="row 1: column 'TEXT' must hold a caption"):
        found[1]
    with pytest.raises(UserError, match="has no column 'caption'; found image, TEXT, url"):
        len(Parquet(tmp_path / "web.parquet", caption="caption"))


def test_a_format_is_written_once(tmp_path: Path, capfd) -> None:
    arguments = ["demo-data", str(tmp_path / "a"), "--format", "refs", "--num", "3"]
    assert cli.main(arguments) == 0
    assert cli.main(arguments) == 0
    assert "is there already" in capfd.readouterr().out
    assert cli.main([*arguments[:-1], "4"]) == 2
    assert "choose or empty another folder" in capfd.readouterr().err
    with pytest.raises(UserError, match="num is 1"):
        write_format(tmp_path / "b", "refs", num=1)


# -- broken files


def _edit(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Changes a JSON file, or the second line of a JSONL file."""

    def edit(path: Path) -> None:
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            path.write_text(json.dumps(change(content) or content))
            return
        lines = path.read_text().splitlines()
        record = json.loads(lines[1])
        lines[1] = json.dumps(change(record) or record)
        path.write_text("\n".join(lines))

    return edit


def _set(**values: Any) -> Callable[[Path], None]:
    return _edit(lambda record: (record[1] if isinstance(record, list) else record).update(values))


def _drop(key: str) -> Callable[[Path], None]:
    return _edit(lambda record: (record[1] if isinstance(record, list) else record).pop(key) and None)


BROKEN: dict[str, tuple[str, str, Callable[[Path], None], str]] = {
    "caption of no picture": (
        "coco_captions", "captions.json", _edit(lambda c: c["annotations"][3].update(image_id=99)),
        "annotation 3 is of image_id 99, which is not under 'images'",
    ),
    "two pictures of one id": (
        "coco_captions", "captions.json", _edit(lambda c: c["images"][1].update(id=0)), "id 0 stands there twice",
    ),
    "no list of pictures": ("coco_captions", "captions.json", _drop("images"), "key 'images' must hold a list"),
    "empty caption": (
        "coco_captions", "captions.json", _edit(lambda c: c["annotations"][0].update(caption=" ")), "'caption' is emp",
    ),
    "no annotation": (
        "vqav2", "annotations.json", _edit(lambda c: c["annotations"].pop() and None), "has no annotation in",
    ),
    "a question twice": (
        "vqav2", "questions.json", _edit(lambda c: c["questions"][1].update(question_id=0)), "0 stands there twice",
    ),
    "box of no size": ("refs", "refs.json", _set(bbox=[1, 1, 0, 5]), "has no area; it is x, y, width, height"),
    "box of three": ("refs", "refs.json", _set(bbox=[1, 1, 5]), "must be a list of 4 numbers"),
    "no sentence": ("refs", "refs.json", _set(sentences=[]), "'sentences' must be a list of at least one text"),
    "phrase beyond the caption": (
        "grit", "grit.jsonl", _set(ref_exps=[[0, 999, 0, 0, 1, 1, 1]]), "0..999 is no part of a caption",
    ),
    "inverted box": ("grit", "grit.jsonl", _set(ref_exps=[[0, 2, 0.5, 0, 0.2, 1, 1]]), "empty or inverted"),
    "quad of four": ("ocr", "ocr.jsonl", _set(lines=[{"text": "A", "quad": [0, 0, 1, 1]}]), "a list of 8 numbers"),
    "no lines": ("ocr", "ocr.jsonl", _set(lines=[]), "there is nothing to read"),
    "no answers": ("document_qa", "docvqa.json", _edit(lambda c: c["data"][1].update(answers=[])), "'answers' must be"),
    "a number as answer": ("chart_qa", "chartqa.json", _set(label=3), "'label' must be a text, found 3"),
    "no elements": ("screens", "screens.jsonl", _set(elements=[]), "'elements' is empty"),
    "an element without words": (
        "screens", "screens.jsonl", _set(elements=[{"box": [0, 0, 5, 5]}]), "key 'text' is missing",
    ),
    "picture outside": ("pairs", "pairs.jsonl", _set(images=["../../x.png", "y.png"]), "lies outside the image root"),
    "sentence that is not there": (
        "mmc4", "mmc4.jsonl", _set(image_info=[{"image_name": "a.png", "matched_text_index": 9}]),
        "before sentence 9, but the document has 4",
    ),
    "lists of two lengths": ("obelics", "obelics.jsonl", _set(texts=["a"]), "they must be alike"),
    "neither picture nor text": (
        "obelics", "obelics.jsonl", _set(images=[None, None], texts=["a", None]), "place 1 must have either",
    ),
    "no text": ("text", "text.jsonl", _set(text=None), "'text' must be a text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_records_are_named(case: str, tmp_path: Path) -> None:
    name, file, spoil, message = BROKEN[case]
    write_format(tmp_path / name, name, num=9, size=32)
    spoil(tmp_path / name / file)
    with pytest.raises(UserError, match=message) as caught:
        list(map(source(tmp_path, name).__getitem__, range(3)))
    assert str(tmp_path / name) in str(caught.value)


def _tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_broken_shards(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (20, 10)).save(picture, "PNG")
    whole = _tar(tmp_path / "a.tar", {"../x/1.png": picture.getvalue(), "../x/1.txt": b"one", "2.txt": b"no picture"})
    found = WebDataset(whole)  # names never become paths: nothing is written anywhere
    assert len(found) == 1
    assert found[0].images[0].size(found[0]) == (20, 10)
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[: 512 + 40])
    (tmp_path / "no.tar").write_text("hello")
    odd = _tar(tmp_path / "odd.tar", {"1.png": b"no picture", "1.txt": b"\xff\xfe", "2.png": b"x", "2.json": b"[]"})
    for broken, message in (
        (WebDataset(tmp_path / "cut.tar"), "no whole tar file"),
        (WebDataset(tmp_path / "no.tar"), "no whole tar file"),
        (WebDataset(tmp_path / "none.tar"), "cannot be read"),
        (WebDataset(tmp_path / "x*.tar"), "no file there"),
        (WebDataset(whole, caption="caption"), r"no picture with a KEY.json"),
    ):
        with pytest.raises(UserError, match=message):
            len(broken)
    with pytest.raises(SampleError, match="write the shard again in UTF-8"):
        WebDataset(odd)[0]
    with pytest.raises(SampleError, match="has no key 'caption'"):
        WebDataset(odd, caption="caption")[0]
    bad = WebDataset(_tar(tmp_path / "b.tar", {"1.png": b"no picture", "1.txt": b"one"}))
    with pytest.raises(SampleError, match="not a readable picture"):
        bad[0].images[0].read(bad[0])
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    large = WebDataset(_tar(tmp_path / "c.tar", {"1.png": bomb.getvalue(), "1.txt": b"one"}), max_pixels=1_000_000)
    with pytest.raises(SampleError, match="over the limit"):
        large[0].images[0].read(large[0])


def test_plain_text_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("good\nschön\n".encode("latin-1"))
    found = PlainText(tmp_path / "a.txt")
    assert words(found[0]) == "good"
    with pytest.raises(SampleError, match="line 2 is not UTF-8"):
        found[1]
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(UserError, match="holds no samples"):
        len(PlainText(tmp_path / "b.txt"))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_shard_or_an_error_in_one_line(tmp_path_factory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "x.tar"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        len(WebDataset(path))
    assert "\n" not in str(caught.value)


def test_names_of_vlm_data() -> None:
    for name in ("CocoCaptions", "WebDataset", "PlainText"):
        assert getattr(vlm.data, name).__name__ == name


def test_remote_files_and_pictures_are_read_like_local_ones(world: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    remote = MemoryFileSystem()
    for file in world.rglob("*"):
        if file.is_file() and file.parts[len(world.parts)] in (
            "refs",
            "coco_captions",
            "webdataset",
            "parquet",
            "text",
        ):
            remote.pipe_file(f"/world/{file.relative_to(world).as_posix()}", file.read_bytes())
    root = "memory://world"
    pairs = [
        (ReferringExpressions(f"{root}/refs/refs.json", image_root=f"{root}/refs/images"), source(world, "refs")),
        (CocoCaptions(f"{root}/coco_captions/captions.json", image_root=f"{root}/coco_captions/images"),
         source(world, "coco_captions")),
        (WebDataset(f"{root}/webdataset/*.tar"), source(world, "webdataset")),
        (Parquet(f"{root}/parquet/train.parquet"), source(world, "parquet")),
        (PlainText(f"{root}/text/text.jsonl"), source(world, "text")),
        (PlainText(f"{root}/text/text.txt"), source(world, "text")),
    ]  # fmt: skip
    for far, near in pairs:
        assert len(far) == len(near)
        far = pickle.loads(pickle.dumps(far))
        for index in range(0, len(near), 4):
            assert far[index].messages == near[index].messages
            for one, other in zip(far[index].images, near[index].images, strict=True):
                assert one.read(far[index]) == other.read(near[index])
    with pytest.raises(UserError, match=r"memory://world/none.json: cannot be read"):
        len(ReferringExpressions(f"{root}/none.json"))
    with pytest.raises(UserError, match="pip install"):
        ReferringExpressions("s3://bucket/refs.json")
    with pytest.raises(UserError, match="give a local path or a URL"):
        ReferringExpressions("nonsense://bucket/refs.json")
    remote.pipe_file("/world/broken.json", b'[{"a": 1,, }]')
    with pytest.raises(UserError, match=r"memory://world/broken.json: .* line 1 column"):
        len(ReferringExpressions(f"{root}/broken.json"))
    remote.pipe_file("/world/escape.json", json.dumps(
        [{"image": "../x.png", "bbox": [1, 1, 2, 2], "sentences": ["a"]}]).encode())  # fmt: skip
    with pytest.raises(SampleError, match="lies outside the image root memory://world"):
        ReferringExpressions(f"{root}/escape.json")[0]
