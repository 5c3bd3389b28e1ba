"""The data that InstructBLIP was tuned and asked with: what readers make of their records, and drawn instructions."""

import json
from pathlib import Path
from typing import Any

import pytest
import vlm  # noqa: F401
from PIL import Image

from tests.support.fake_codec import ByteCodec
from vlm.data import (
    AOKVQA,
    OCRVQA,
    CaptionList,
    ChoiceQuestions,
    LabelledImages,
    ScienceQAChoices,
    TextCaps,
    TextVQATokens,
    VideoCaptions,
    VideoQuestions,
    VisualDialog,
    VQAv2Training,
    WithInstructions,
)
from vlm.data.loading.encoder import Encoder
from vlm.data.sources.instructions import SETS
from vlm.data.wrappers.instructed import put_question
from vlm.errors import SampleError, UserError
from vlm.sample import ImagePart, Sample


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def said(sample: Sample) -> tuple[str, str]:
    """What the user says, with `*` for an image, and the answer."""
    asked, told = sample.messages
    parts = ["*" if isinstance(part, ImagePart) else part.text for part in asked.content]
    return "".join(parts), told.content[0].text


A = {
    "question_id": "q1",
    "image_id": 7,
    "question": "Where is it?",
    "choices": ["at sea", "at home"],
    "correct_choice_idx": 0,
    "direct_answers": ["sea", "water", "sea"],
}
CODEC = ByteCodec()
OPTIONS = "Question: {} Options: {options}. Short answer:"


def test_what_the_readers_make_of_their_records(tmp_path: Path) -> None:
    captions = CaptionList(write(tmp_path / "c.json", [{"image": "a.jpg", "caption": " A boat. "}] * 2))
    assert (len(captions), said(captions[1])) == (2, ("*", "A boat."))
    a = write(tmp_path / "a.json", [A])
    assert said(AOKVQA(a)[0]) == ("*\nWhere is it?", "sea")
    assert AOKVQA(a)[0].answers == (("sea", 2.0), ("water", 1.0))
    assert AOKVQA(a)[0].images[0].name == "000000000007.jpg"
    chosen = AOKVQA(a, ask="choice", request=OPTIONS)[0]
    assert said(chosen) == ("*\nQuestion: Where is it? Options: (a) at sea (b) at home. Short answer:", "at sea")
    assert chosen.choices == ("at sea", "at home")
    vqg = "Given the image, generate a question whose answer is: {}. Question:"
    assert said(AOKVQA(a, ask="question", request=vqg)[0]) == (f"*\n{vqg.replace('{}', 'sea')}", "Where is it?")
    questions = write(tmp_path / "q.json", {"questions": [{"question_id": 1, "image_id": 9, "question": "Red?"}]})
    people = {"annotations": [{"question_id": 1, "answers": [{"answer": "yes"}, {"answer": "no"}, {"answer": "yes"}]}]}
    people = write(tmp_path / "p.json", people)
    assert said(VQAv2Training(questions, people, request="", ask="question")[0]) == ("*\nyes", "Red?")
    icon = write(
        tmp_path / "i.json", [{"image": "i.png", "question": "Shape?", "choices": ["ball", "box"], "answer": 1}]
    )
    assert said(ChoiceQuestions(icon, request=OPTIONS)[0])[1] == "box"
    vsr = write(tmp_path / "v.json", [{"image": "v.jpg", "caption": "The cat is left of it.", "label": 1}])
    assert said(LabelledImages(vsr, "vsr", request='Is this true? "{}" Answer:')[0]) == (
        '*\nIs this true? "The cat is left of it." Answer:',
        "true",
    )
    meme = write(tmp_path / "m.json", [{"id": 4, "img": "img/4.png", "text": "hi", "label": 0}])
    memes = LabelledImages(meme, "memes", text_key="text", image_key="img", words=("no", "yes"))
    assert (said(memes[0])[1], memes[0].choices, memes[0].images[0].name) == ("no", ("no", "yes"), "img/4.png")


def test_ocr_tokens_stand_before_the_question(tmp_path: Path) -> None:
    ocr = write(tmp_path / "ocr.json", {"data": [{"image_id": "7", "ocr_tokens": [str(n) for n in range(40)]}]})
    tokens = ", ".join(str(n) for n in range(30))
    caps = write(tmp_path / "caps.json", {"data": [{"image_id": "7", "caption_str": "A sign."}] * 2})
    assert said(TextCaps(caps, ocr)[1]) == (f"*\nOCR tokens: {tokens}. ", "A sign.")
    assert said(put_question(WithInstructions(TextCaps(caps, ocr), ["A photo of"])[0], 1))[0] == (
        f"*\nOCR tokens: {tokens}. A photo of"
    )
    asked = {"data": [{"question_id": 3, "image_id": "7", "question": "What?", "answers": ["stop", "go", "go"]}]}
    vqa = TextVQATokens(write(tmp_path / "t.json", asked), ocr, request="Question: {} Short answer:")
    assert said(vqa[0]) == (f"*\nOCR tokens: {tokens}. Question: What? Short answer:", "go")
    missing = write(tmp_path / "x.json", {"data": [{"image_id": "8", "caption_str": "A sign."}]})
    with pytest.raises(UserError, match="'8' of entry 0 is not in"):
        len(TextCaps(missing, ocr))
    book = {"imageURL": "http://x/a.gif", "questions": ["Who?", "When?"], "answers": ["Ann", "1990"], "split": 1}
    books = OCRVQA(write(tmp_path / "b.json", {"07": book, "08": book | {"split": 3}}))
    assert [said(sample) for sample in (books[0], books[1])] == [("*\nWho?", "Ann"), ("*\nWhen?", "1990")]
    assert (len(books), books[1].id, books[1].images[0].name) == (2, "07/1", "07.jpg")


