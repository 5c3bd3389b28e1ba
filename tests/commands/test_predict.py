"""`vlm predict` and the pictures it draws."""

import json
from pathlib import Path
from random import Random

import vlm
import pytest
from PIL import Image, ImageFont

import cli
from tests.checkpoints.test_export import finished
from vlm.demo.scenes import make_scene
from vlm.demo.sprites import WORDS
from vlm.demo.tasks import caption, questions
from vlm.language import Decoding
from vlm.drawing import fonts
from vlm.drawing.fonts import typeset, wrap
from vlm.drawing.annotate import annotate
from vlm.systems import LLaVA15
from vlm.sample import ImageFile, ImagePart, Message, Sample, TextPart

TOKENS = ["--max_new_tokens", "5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("run"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for at in range(5):
        file = folder / ("sub" if at % 2 else "") / f"{at}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60 + 10 * at, 50), (50 * at, 90, 0)).save(file)
    return folder


def ours(run: Path, files: list[Path], prompt: str) -> list[str]:
    samples = [
        Sample(str(f), (Message("user", (ImagePart(), TextPart(prompt))),), (ImageFile(f.name, f),)) for f in files
    ]
    return [vlm.load(run).generate([sample], decoding=Decoding(max_new_tokens=5))[0] for sample in samples]


def test_a_folder_with_bad_pictures(run: Path, pictures: Path, tmp_path: Path, capfd) -> None:
    (pictures / "2.png").write_bytes((pictures / "0.png").read_bytes()[:60])
    (pictures / "a.jpg").write_text("no picture")
    (pictures / "notes.md").write_text("x")
    (pictures / ".DS_Store").write_text("x")
    out, drawn = tmp_path / "out" / "answers.jsonl", tmp_path / "drawn"
    arguments = ["predict", "--weights", str(run), "--image", str(pictures), "--prompt", "What?", *TOKENS]
    assert cli.main([*arguments, "--batch_size", "2", "--out", str(out), "--pictures", str(drawn)]) == 1
    good = [pictures / name for name in ("0.png", "4.png", "sub/1.png", "sub/3.png")]
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["answer"] for line in found] == ours(run, good, "What?")
    assert [line["image"] for line in found] == [line["id"] for line in found] == [str(file) for file in good]
    assert {line["prompt"] for line in found} == {"What?"}
    errors = capfd.readouterr().err
    for name in ("2.png", "a.jpg"):
        assert (
            sum(f"not answered: command line: sample {str(pictures / name)!r}" in x for x in errors.splitlines()) == 1
        )
    assert "2 of 6 questions could not be answered" in errors
    assert "left out 1 files that are no pictures by their names: notes.md" in errors
    assert len(list(drawn.iterdir())) == 4
    assert cli.main([*arguments, "--out", str(out)]) == 2
    assert "exists already; go on with it by --resume" in capfd.readouterr().err


def test_a_start_that_stopped_goes_on(run: Path, pictures: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    out, drawn = tmp_path / "answers.jsonl", tmp_path / "drawn"
    arguments = ["predict", "--weights", str(run), "--image", str(pictures), "--prompt", "What?", *TOKENS]
    arguments += ["--out", str(out), "--pictures", str(drawn), "--batch_size", "1"]
    assert cli.main([*arguments, "--resume"]) == 0
    whole = out.read_bytes()
    first = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(first[:2]) + first[2][:20])  # killed within a line
    generate, asked = LLaVA15.generate, []
    monkeypatch.setattr(LLaVA15, "generate", lambda self, s, **k: asked.extend(s) or generate(self, s, **k))
    assert cli.main([*arguments, "--resume"]) == 0
    assert out.read_bytes() == whole
    assert len(asked) == 3
    assert len(list(drawn.iterdir())) == 5
    assert cli.main([*arguments, "--resume"]) == 0
    assert len(asked) == 3
    assert "all 5 questions are answered already" in capfd.readouterr().out
    arguments[arguments.index("What?")] = "Why?"
    assert cli.main([*arguments, "--resume"]) == 2
    assert "answers 5 questions that are not asked here" in capfd.readouterr().err
    out.write_text("hello\n")
    assert cli.main([*arguments, "--resume"]) == 2
    assert "line 1 is no answer" in capfd.readouterr().err
    out.unlink()
    assert cli.main(arguments) == 2
    assert f"{drawn}: holds something already" in capfd.readouterr().err


