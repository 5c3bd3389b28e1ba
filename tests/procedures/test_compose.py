"""Illustrated articles: every prompt as the published demo has it, and the files that come of it."""

import vlm  # noqa: F401

import json
from collections.abc import Collection
from pathlib import Path

import pytest
from PIL import Image

import cli
from tests.procedures.test_shards import write_clip
from tests.support.xcomposer import xcomposer
from tests.support.xcomposer2 import xcomposer2
from tests.systems.test_xcomposer import published_folder
from vlm.errors import UserError
from vlm.language import Decoding
from vlm.procedures.compose import free_form, requests
from vlm.procedures.compose.composer import STEPS, Composer, Steps, shown, speaking
from vlm.procedures.compose.page import write_article
from vlm.procedures.image_index import ImageIndex
from vlm.sample import ImageFile, Sample

EOH = "<TOKENS_UNUSED_0>"


class Said:
    """A system that says what it is told to, and remembers what it was asked."""

    system = "xcomposer"

    def __init__(self, answers: list[str]) -> None:
        self.codec = xcomposer(max_tokens=4096).codec
        self.answers = answers
        self.asked: list[tuple[Sample, str, Decoding]] = []

    def generate(self, asked: Sample, *, decoding: Decoding) -> str:
        self.asked.append((asked, self.codec.template.name, decoding))
        return self.answers.pop(0)


class Folder:
    """An index that finds images in the order of their names."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.asked: list[str] = []

    def nearest(self, text: str, *, count: int, exclude: Collection[str]) -> list[Path]:
        self.asked.append(text)
        return [path for path in self.paths if str(path) not in exclude][:count]


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    (tmp_path / "pictures").mkdir()
    made = [tmp_path / "pictures" / f"{at}.png" for at in range(9)]
    for at, path in enumerate(made):
        Image.new("RGB", (64, 48), (28 * at, 90, 160)).save(path)
    return made


def test_the_command_writes_an_article(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two titles, one of which fails on its own."""
    module = Said(["\n", *ANSWERS])
    monkeypatch.setattr("vlm.loading.open_system", lambda weights, **options: module)
    monkeypatch.setattr(ImageIndex, "open", lambda folder, **options: Folder(paths))
    options = ["--index", "i", "--out", str(tmp_path / "out")]
    command = ["run", "compose", "--title", "Nothing", "Sea", "--weights", "w", *options, "--device", "cpu"]
    assert cli.main(command) == 1
    said = capsys.readouterr()
    assert "Nothing: the model wrote no article" in said.err
    assert "3 lines, 2 images" in said.out
    assert (tmp_path / "out/Sea/article.html").is_file()
    assert cli.main([*command[:3], "Sea", *command[5:]]) == 0  # from what was said before
    for wrong, message in ((["--title", " "], "no title"), (["--title", "a!", "a?"], "same file name")):
        assert cli.main(["run", "compose", *wrong, "--weights", "w", *options]) == 2
        assert message in capsys.readouterr().err
    module.system = "llava"
    assert cli.main(command) == 2
    assert "is llava, and only xcomposer and xcomposer2 were taught to compose" in capsys.readouterr().err


ARTICLE = "A day at sea\n\n  \nThe boat leaves.\n\t\nA whale comes up.\n"
ANSWERS = [ARTICLE, "<Seg2>, <Seg0> und <Seg9> <Seg2>", 'A whale beside a boat" and', "The sea", "C.", "x"]


