"""ScienceQA's own layout: the published text of a question, what is refused, and the demo's questions."""

import hashlib
import json
from pathlib import Path

import vlm  # noqa: F401
import pytest
from PIL import Image

from vlm.data import ScienceQA
from vlm.demo import main, write_science_qa
from vlm.errors import SampleError, UserError
from vlm.sample import ImagePart, TextPart

PICTURED = {
    "question": "Which is  a solid?",
    "choices": ["a ball", "air", "Question: tea"],
    "answer": 2,
    "hint": " Look\nclosely. ",
    "image": "image.png",
    "lecture": "Solids keep\\ntheir shape.",
    "solution": "Tea flows.",
    "split": "train",
}
TEXT_ONLY = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1, "hint": "", "image": None} | dict.fromkeys(
    ("lecture", "solution"), ""
)


def write(folder: Path, **problems: object) -> Path:
    picture = folder / "images/train/1/image.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3)).save(picture)
    problems = {"1": PICTURED, "20": TEXT_ONLY} | {name.removeprefix("p"): value for name, value in problems.items()}
    (folder / "problems.json").write_text(json.dumps(problems))
    splits = {"train": list(problems), "minitest": ["20"], "empty": [], "lost": ["21"]}
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder


def test_questions_read_as_published(tmp_path: Path) -> None:
    source = ScienceQA(write(tmp_path), "train")
    assert (len(source), source.name, source.image_mask().tolist()) == (2, "science_qa_train", [True, False])
    pictured, text = source[0], source[1]
    assert pictured.messages[0].content == (
        # the published code takes out every "Question: "
        TextPart("Which is a solid?\nContext: Look\nclosely.\nOptions: (A) a ball (B) air (C) tea\n"),
        ImagePart(),
    )
    assert pictured.messages[1].content == (TextPart("Solids keep\ntheir shape. Tea flows. The answer is C."),)
    assert pictured.images[0].read(pictured).size == (4, 3)
    assert (pictured.id, pictured.task, pictured.answers) == ("1", "science_qa", (("C", 1.0),))
    assert pictured.choices == ("a ball", "air", "Question: tea")
    assert text.messages[0].content == (TextPart("2 + 2?\nContext: N/A\nOptions: (A) 3 (B) 4"),)
    # three blanks of which two become one, and "Answer: " takes but one along
    assert text.messages[1].content == (TextPart(" The answer is B."),)
    assert text.images == ()
    short = ScienceQA(tmp_path, "minitest", form="QCM-A")
    assert (len(short), short[0].messages[1].content) == (1, (TextPart("The answer is B."),))
    with pytest.raises(IndexError):
        short[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": ["one"]}, "'choices' must be a list of 2 to 5 texts"),
        ({"choices": "AB"}, "'choices' must be a list"),
        ({"answer": 3}, "'answer' must be the place of one of the 3 'choices'.*, found 3"),
        ({"answer": True}, "'answer' must be the place"),
        ({"hint": 7}, "'hint' must be a text, found 7"),
        ({"image": "../../../secret.png"}, "outside the image root"),
        (None, "expected a JSON object, found NoneType"),
    ],
)
def test_a_bad_question_is_refused_by_file_and_id(tmp_path: Path, changes: dict | None, message: str) -> None:
    source = ScienceQA(write(tmp_path, p7=changes if changes is None else PICTURED | changes), "train")
    assert source[0].id == "1"
    with pytest.raises(SampleError, match=message) as caught:
        source[2]
    assert str(caught.value).startswith(f"{tmp_path}/problems.json: sample '7': ")


def test_a_bad_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    write(tmp_path)
    for split, message in {
        "dev": "no split 'dev'; it has train, minitest",
        "empty": "split 'empty' is empty",
        "lost": "question '21' of split 'lost' is missing",
    }.items():
        with pytest.raises(UserError, match=message):
            len(ScienceQA(tmp_path, split))
    with pytest.raises(UserError, match="unknown form 'QCM-LEPA'"):
        ScienceQA(tmp_path, "train", form="QCM-LEPA")
    (tmp_path / "problems.json").write_text("[")
    with pytest.raises(UserError, match=r"problems\.json: broken JSON"):
        len(ScienceQA(tmp_path, "train"))
    with pytest.raises(UserError, match=r"problems\.json: cannot be read \(No such file"):
        len(ScienceQA(tmp_path / "nowhere", "train"))


def test_the_demo_has_questions_of_this_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"num_train": 40, "num_val": 10, "num_test": 5, "size": 48}
    arguments = [str(tmp_path / "one"), "--format", "science_qa"]
    for name, value in numbers.items():
        arguments += [f"--{name}", str(value)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'one'}: questions: 40 train, 10 val, 5 test\n"
    assert not write_science_qa(tmp_path / "one", **numbers)
    assert write_science_qa(tmp_path / "two", **numbers)
    files = [sorted((tmp_path / name).rglob("*.*")) for name in ("one", "two")]
    digests = [[hashlib.sha256(file.read_bytes()).digest() for file in some] for some in files]
    assert digests[0] == digests[1]
    with pytest.raises(UserError, match="does not hold this data"):
        write_science_qa(tmp_path / "one", **numbers | {"seed": 1})
    for split, num in {"train": 40, "val": 10, "test": 5}.items():
        source = ScienceQA(tmp_path / "one", split)
        samples = [source[index] for index in range(len(source))]
        assert len(samples) == num
        assert 0 < sum(len(sample.images) for sample in samples) < num
        for sample in samples:
            assert len(set(sample.choices)) == len(sample.choices)
            for image in sample.images:
                image.read(sample)
            assert sample.messages[1].content[0].text.endswith(f"The answer is {sample.answers[0][0]}.")
