"""The seven texts of Qwen-VL's second stage, each from a file of its own (appendix B of the paper)."""

import vlm  # noqa: F401

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.prompts.test_qwen_vl_prompts import TOKENIZER
from vlm.data import CocoCaptions, GroundedCaptions, QwenQuestions, ReferringExpressions, TextLines, VQAv2Training
from vlm.geometry import Placement, View
from vlm.prompts import TextSpan, get_template
from vlm.prompts.regions import REGION_FORMS, write_regions

# 1000 x 1000 pixels, so that numbers of the texts are pixels
COCO = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "A boat."}]}
VQA = {"questions": [{"question_id": 1, "image_id": 1, "question": "Is it red?"}]}
ANSWERS = {"annotations": [{"question_id": 1, "answers": [{"answer": "No, both are white"}]}]}
COVER = [{"image": "a.png", "question": "What is the title?", "question_id": 3, "answer": "Asymptotic"}]
BEES = [{
    "image": "a.png", "caption": "Shot of bees here",
    "ref_exps": [[8, 12, 0.661, 0.612, 0.833, 0.812, 1.0], [8, 12, 0.12, 0.555, 0.265, 0.77, 1.0]],
}]  # fmt: skip
EAR = [{"image": "a.png", "bbox": [176, 106, 56, 54], "sentences": ["the ear on a giraffe"]}]
GLOVES = [{"image": "a.png", "bbox": [360, 542, 116, 163], "sentences": ["Yellow ski gloves"]}]
LINES = [{"image": "a.png", "lines": [
    {"text": "It is managed", "quad": [568, 121, 625, 131, 624, 182, 567, 172]},
    {"text": "由他", "quad": [1, 2, 3, 2, 3, 4, 1, 4]},
]}]  # fmt: skip
CAPTION = "Generate the caption in English"
SEVEN = {
    "caption": (CocoCaptions, COCO, {"prompt": f"{CAPTION}:"}, f"<img></img>{CAPTION}:", " A boat."),
    "vqa": (
        VQAv2Training, VQA, {"annotations": "answers.json", "image_pattern": "a.png", "request": "{} Answer:"},
        "<img></img>Is it red? Answer:", " No, both are white",
    ),
    "ocr_vqa": (QwenQuestions, COVER, {"task": "ocr_vqa"}, "<img></img>What is the title? Answer:", " Asymptotic"),
    "caption with grounding": (
        GroundedCaptions, BEES, {"prompt": f"{CAPTION} with grounding:"}, f"<img></img>{CAPTION} with grounding:",
        " Shot of <ref>bees</ref><box>(661,612),(833,812)</box><box>(120,555),(265,770)</box> here",
    ),
    "referring grounding": (
        ReferringExpressions, EAR, {"request": "<ref>{}</ref>"}, "<img></img><ref>the ear on a giraffe</ref>",
        "<box>(176,106),(232,160)</box>",
    ),
    "grounded captioning": (
        ReferringExpressions, GLOVES, {"direction": "refer", "request": "<ref>This</ref>{} is"},
        "<img></img><ref>This</ref><box>(360,542),(476,705)</box> is", " Yellow ski gloves",
    ),
    "ocr": (
        TextLines, LINES, {"prompt": "OCR with grounding:", "between": ""}, "<img></img>OCR with grounding:",
        " <ref>It is managed</ref><quad>(568,121),(625,131),(624,182),(567,172)</quad>"
        "<ref>由他</ref><quad>(1,2),(3,2),(3,4),(1,4)</quad>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVEN)
def test_the_seven_texts_of_the_second_stage(name: str, tmp_path: Path) -> None:
    """Appendix B of the paper: each from its own file, the prompt masked, the answer and its end trained."""
    reader, content, options, prompt, answer = SEVEN[name]
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "answers.json").write_text(json.dumps(ANSWERS))
    Image.new("RGB", (1000, 1000)).save(tmp_path / "a.png")
    options = {key: str(tmp_path / value) if key == "annotations" else value for key, value in options.items()}
    sample = reader(tmp_path / "a.json", image_root=tmp_path, **options)[0]
    written = write_regions(sample, REGION_FORMS["qwen"], view=lambda image: View(Placement(), (448.0, 448.0)))
    template = get_template("qwen_vl")
    spans = template.render(written.messages)
    text = "".join(span.text for span in spans if isinstance(span, TextSpan))
    assert text == prompt + answer + "<|endoftext|>"
    ids, labels = template.tokenize(written.messages, TOKENIZER)
    trained = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    assert TOKENIZER.decode(trained, skip_special=False) == answer + "<|endoftext|>"
    asked, _ = template.tokenize(written.messages, TOKENIZER, generate=True)
    assert asked == ids[: len(ids) - len(trained)]  # a prompt ends where training ends to mask


def test_the_stage_names_the_task_and_the_text_of_every_source() -> None:
    data = yaml.safe_load((Path(__file__).parents[2] / "configs/qwen_vl/2_multitask.yaml").read_text())["data"]
    entries = data["init_args"]["sources"]
    tasks = data["init_args"]["tasks"]
    assert sorted(entry["init_args"]["name"] for entry in entries) == sorted(tasks)
    assert data["init_args"]["batch"] == {"size": 4096, "unit": "rows", "row_tokens": 2048}
    texts = {
        "caption": "caption", "vqa": "ocr_vqa", "grounding": "caption with grounding", "ocr": "ocr",
        "referring": "referring grounding", "captioned": "grounded captioning",
    }  # fmt: skip
    for entry in entries:
        told = entry["init_args"]
        if tasks[told["name"]] == "text":
            continue
        wanted = SEVEN[texts[tasks[told["name"]]]][2]
        for key in ("prompt", "request", "between"):
            assert told.get(key) == wanted.get(key), told
        assert told.get("direction", "ground") == wanted.get("direction", "ground")
