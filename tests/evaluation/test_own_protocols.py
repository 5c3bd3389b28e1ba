"""Protocols of single systems, from their own files: each asks as its authors' code does."""
# ruff: noqa: F401, F811

import vlm

import importlib
import inspect
import json
from pathlib import Path

import pytest
import yaml

import cli
import vlm.data
from tests.data.test_benchmarks import TEN, _picture, _write, root, weights
from vlm.errors import SampleError
from vlm.geometry import Placement, View
from vlm.language import Decoding
from vlm.prompts import ImageMark, TextSpan, get_template
from vlm.prompts.regions import write_regions

CONFIGS = Path(__file__).parents[2] / "configs/eval"
OPTIONS = "A. a ball\nB. air"
SEED = "A. One\nB. Two\nC. Three\nD. Four"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
SHORT = {"max_new_tokens": 10, "min_new_tokens": 1}
LONG = {"max_new_tokens": 100, "min_new_tokens": 1}
BOX = {"max_new_tokens": 28, "min_new_tokens": 10}
CAPTION = {"max_new_tokens": 30, "min_new_tokens": 8, "length_penalty": 0.0}
DOG = "<img>PATH</img><ref>dog of {}</ref><box>"
ASKED = "Answer the following VQAv2 question based on the image: {}\n<0x04>"
BENCH = (
    " <|User|>:PATHPlease answer this question by choosing the correct choice.Context: Look at the ground.\n"
    'Question: What is it?\nOptions: A. a ball\nB. a "big" box\n'
    "<TOKENS_UNUSED_0> <|Bot|>: Answer: The answer is"
)
FIVE = {"max_new_tokens": 5, "num_beams": 5, "repetition_penalty": 1.5}
PPL = " <|User|>:PATHContext: N/A\nQuestion: {}\nOptions: []\n{}\n<TOKENS_UNUSED_0> <|Bot|>: Answer: The answer is"
CHAT = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)
DETAIL = "Describe this image in detail."
# InternLM-XComposer2: the image stands before the user's turn
ROW = "PATH[UNUSED_TOKEN_146]user\nQuestion: {}\nContext: {}\nOptions: {}[UNUSED_TOKEN_145]\n"
ROW += "[UNUSED_TOKEN_146]assistant\nThe answer is"
WORD = "PATH[UNUSED_TOKEN_146]user\nAnswer the question using a single word or phrase.{}[UNUSED_TOKEN_145]\n"
WORD += "[UNUSED_TOKEN_146]assistant\n"
BARE = WORD.replace("Answer the question using a single word or phrase.", "")
MMBENCH_ROW = ROW.format("What is it?", "Look at the ground.", 'A. a ball B. a "big" box')
# name: decoding, and of each source the first prompt
PROTOCOLS = {
    "cogvlm/tdiuc": ({"max_new_tokens": 30}, "PATHQuestion: Is it red? Short answer:"),
    "cogvlm/visual7w": (
        {"max_new_tokens": 64}, "PATHWhich one barks? Candidates: "
        "[[150,000,650,500;000,000,500,500;050,000,550,500;100,000,600,500]]"
    ),
    "fuyu/vqav2": (SHORT, f"PATH<s>{ASKED.format('What is it?')}"),
    "fuyu/okvqa": (SHORT, f"PATH<s>{ASKED.format('Why 0?')}"),
    "fuyu/ai2d": (SHORT, f"PATH<s>{ASKED.format('What eats algae?')}"),
    "fuyu/coco_captions": ({"max_new_tokens": 30}, "PATH<s>Generate a coco-style caption.\n<0x04>"),
    "minigpt4/coco_captions": (
        {"max_new_tokens": 200, "num_beams": 5}, f"{CHAT}###Human: <Img>PATH</Img> {DETAIL}###Assistant: "
    ),
    "qwen_vl/vqav2": (SHORT, "<img>PATH</img>What is it? Answer:"),
    "qwen_vl/okvqa": (SHORT, "<img>PATH</img>Why 0? Answer:"),
    "qwen_vl/textvqa": (SHORT, "<img>PATH</img>what brand is it? Answer:"),
    "qwen_vl/vizwiz": (SHORT, "<img>PATH</img>What? Answer:"),
    "qwen_vl/gqa": (SHORT, "<img>PATH</img>Is it red? Answer:"),
    "qwen_vl/ai2d": (SHORT, "<img>PATH</img>What eats algae? Answer:"),
    "qwen_vl/docvqa": (LONG, "<img>PATH</img>Who signed? Answer:"),
    "qwen_vl/chartqa": (LONG, "<img>PATH</img>How much? Answer:", "<img>PATH</img>Which is the tallest? Answer:"),
    "qwen_vl/ocr_vqa": (LONG, "<img>PATH</img>Who wrote this? Answer:"),
    "qwen_vl/flickr30k": (CAPTION, "<img>PATH</img>Describe the image in English:"),
    "qwen_vl/nocaps": (CAPTION, "<img>PATH</img>Describe the image in English:"),
    "qwen_vl/refcoco": (BOX, *(DOG.format(split) for split in ("val", "testA", "testB"))),
    "qwen_vl/refcoco_plus": (BOX, *(DOG.format(split) for split in ("val", "testA", "testB"))),
    "qwen_vl/refcocog": (BOX, *(DOG.format(split) for split in ("val", "test"))),
    "qwen_vl/science_qa": (
        {"options": " {}"}, f"<img>PATH</img>Context: N/A\nQuestion: Which is solid?\nOptions: {OPTIONS}\nAnswer:"
    ),
    "qwen_vl/seed_bench": ({"options": " {}"}, f"<img>PATH</img>\nQuestion: How many?\nOptions: {SEED}\nAnswer:"),
    "qwen_vl/mme": (
        {"max_new_tokens": 512, "temperature": 1.0, "top_p": 0.01},
        f"{SYSTEM}<|im_start|>user\n<img>PATH</img>\nIs the word \"A\"? Please answer yes or no.<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "xcomposer/mmbench": (FIVE, BENCH),
    "xcomposer/mmbench_cn": (FIVE, BENCH),
    "xcomposer/ccbench": (FIVE, BENCH),
    "xcomposer/seed_bench": ({"options": "{}."}, PPL.format("How many?", SEED)),
    "xcomposer/q_bench": ({"options": "{}."}, PPL.format("How sharp is it?", "A. Sharp\nB. Blurry")),
    "xcomposer/mme": (
        {"max_new_tokens": 200, "num_beams": 5, "repetition_penalty": 1.5},
        " <|User|>:PATH Is the word \"A\"? Please answer yes or no. Answer this question briefly"
        "<TOKENS_UNUSED_0> <|Bot|>:",
    ),
    "xcomposer2/mmbench": ({"max_new_tokens": 5, "num_beams": 5}, MMBENCH_ROW),
    "xcomposer2/mmbench_cn": ({"max_new_tokens": 5, "num_beams": 5}, MMBENCH_ROW),
    "xcomposer2/ccbench": ({"max_new_tokens": 5, "num_beams": 5}, MMBENCH_ROW),
    "xcomposer2/seed_bench": (
        {"max_new_tokens": 5, "num_beams": 5}, ROW.format("How many?", "N/A", SEED.replace("\n", " "))
    ),
    "xcomposer2/q_bench": (
        {"max_new_tokens": 500, "num_beams": 3}, ROW.format("How sharp is it?", "N/A", "A. Sharp B. Blurry ")
    ),
    "xcomposer2/pope": ({"max_new_tokens": 500, "num_beams": 3}, WORD.format("Is there a snowboard in the image?")),
    "xcomposer2/chartqa": (
        {"max_new_tokens": 500, "num_beams": 3}, WORD.format("How much?"), WORD.format("Which is the tallest?")
    ),
    "xcomposer2/hallusion_bench": (
        {"max_new_tokens": 10, "num_beams": 3}, WORD.format("Is China red?")
    ),
    "xcomposer2/mmmu": (
        {"max_new_tokens": 5, "num_beams": 5}, ROW.format("What is <image 1>?", "N/A", "A. a $5 note B. <image 2>")
    ),
    "xcomposer2/math_vista": (
        {"max_new_tokens": 500, "num_beams": 3},
        BARE.format(
            "Hint: Please answer the question requiring a floating-point number with one decimal place and provide the "
            "final value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: How tall is it? (Unit: cm)"
        ),
    ),
    "xcomposer2/mme": ({"max_new_tokens": 500, "num_beams": 3}, WORD.format('Is the word "A"?')),
}  # fmt: skip
CHART = {"imgname": "1.png", "label": "7"}
BOXES = {"image": "val2014/a.jpg", "bbox": [10.5, 0, 20, 7], "width": 20, "height": 14}


@pytest.fixture
def files(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    picture = _picture()
    names = [(n, s) for n in ("refcoco", "refcoco+") for s in ("val", "testA", "testB")]
    names += [("refcocog", "val"), ("refcocog", "test")]
    _write(root, **{
        "data/eval/ai2diagram/test.jsonl": [
            {"image": "0.png", "question": "What eats algae?", "question_id": "0.png", "answer": "fish"}],
        "data/eval/ai2diagram/images/0.png": picture,
        "data/eval/docvqa/val/val_v1.0.json": {"data": [
            {"questionId": 5, "question": "Who signed?", "image": "documents/a.png", "answers": ["Ann", "ann"]}]},
        "data/eval/docvqa/val/documents/a.png": picture,
        "data/eval/chartqa/test/test_human.json": [CHART | {"query": "How much?"}],
        "data/eval/chartqa/test/test_augmented.json": [CHART | {"query": "Which is the tallest?"}],
        "data/eval/chartqa/test/png/1.png": picture,
        "data/eval/ocrvqa/ocrvqa_test.jsonl": [
            {"image": "1.jpg", "question": "Who wrote this?", "question_id": 1, "answer": ["Ann", "A. Ann"]}],
        "data/eval/ocrvqa/images/1.jpg": picture,
        "data/eval/flickr30k/dataset_flickr30k.json": {"images": [
            {"imgid": n, "filename": f"{n}.jpg", "split": "test" if n else "train",
             "sentences": [{"raw": "A boat . "}, {"raw": "Boats ."}]} for n in range(2)]},
        "data/eval/flickr30k/images/1.jpg": picture,
        "data/eval/coco/dataset_coco.json": {"images": [
            {"imgid": 1, "filename": "a.jpg", "split": "test", "sentences": [{"raw": "A boat ."}]}]},
        "data/eval/nocaps/nocaps_val_4500_captions.json": {
            "images": [{"id": 0, "file_name": "a.jpg", "domain": "near-domain"}],
            "annotations": [{"image_id": 0, "id": n, "caption": f"A boat {n}."} for n in range(3)]},
        "data/eval/nocaps/images/a.jpg": picture,
        **{f"data/eval/{n}/{n}_{s}.jsonl": [BOXES | {"sent": f"dog of {s}"}] for n, s in names},
        "data/eval/coco/val2014/a.jpg": picture,
        "data/eval/tdiuc/OpenEnded_mscoco_val2014_questions.json": {
            "questions": [{"question_id": 3, "image_id": 42, "question": "Is it red?"}]},
        "data/eval/tdiuc/mscoco_val2014_annotations.json": {"annotations": [
            {"question_id": 3, "question_type": "color", "answers": [{"answer": "yes", "answer_id": 1}]}]},
        "data/eval/tdiuc/val2014/COCO_val2014_000000000042.jpg": picture,
        "data/eval/visual7w/dataset_v7w_pointing.json": {
            "boxes": [{"box_id": n, "x": n, "y": 0, "width": 10, "height": 7, "name": "dog"} for n in range(4)],
            "images": [{"filename": "a.jpg", "split": "test", "qa_pairs": [
                {"qa_id": 9, "question": "Which one barks?", "answer": 2, "multiple_choices": [0, 1, 3]}]}]},
        "data/eval/visual7w/images/a.jpg": picture,
        "data/eval/q_bench/llvisionqa_dev.json": [
            {"img_path": "a.jpg", "question": "How sharp is it?", "candidates": ["Sharp", "Blurry"],
             "correct_ans": "Blurry", "type": 0, "concern": 1}],
        "data/eval/q_bench/images/a.jpg": picture,
        "data/eval/ccbench/CCBench_legacy.tsv": (root / "data/eval/mmbench/mmbench_dev_20230712.tsv").read_text(),
    })  # fmt: skip
    monkeypatch.chdir(root)
    return root


def sources(config: dict) -> list:
    entries = config["data"]["init_args"]["test_sources"]
    return [getattr(vlm.data, e["class_path"].removeprefix("vlm.data."))(**e["init_args"]) for e in entries]


_FREE = {"max_new_tokens": 10, "min_new_tokens": 1, "num_beams": 5, "length_penalty": -1.0}
_LAVIS = _FREE | {"repetition_penalty": 1.5}
_TOLD = {"max_new_tokens": 80, "min_new_tokens": 10, "num_beams": 5}
_TOLD_LAVIS = _TOLD | {"length_penalty": 1.0, "repetition_penalty": 1.5}
STEP = 'What steps do I need to take to "{task}"? Previous steps: {previous}(with grounding)'
BROKEN = "Answer the question using a single word or phrase." + 26 * " " + "{}"
_CHOSEN = {"options": "{choice}", "weighed": "sum"}
# where samples are no conversations, or benchmarks lie in files of their own: decoding and the question
OTHERS: dict[str, tuple[dict | None, str]] = {
    "blip/coco_captions": ({"max_new_tokens": 16, "min_new_tokens": 1, "num_beams": 3}, ""),
    "blip/nocaps": ({"max_new_tokens": 16, "min_new_tokens": 1, "num_beams": 3, "repetition_penalty": 1.1}, ""),
    "blip/msrvtt_qa": ({"candidates_file": "data/eval/msrvtt_qa/answers.json"}, ""),
    "blip/msrvtt_retrieval": (None, ""),
    "blip/msvd_qa": ({"candidates_file": "data/eval/msvd_qa/answers.json"}, ""),
    "blip/vqav2": ({"candidates_file": "data/blip/answer_list.json"}, ""),
    "blip/vqav2_test_dev": ({"candidates_file": "data/blip/answer_list.json"}, ""),
    "blip/nlvr2": (None, ""),
    "blip/retrieval_coco": (None, ""),
    "blip/retrieval_flickr": (None, ""),
    "cogvlm/coco_captions": ({"max_new_tokens": 64}, ""),
    "cogvlm/flickr30k": ({"max_new_tokens": 64}, ""),
    "cogvlm/nocaps": ({"max_new_tokens": 64}, ""),
    "cogvlm/ocr_vqa": ({"max_new_tokens": 100}, "{}"),
    "cogvlm/okvqa": ({"max_new_tokens": 30}, "{}"),
    "cogvlm/refcoco": ({"max_new_tokens": 64}, "Where is {}? answer in [[x0,y0,x1,y1]] format."),
    "cogvlm/refcoco_plus": ({"max_new_tokens": 64}, "Where is {}? answer in [[x0,y0,x1,y1]] format."),
    "cogvlm/refcocog": ({"max_new_tokens": 64}, "Where is {}? answer in [[x0,y0,x1,y1]] format."),
    "cogvlm/textvqa": ({"max_new_tokens": 30}, "{}"),
    "cogvlm/vqav2": ({"max_new_tokens": 30}, "{}"),
    "blip2/retrieval_coco": (None, ""),
    "blip2/retrieval_flickr": (None, ""),
    "blip2/vqav2": (_FREE, "Question: {} Answer:"),
    "blip2/gqa": (_FREE, "Question: {} Answer:"),
    "blip2/okvqa": (_FREE, "Question: {} Answer:"),
    "blip2/vqav2_flan_t5": (_FREE, "Question: {} Short answer:"),
    "blip2/gqa_flan_t5": (_FREE, "Question: {} Short answer:"),
    "blip2/okvqa_flan_t5": (_FREE, "Question: {} Short answer:"),
    "blip2/nocaps": (_TOLD, "a photo of"),
    "blip2/flickr30k": (_TOLD, "a photo of"),
    **{
        f"cogagent/{name}": ({"max_new_tokens": 30}, "{}")
        for name in ("chartqa", "docvqa", "infovqa", "ocr_vqa", "okvqa", "pope", "st_vqa", "textvqa", "vqav2")
    },
    "cogagent/mm_vet": ({"max_new_tokens": 1024}, ""),
    "cogagent/aitw": ({"max_new_tokens": 512}, STEP),
    "cogagent/mind2web": ({"max_new_tokens": 512}, STEP),
    "cogagent/screen_spot": ({"max_new_tokens": 512}, 'What steps do I need to take to "{}"?(with grounding)'),
    "instructblip/aokvqa": (_LAVIS, "Question: {} Short Answer:"),
    "instructblip/aokvqa_choice": (_CHOSEN, "Question: {} Options: {options}. Short answer:"),
    "instructblip/coco_captions": (_TOLD_LAVIS, "A short image caption."),
    "instructblip/flickr30k": (_TOLD_LAVIS, "A short image caption."),
    "instructblip/nocaps": (_TOLD_LAVIS, "A short image caption."),
    "instructblip/gqa": (_LAVIS, "Question: {} Short answer:"),
    "instructblip/hateful_memes": (_CHOSEN, 'This is an image with: "{}" written on it. Is it hateful? Answer:'),
    "instructblip/icon_qa": (_CHOSEN, "Question: {} Options: {options}. Short answer:"),
    "instructblip/ivqa": (_LAVIS, "Question: {} Short Answer:"),
    "instructblip/msrvtt_qa": (_LAVIS, "Question: {} Short Answer:"),
    "instructblip/msvd_qa": (_LAVIS | {"max_new_tokens": 30}, "Question: {} Short Answer:"),
    "instructblip/msvd_qa_ranked": (
        {"candidates_file": "data/eval/msvd/train_ans2label.json", "weighed": "sum"}, "Question: {} Short Answer:"
    ),
    "instructblip/ocr_vqa": (_LAVIS, "Question: {} Short answer:"),
    "instructblip/okvqa": (_LAVIS, "Question: {} Short Answer:"),
    "instructblip/science_qa": (_CHOSEN, "Context: {hint} Question: {} Options: {options}. Answer:"),
    "instructblip/textvqa": (_LAVIS, "Question: {} Short answer:"),
    "instructblip/visual_dialog": (_CHOSEN, "Question: {} Short answer:"),
    "instructblip/vizwiz": (_LAVIS, "Question: {} Short answer:"),
    "instructblip/vqav2": (_LAVIS, "Question: {} Short Answer:"),
    "xcomposer2/mm_vet": ({"max_new_tokens": 500, "num_beams": 3}, "{}Answer this question in detail."),
    "xcomposer2/llava_bench_wild": ({"max_new_tokens": 500, "num_beams": 3}, "{}Answer this question in detail."),
    **{
        f"xcomposer2_4khd/{name}": ({"max_new_tokens": 100, "num_beams": 3}, BROKEN)
        for name in ("chartqa", "docvqa", "infovqa", "ocr_bench", "textvqa")
    },
    **{
        f"xcomposer2_4khd/{name}": ({"max_new_tokens": 5, "num_beams": 5}, "")
        for name in ("ai2d", "mmbench", "mmbench_cn", "mmstar", "seed_bench")
    },
    "xcomposer2_4khd/q_bench": ({"max_new_tokens": 500, "num_beams": 3}, ""),
    "xcomposer2_4khd/mme": ({"max_new_tokens": 500, "num_beams": 5}, "{} Answer this question briefly"),
    "xcomposer2_4khd/hallusion_bench": (
        {"max_new_tokens": 10, "num_beams": 3},
        "Answer the question using a single word or phrase.{}" + 15 * " ",
    ),
    "xcomposer2_4khd/math_vista": ({"max_new_tokens": 100, "num_beams": 3}, ""),
    "xcomposer2_4khd/mmmu": (
        {"max_new_tokens": 5, "num_beams": 5},
        "Answer the question using a single word or phrase.{}",
    ),
    "xcomposer2_4khd/mm_vet": ({"max_new_tokens": 500, "num_beams": 3}, "{}Answer this question in detail."),
    "instructblip/vsr": (_CHOSEN, 'Based on the image, is this statement true or false? "{}" Answer:'),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_decoding_and_questions_are_the_published_ones(name: str) -> None:
    """And every class takes the arguments that it is given."""
    decoding, question = OTHERS[name]
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert config["evaluation"].get("decoding") == decoding
    entries = config["data"]["init_args"]["test_sources"]
    for entry in entries:
        given = entry["init_args"]
        assert (given.get("request") or given.get("prompt") or "") == question
        inspect.signature(getattr(vlm.data, entry["class_path"].removeprefix("vlm.data."))).bind(**given)
    for metric in config["evaluation"]["metrics"].values():
        for one in metric if isinstance(metric, list) else [metric]:
            path, arguments = (one, {}) if isinstance(one, str) else (one["class_path"], one.get("init_args", {}))
            module, _, kind = path.rpartition(".")
            getattr(importlib.import_module(module), kind)(**arguments)
    Decoding(**{key: value for key, value in (decoding or {}).items() if key != "candidates_file"})


def test_every_protocol_stands_here() -> None:
    found = sorted(f"{path.parent.name}/{path.stem}" for path in CONFIGS.glob("*/*.yaml"))
    assert found == sorted([*PROTOCOLS, *OTHERS])
    text = (CONFIGS.parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")
    assert [name for name in PROTOCOLS if f"| `{name}` |" not in text] == []
    told = {name: (f"`{name}`", f"`{name.partition('/')[2]}`") for name in OTHERS}
    assert [name for name, forms in told.items() if not any(form in text for form in forms)] == []


@pytest.mark.parametrize("name", PROTOCOLS)
def test_prompts_and_decoding_are_the_published_ones(name: str, files: Path) -> None:
    decoding, *prompts = PROTOCOLS[name]
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert config["evaluation"]["decoding"] == decoding
    template = get_template(config["model"]["init_args"]["template"])
    whole = View(Placement(), (1.0, 1.0))
    samples = [write_regions(source[0], template.regions, view=lambda _: whole) for source in sources(config)]
    assert all(sample.images[0].read(sample).size == (20, 14) for sample in samples)
    written = [template.render(sample.messages, generate=True) for sample in samples]
    assert all(sum(isinstance(span, ImageMark) for span in spans) == 1 for spans in written)
    texts = ["".join(span.text if isinstance(span, TextSpan) else "PATH" for span in spans) for spans in written]
    assert texts == prompts


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_protocol_runs(name: str, files: Path, weights: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["test", "-c", str(CONFIGS / f"{name}.yaml"), "--weights", str(weights)]
    options = ["--data.init_args.num_workers=0", "--trainer.accelerator=cpu"]
    options += ["--evaluation.decoding.max_new_tokens=2", "--evaluation.decoding.min_new_tokens=0"]
    assert cli.main([*command, *options]) == 0, capfd.readouterr().err
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["evaluation"]
    folder = weights / "2_finetune/evaluation" / config["name"]
    scores = json.loads((folder / "scores.json").read_text())
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert sum(scores["counts"][task] for task in config["metrics"]) == len(answers) > 0
    if "options" in PROTOCOLS[name][0]:
        assert {answer["answer"] for answer in answers} <= set("ABCD")


def test_a_protocol_brings_its_template(
    files: Path,
    weights: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    text = (CONFIGS / "qwen_vl/gqa.yaml").read_text().replace("template: qwen_vl", "template: qwen_xl")
    (tmp_path / "a.yaml").write_text(text)
    assert cli.main(["test", "-c", str(tmp_path / "a.yaml"), "--weights", str(weights)]) == 2
    assert "unknown template 'qwen_xl'" in capfd.readouterr().err


def test_references_are_shares_that_are_not_rounded(files: Path, tmp_path: Path) -> None:
    [source, *_] = sources(yaml.safe_load((CONFIGS / "qwen_vl/refcoco.yaml").read_text()))
    assert source[0].answers == (("[0.525000000, 0.000000000, 1.000000000, 0.500000000]", 1.0),)
    _write(tmp_path, **{"a.jsonl": [BOXES | {"sent": "a", "bbox": [5, 0, 5, 7]}]})
    with pytest.raises(SampleError, match=r"'bbox' .* must be left, top, right, bottom"):
        vlm.data.QwenReferring(tmp_path / "a.jsonl")[0]


def test_people_are_judged_as_in_vqa(files: Path) -> None:
    [source] = sources(yaml.safe_load((CONFIGS / "qwen_vl/textvqa.yaml").read_text()))
    assert [text for text, _ in source[0].answers] == TEN