def test_an_article_step_by_step(paths: list[Path], tmp_path: Path) -> None:
    module, index = Said([*ANSWERS]), Folder(paths)
    steps = Steps.open(tmp_path / "out" / STEPS, {"title": "Sea"})
    article = Composer(module, index).compose("Sea", steps)
    assert article.sections == ("A day at sea", "The boat leaves.", "A whale comes up.")
    lines = "<Seg0> A day at sea\n<Seg1> The boat leaves.\n<Seg2> A whale comes up.\n"
    prompts = {name: step["prompt"] for name, step in steps.done.items()}
    head = "  <|User|>:根据给定上下文和候选图像，选择合适的配图：A day at sea\n"
    offered = "\n\n候选图像包括: A.<ImageHere>\nB.<ImageHere>\nC.<ImageHere>\nD.<ImageHere>\n\n"
    cue = f"{EOH} {EOH} <|Bot|>:最合适的图是"
    assert prompts == {
        "article": f" <|User|>:根据给定标题写一个图文并茂，不重复的文章：Sea\n{EOH} <|Bot|>:",
        "places": f' <|User|>:给定文章"{lines}" 根据上述文章，选择适合插入图像的行 \n{EOH} <|Bot|>:适合插入图像的行是',
        "caption 2": f' <|User|>: 给定文章"{lines}" 给出适合在<Seg2>后插入的图像对应的标题。 \n{EOH} <|Bot|>: 标题是"',
        "caption 0": f' <|User|>: 给定文章"{lines.partition("<Seg2>")[0]}" '
        '现在<Seg2>后插入图像对应的标题是"A whale beside a boat"。'
        f'给出适合在<Seg0>后插入的图像对应的标题。 \n{EOH} <|Bot|>: 标题是"',
        "candidates 2": "A whale beside a boat",
        "candidates 0": "The sea",
        "choice 0": f"{head}{offered}{cue}",
        "choice 2": f"{head}<ImageHere>The boat leaves.\nA whale comes up.\n{offered}{cue}",
    }  # fmt: skip
    third = requests.ask_caption(article.sections, 1, [(2, "a"), (0, "b")]).parts[0]
    assert '现在<Seg2>后插入图像对应的标题是"a"， <Seg0>后插入图像对应的标题是"b"。给出' in str(third)
    assert "图像的3行 \n" in str(requests.ask_places(article.sections, 3).parts[0])
    assert [(decoding.num_beams, decoding.repetition_penalty) for _, _, decoding in module.asked] == [
        (5, 5.0), (5, 1.0), (1, 5.0), (1, 5.0), (5, 1.0), (5, 1.0),
    ]  # fmt: skip
    assert all(decoding.temperature == 0 for _, _, decoding in module.asked)
    # candidates in the order of the answer, none twice; the choice in the order of the text, A where no letter is named
    first, second = article.illustrations
    assert (first.section, first.candidates, first.image) == (0, tuple(paths[4:8]), paths[6])
    assert (second.section, second.candidates, second.image) == (2, tuple(paths[:4]), paths[0])
    images = [image.path for image in module.asked[-1][0].images]
    assert images == [paths[6], *paths[:4]]