def test_a_full_disk_says_how_to_go_on(run: Path, pictures: Path, monkeypatch, capfd) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("Linux has it")
    link = pictures / "answers.jsonl"
    link.symlink_to("/dev/full")
    monkeypatch.setattr("vlm.commands.predict._answered", lambda *_: set())  # it never ends either
    arguments = ["predict", "--weights", str(run), "--image", str(pictures / "0.png"), "--prompt", "What?", *TOKENS]
    assert cli.main([*arguments, "--out", str(link), "--resume"]) == 2
    assert "answers.jsonl: cannot be written (No space left on device); make room" in capfd.readouterr().err


def test_several_pictures_in_one_question(run: Path, pictures: Path, tmp_path: Path, capfd) -> None:
    records = [
        {"image": ["0.png", "2.png"], "prompt": "What differs?"},
        {"images": ["0.png", "2.png"], "prompt": "<image>\n<image>\nWhat differs?"},
        {"image": "0.png", "prompt": "<image> and <image>?"},
        {"image": {"path": "0.png"}, "prompt": "What?"},
        {"image": "0.png", "images": ["0.png"], "prompt": "What?"},
        {"prompt": " "},
    ]
    (tmp_path / "q.json").write_text(json.dumps(records))
    arguments = ["predict", "--weights", str(run), "--questions", str(tmp_path / "q.json"), *TOKENS]
    out = tmp_path / "answers.jsonl"
    command = [*arguments, "--image_root", str(pictures), "--out", str(out), "--pictures", str(tmp_path / "drawn")]
    assert cli.main(command) == 1
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert first["answer"] == second["answer"]
    assert (first["id"], first["image"]) == (0, ["0.png", "2.png"])
    said = capfd.readouterr().err
    for words in (
        "sample '2': 2 image marks in the text but 1 images",
        "sample '3': ",
        "sample '4': has both 'image' and 'images'",
        "sample '5': key 'prompt' must be a text",
    ):
        assert words in said
    assert Image.open(tmp_path / "drawn" / "0.jpg").width > 640  # side by side


def test_a_list_of_questions(run: Path, pictures: Path, tmp_path: Path, capfd) -> None:
    records = [
        {"question_id": 7, "image": "0.png", "text": "What?"},
        {"id": "plain", "prompt": "Hello"},
        {"id": "gone", "image": "x.png", "prompt": "What?"},
        {"image": "../x.png", "prompt": "What?"},
        {"id": "mute", "image": "0.png"},
        {"id": "long", "image": "0.png", "prompt": "what " * 600},
        {"id": 7, "image": "sub/1.png", "prompt": "What?"},
        {"id": "ocr", "image": "0.png", "prompt": "What?", "ocr": "Exit"},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, records)))
    arguments = ["predict", "--weights", str(run), "--questions", str(tmp_path / "q.jsonl"), *TOKENS]
    assert cli.main([*arguments, "--image_root", str(pictures), "--pictures", str(tmp_path / "drawn")]) == 1
    said = capfd.readouterr()
    first, second = ours(run, [pictures / "0.png", pictures / "sub" / "1.png"], "What?")
    lines = said.out.splitlines()
    assert (lines[0], lines[2]) == (f"7: {first}", f"7: {second}")
    assert lines[1].startswith("plain: ")
    for words in (
        "sample 'gone': image 'x.png' does not exist",
        "sample '3': image '../x.png' lies outside the image root",
        "sample 'mute': key 'prompt' must be a text, found None; the record has the keys ['id', 'image'], a",
        "sample 'long': ",
        "sample 'ocr': 'ocr' must be a list of texts, found 'Exit'",
        "5 of 8 questions",
    ):
        assert words in said.err
    assert sorted(file.name for file in (tmp_path / "drawn").iterdir()) == ["7-2.jpg", "7.jpg"]