def test_frames_are_taken_evenly(tmp_path: Path) -> None:
    for number in range(1, 11):
        (tmp_path / "frames" / "video7").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "frames" / "video7" / f"{number:05}.png")
    record = {"video": "video7.mp4", "question": "Who?", "answer": "man", "question_id": 5}
    file = write(tmp_path / "qa.json", [record, record | {"video": "video8.mp4"}])
    source = VideoQuestions(file, tmp_path / "frames", request="Question: {} Short Answer:")
    assert said(source[0]) == ("****\nQuestion: Who? Short Answer:", "man")
    assert [image.name[-9:] for image in source[0].images] == ["00001.png", "00003.png", "00006.png", "00008.png"]
    with pytest.raises(SampleError, match=r"no frames of video 'video8.mp4' in .*frames/video8"):
        source[1]
    listed = [{"clip_name": "video7", "caption": "A man."}, {"clip_name": "video7", "caption": ["A man.", "Sings."]}]
    for number, last in ((4, "00007.png"), (12, "00001.png")):  # BLIP: every (10 / 4 =) 2nd; a short video stands still
        clips = VideoCaptions(write(tmp_path / "c.json", listed), tmp_path / "frames", number, whole_steps=True)
        assert [image.name[-9:] for image in clips[0].images][-1] == last
        assert len(clips[0].images) == number
    assert (clips[0].id, clips[0].answers) == ("video7", (("A man.", 1.0),))
    assert clips[1].answers == (("A man.", 1.0), ("Sings.", 1.0))


def test_visual_dialog_tells_what_was_said(tmp_path: Path) -> None:
    turns = [{"question": 0, "answer": 1, "answer_options": [0, 1], "gt_index": 1}]
    turns.append({"question": 1, "answer": 0, "answer_options": [1, 0, 2], "gt_index": 1})
    data = {"questions": ["is it day", "who"], "answers": ["a man", "yes", "no"]}
    dialog = {"image_id": 7, "caption": "a boat", "dialog": turns}

    def opened(**changes: Any) -> VisualDialog:
        content = {"data": data | {"dialogs": [dialog | changes]}}
        return VisualDialog(write(tmp_path / "d.json", content), request="Question: {} Short answer:")

    first, second = opened()
    caption = 'This image has the caption "a boat".'
    assert said(first) == (f"*\n{caption} Question: is it day Short answer:", "yes")
    told = "dialog history: q: is it day a: yes\nQuestion: who Short answer:"
    assert said(second) == (f"*\n{caption} {told}", "a man")
    assert (second.id, second.choices, second.answers) == ("7-1", ("yes", "a man", "no"), (("a man", 1.0),))
    assert second.images[0].name == "VisualDialog_val2018_000000000007.jpg"
    with pytest.raises(SampleError, match=r"'gt_index' 2 is none of its 2 'answer_options'"):
        opened(dialog=[turns[0] | {"gt_index": 2}])[0]
    with pytest.raises(SampleError, match=r"d\.json: sample 'dialog 0': number 9 names none of the 3 texts"):
        opened(dialog=[turns[0] | {"answer": 9}])[0]


def test_science_qa_asks_for_the_text_of_a_choice(tmp_path: Path) -> None:
    problem = {"question": "Which is solid?", "choices": ["air", "a ball"], "answer": 1, "split": "train", "hint": ""}
    write(tmp_path / "problems.json", {"1": problem | {"image": None}, "2": problem | {"image": "image.png"}})
    write(tmp_path / "pid_splits.json", {"train": ["1", "2"]})
    source = ScienceQAChoices(tmp_path, "train")
    assert [sample.id for sample in source] == ["2"]
    question = "Context: N/A Question: Which is solid? Options: (a) air (b) a ball. Answer:"
    assert said(source[0]) == (f"*\n{question}", "a ball")
    assert source[0].answers == (("a ball", 1.0),)


def test_an_instruction_is_drawn_each_time(tmp_path: Path) -> None:
    assert {name: len(texts) for name, texts in SETS.items()} == {"caption": 13, "vqa": 10, "vqg": 6, "choice": 3}
    a = write(tmp_path / "a.json", [A])
    source = WithInstructions(AOKVQA(a), "vqa", fixed=4)
    encoder = Encoder(source, CODEC)
    put = [said(encoder(0, epoch=epoch).sample)[0] for epoch in range(200)]
    assert {text.removeprefix("*\n") for text in put} == {form.replace("{}", "Where is it?") for form in SETS["vqa"]}
    assert put == [said(encoder(0, epoch=epoch).sample)[0] for epoch in range(200)]
    fixed = Encoder(source, CODEC, training=False)(0, epoch=0).sample
    assert said(fixed)[0] == "*\nQuestion: Where is it? Short answer:"
    with pytest.raises(SampleError, match="has no 'choices'"):
        put_question(WithInstructions(AOKVQA(a), "choice")[0], 0)
    with pytest.raises(UserError, match="no set 'vqq'; use one of caption, vqa"):
        WithInstructions(AOKVQA(a), "vqq")