def test_a_real_model_chooses_from_a_real_index(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Captions and choices are written by a network of random weights, candidates are an index's by CLIP. The article
    and its places are kept from before: random weights name none.
    """
    for kind in ("caption", "choice"):
        monkeypatch.setitem(requests.DECODINGS, kind, Decoding(max_new_tokens=3))
    paths[8].write_bytes(b"no image")
    write_clip(tmp_path / "clip")
    weights, index = str(published_folder(tmp_path / "xcomposer")), str(tmp_path / "index")
    made = ["--weights", str(tmp_path / "clip"), "--out", index, "--device", "cpu"]
    assert cli.main(["run", "index-images", str(paths[0].parent), *made]) == 0
    facts = {"title": "Sea", "weights": weights, "index": index, "article": str(requests.DECODINGS["article"])}
    (tmp_path / "out/Sea").mkdir(parents=True)
    steps = Steps.open(tmp_path / "out/Sea" / STEPS, facts)
    sections = ("A day at sea", "The boat leaves.", "A whale comes up.")
    steps.keep("article", shown(requests.ask_article("Sea")), answer=ARTICLE)
    steps.keep("places", shown(requests.ask_places(sections, None)), answer="<Seg2>, <Seg0>")
    command = ["run", "compose", "--title", "Sea", "--weights", weights, "--index", index, "--device", "cpu"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    done = Steps.open(steps.path, facts).done
    assert {"caption 2", "caption 0", "choice 0", "choice 2"} <= done.keys()
    found = [Path(path).name for at in (2, 0) for path in done[f"candidates {at}"]["answer"]]
    assert sorted(found) == [path.name for path in paths[:8]]  # none twice, and all that can be read
    assert (tmp_path / "out/Sea/article.html").read_text().count("<img ") == 2 + 2 * 4


def test_what_is_asked_goes_to_the_system_as_it_is_shown(paths: list[Path]) -> None:
    """One BOS, one run of tokens between images, the cue whole."""
    module = Said([])
    request = requests.ask_choice(
        ["a", "b"], 1, [(0, ImageFile("x", paths[0]))], [ImageFile("y", p) for p in paths[1:5]]
    )
    with speaking(module, request.template) as codec:
        item = codec.encode(request.sample("t"), generate=True)
        slots = item.text[0].slots["image"]
        assert len(slots) == 5 * 6
        ids = [token for at, token in enumerate(item.text[0].ids.tolist()) if at not in set(slots.tolist())]
        parts = shown(request).split("<ImageHere>")
        assert ids == [1, *(token for part in parts for token in codec.tokenizer.encode(part)[0])]
    assert module.codec.template.name == "xcomposer_vl"


def test_an_article_that_is_too_long_for_a_choice_loses_its_beginning(paths: list[Path]) -> None:
    module = Said([])
    composer = Composer(module, Folder(paths))
    sections = [f"line {number} " + "word " * 100 for number in range(40)]
    offered = [ImageFile(str(path), path) for path in paths[:4]]
    request = composer._fitted(requests.ask_choice(sections, 39, [], offered), "t")
    with speaking(module, request.template) as codec:
        length = codec.encode(request.sample("t"), generate=True).num_tokens - 1
        assert requests.MAX_TOKENS - 120 < length <= requests.MAX_TOKENS
    assert (request.parts[0], request.parts[-1]) == ("根据给定上下文和候选图像，选择合适的配图：", "\n\n")
    assert str(request.parts[-10]).startswith("line 39")
    assert composer._fitted(requests.ask_choice(sections[:3], 2, [], offered), "t").parts[1] == sections[0] + "\n"


def test_an_article_is_taken_up_where_it_stopped(paths: list[Path], tmp_path: Path) -> None:
    path, facts = tmp_path / STEPS, {"title": "Sea", "weights": "w"}
    module = Said(ANSWERS[:3])
    with pytest.raises(IndexError):  # killed in the middle
        Composer(module, Folder(paths)).compose("Sea", Steps.open(path, facts))
    again = Said(ANSWERS[3:])
    article = Composer(again, Folder(paths)).compose("Sea", Steps.open(path, facts))
    assert len(again.asked) == 3
    nothing = Folder([])
    assert Composer(Said([]), nothing).compose("Sea", Steps.open(path, facts)) == article
    assert nothing.asked == []
    stored = json.loads(path.read_text())
    assert [step["name"] for step in stored["steps"]][:3] == ["article", "places", "caption 2"]
    assert stored["steps"][-1]["answer"] == "x"
    with pytest.raises(UserError, match=r"was begun with weights 'w'; give another --out"):
        Steps.open(path, facts | {"weights": "v"})


def test_the_files_of_an_article(paths: list[Path], tmp_path: Path) -> None:
    steps = Steps.open(tmp_path / STEPS, {})
    article = Composer(Said([*ANSWERS]), Folder(paths)).compose("Sea <&>", steps)
    write_article(tmp_path / "out", article)
    assert (tmp_path / "out/article.md").read_text() == (
        "# Sea <&>\n\nA day at sea\n\n![The sea](images/0.png)\n\nThe boat leaves.\n\nA whale comes up.\n\n"
        "![A whale beside a boat](images/2.png)\n"
    )
    assert (tmp_path / "out/images/0.png").read_bytes() == paths[6].read_bytes()
    page = (tmp_path / "out/article.html").read_text()
    assert page.count("<img ") == 2 + 2 * 4
    assert "<h1>Sea &lt;&amp;&gt;</h1>" in page
    assert page.index("A day at sea") < page.index("The sea") < page.index("The boat leaves.")


@pytest.mark.parametrize(
    ("answers", "kept", "message"),
    [
        (["\n \n"], 9, "the model wrote no article"),
        ([ARTICLE, "none at all <Seg77>"], 9, "names none of the 3 lines of its article as the place of an image"),
        (ANSWERS, 0, "the index has 0 images left for line 2, and 4 are chosen from at each of the 2 places"),
        (ANSWERS, 7, "the index has 3 images left for line 0"),
    ],
    ids=["no article", "no place", "empty index", "three candidates"],
)
def test_what_can_go_wrong(answers: list[str], kept: int, message: str, paths: list[Path], tmp_path: Path) -> None:
    steps = Steps.open(tmp_path / STEPS, {})
    with pytest.raises(UserError, match=message):
        Composer(Said([*answers]), Folder(paths[:kept])).compose("Sea", steps)
    assert "article" in json.loads((tmp_path / STEPS).read_text())["steps"][0]["name"]


def test_a_candidate_that_cannot_be_read_is_named(paths: list[Path], tmp_path: Path) -> None:
    paths[5].write_bytes(b"no image")
    with pytest.raises(UserError, match=r"Sea: choice 0.*5\.png"):
        Composer(Said([*ANSWERS]), Folder(paths)).compose("Sea", Steps.open(tmp_path / STEPS, {}))


# -- free instructions, and images of one's own


class Said2(Said):
    system = "xcomposer2"

    def __init__(self, answers: list[str]) -> None:
        super().__init__(answers)
        self.codec = xcomposer2(max_tokens=4096).codec


def _turn(text: str, begun: str = "") -> str:
    return f"[UNUSED_TOKEN_146]user\n{text}[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n{begun}"


def test_an_article_of_an_instruction_and_images(paths: list[Path], tmp_path: Path) -> None:
    """The images are shown, and each is chosen once; of the last one nothing is asked."""
    module = Said2([ARTICLE, "<Seg2> <Seg0> <Seg1>", "B", "A"])
    steps = Steps.open(tmp_path / "out" / STEPS, {"title": "Sea"})
    composer = Composer(module, None, words=free_form, images=paths[:2])
    article = composer.compose("Write of the sea.", steps)
    lines = "<Seg0> A day at sea\n<Seg1> The boat leaves.\n<Seg2> A whale comes up.\n"
    assert {name: step["prompt"] for name, step in steps.done.items()} == {
        "article": _turn("<ImageHere> <ImageHere>Write of the sea."),
        "places": _turn(
            f'<ImageHere> <ImageHere> 给定文章"{lines}" 根据上述文章，选择适合插入图像的行', "适合插入图像的行是"
        ),
        "choice 0": _turn(
            "根据给定上下文和候选图像，选择合适的配图：A day at sea\n候选图像包括: A.<ImageHere>\nB.<ImageHere>",
            "最合适的图是",
        ),
    }
    assert [(made.section, made.image) for made in article.illustrations] == [(0, paths[1]), (1, paths[0])]
    decoding = module.asked[0][2]
    assert (decoding.temperature, decoding.top_p, decoding.top_k, decoding.repetition_penalty) == (1.0, 0.8, 40, 1.005)
    write_article(tmp_path / "out", article)
    assert "![](images/1.png)" in (tmp_path / "out/article.md").read_text()


def test_an_article_of_an_instruction_and_an_index(paths: list[Path], tmp_path: Path) -> None:
    module = Said2([ARTICLE, "<Seg2>, <Seg0>", 'A whale beside a boat" and', "The sea", "C", "x"])
    steps = Steps.open(tmp_path / STEPS, {})
    article = Composer(module, Folder(paths), words=free_form).compose("Write of the sea.", steps)
    lines = "<Seg0> A day at sea\n<Seg1> The boat leaves.\n"
    prompts = {name: step["prompt"] for name, step in steps.done.items()}
    assert prompts["caption 0"] == _turn(
        f'给定文章"{lines}" 现在<Seg2>后插入图像对应的标题是"A whale beside a boat"。'
        "给出适合在<Seg0>后插入的图像对应的标题。",
        '标题是"',
    )
    offered = "候选图像包括: A.<ImageHere>\nB.<ImageHere>\nC.<ImageHere>\nD.<ImageHere>"
    head = "根据给定上下文和候选图像，选择合适的配图：A day at sea\n"
    assert prompts["choice 2"] == _turn(
        f"{head}<ImageHere>The boat leaves.\nA whale comes up.\n{offered}", "最合适的图是"
    )
    assert [made.image for made in article.illustrations] == [paths[6], paths[0]]


def test_what_the_command_takes(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Said2([ARTICLE, "<Seg0>", "B"])
    monkeypatch.setattr("vlm.loading.open_system", lambda weights, **options: module)
    command = ["run", "compose", "--title", "Sea", "--weights", "w", "--out", str(tmp_path / "out"), "--device", "cpu"]
    images = ["--images", str(paths[0]), str(paths[1])]
    assert cli.main([*command, *images]) == 0
    assert "3 lines, 1 images" in capsys.readouterr().out
    for wrong, message in (([], "give --index, or --images"), ([*images, "--index", "i"], "and not both")):
        assert cli.main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err
    module.system = "xcomposer"
    assert cli.main([*command, *images]) == 2
    assert "xcomposer is shown no images of one's own" in capsys.readouterr().err