def test_one_answer_grows_in_the_terminal(run: Path, pictures: Path, monkeypatch, capsys) -> None:
    written: list[str] = []

    class Terminal:
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> None:
            written.append(text)

        def flush(self) -> None: ...

    file = pictures / "0.png"
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Terminal())
        arguments = ["--weights", str(run), "--image", str(file), "--prompt", "What?", *TOKENS]
        assert cli.main(["predict", *arguments]) == 0
    assert "".join(written) == ours(run, [file], "What?")[0] + "\n"
    assert sum(bool(text.strip()) for text in written) > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --prompt"),
        (["--prompt", "x", "--questions", "q"], "give --prompt"),
        (["--questions", "q", "--image", "a"], "names its own pictures"),
        (["--questions", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--prompt", "x", "--image", "."], "holds no pictures"),
        (["--prompt", "x", "--batch_size", "0"], "needs at least 1"),
        (["--questions", "chats.json"], "none of its 2 records is a question"),
        (["--prompt", "x", "--num_beams", "2", "--temperature", "1"], "which needs num_beams: 1"),
        (["--prompt", "x", "--resume"], "--resume goes on with an --out file"),
        (["--prompt", "x", "--image", ".", "--pictures", "drawn"], "lies in ., whose pictures are asked about"),
    ],
)
def test_what_cannot_start_is_said_before_weights_are_read(arguments, words, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chats.json").write_text(json.dumps([{"id": "a", "conversations": []}, {"conversations": []}]))
    assert cli.main(["predict", "--weights", "nowhere", *arguments]) == 2
    assert words in capfd.readouterr().err


def test_texts_stand_under_the_picture() -> None:
    image = Image.new("RGB", (2048, 1024), (0, 0, 255))
    page = annotate([image], prompt="Where is it?", answer="word " * 200, boxes=[(400.0, 400.0, 1200.0, 800.0)])
    assert page.width == 1024
    assert page.height > 512 + 10 * 22
    assert page.getpixel((500, 300)) == (0, 0, 255)
    assert page.getpixel((200, 300)) == (0xE6, 0x19, 0x4B)  # left edge, at half the size
    assert page.getpixel((1023, 600)) == (255, 255, 255)
    assert annotate([Image.new("L", (20, 900))], prompt="x", answer="y").size == (360, 900 + 2 * 12 + 2 * 22 + 8)
    pair = [Image.new("RGB", (400, 300), "red"), Image.new("RGB", (100, 80), "lime")]
    page = annotate(pair, prompt="x", answer="y")
    assert (page.width, page.getpixel((200, 20)), page.getpixel((420, 20))) == (728, (255, 0, 0), (0, 255, 0))
    endless = annotate([image], prompt="x", answer="word " * 100_000)
    assert endless.height < 6000


def test_lines_fit_and_no_character_is_lost() -> None:
    font = ImageFont.load_default(size=16)
    for text in ("some words and a" + "b" * 300 + " end", "\u4e2d" * 100, "a\n\nb", "  two  blanks"):
        lines = list(wrap(text, width=120, font=font))
        assert "".join("".join(lines).split()) == "".join(text.split())
        assert all(font.getlength(line) <= 120 for line in lines)
    assert list(wrap("a\n\nb", width=120, font=font)) == ["a", "", "b"]
    assert typeset("a\n" * 50, size=16, width=100, max_lines=10).lines == ["a"] * 9 + ["... (cut)"]


def test_a_character_without_a_font_is_written_as_its_code(monkeypatch) -> None:
    text = "A cat (\u732b)\u200b\t!"
    monkeypatch.setattr(fonts, "FONTS", ("no-such-font.ttf",))
    assert typeset(text, size=16, width=400, max_lines=9).lines == ["A cat (\\u732b)  !"]
    monkeypatch.undo()
    assert typeset(text, size=16, width=400, max_lines=9).lines == ["A cat (\u732b)  !"]


def test_a_machine_without_fonts_writes_chinese_japanese_and_korean(monkeypatch) -> None:
    monkeypatch.setattr(fonts, "FONTS", fonts.FONTS[-1:])  # the one that comes with the project
    scenes = [make_scene(Random(f"fonts {number}"), split="train", size=96) for number in range(50)]
    told = [
        text for scene in scenes for turn in questions(scene, "zh", Random(0)) for text in (turn.question, turn.answer)
    ]
    written = [caption(scene, "zh") for scene in scenes]
    for text in (
        *told,
        *written,
        *WORDS,
        "\u732b: 'Katze', r\u00e9sum\u00e9",
        "\u8cb7\u3044\u7269\u304b\u3054",
        "\u9577\u57ce",
        "\uc7a5\ubc14\uad6c\ub2c8",
    ):
        assert fonts.font_for(text, size=16)[1] == frozenset(), text
    two = [fonts.font_for(text, size=16)[0].getmask(text) for text in ("\u732b", "\u72d7")]
    assert bytes(two[0]) != bytes(two[1]), "they are not both the sign for a missing character"
