"""Benchmarks, each in its published file layout at its published place, through its own configuration."""
# ruff: noqa: E501  (records of published files stay on a line)

import base64
import io
import json
import shutil
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import vlm  # noqa: F401
import pyarrow
import pytest
import yaml
from PIL import Image
from pyarrow import parquet

import cli
from tests.checkpoints.test_export import finished
from vlm.data import (
    GQA,
    MMMU,
    HallusionBench,
    LlavaQuestions,
    LlavaScienceQA,
    MathVista,
    MMBench,
    MmeFolder,
    MMVet,
    Pope,
    SeedBench,
    TextVQA,
    VizWiz,
    VQAv2,
)
from vlm.data.sources.base import Source
from vlm.errors import SampleError, UserError
from vlm.sample import TextPart
from vlm.evaluation.submissions import (
    LlavaReview,
    MathVistaExtraction,
    MMBenchSheet,
    MMVetGrader,
    VizWizServer,
    VQAServer,
)

CONFIGS = Path(__file__).parents[2] / "configs/eval"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("demo"))
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
HALLUSION = {
    "category": "VS", "subcategory": "map", "visual_input": "2", "set_id": "0", "figure_id": "1", "question_id": "3",
    "question": "Is China red?", "gt_answer": "1", "filename": "./hallusion_bench/VS/map/0_1.png",
}  # fmt: skip
TEN = ["cat"] * 8 + ["dog"] * 2


def _picture() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (20, 14), (200, 30, 30)).save(content, "PNG")
    return content.getvalue()


def _write(root: Path, **files: object) -> None:
    """Bytes, texts, JSON, and with a list of objects in `.jsonl` files a line each."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif name.endswith(".jsonl") or "coco_pope" in name:
            path.write_text("".join(f"{json.dumps(line)}\n" for line in content), encoding="utf-8")  # type: ignore
        else:
            path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every benchmark with one to four questions."""
    root, picture = tmp_path_factory.mktemp("benchmarks"), _picture()
    people = [{"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i, answer in enumerate(TEN)]
    vqa = "data/eval/vqav2/"
    _write(root, **{
        f"{vqa}v2_OpenEnded_mscoco_val2014_questions.json": {
            "data_subtype": "val2014",
            "questions": [{"image_id": 42, "question": "What is it?", "question_id": 42000}],
        },
        f"{vqa}v2_mscoco_val2014_annotations.json": {
            "annotations": [{"question_id": 42000, "image_id": 42, "answers": people, "question_type": "what"}]
        },
        f"{vqa}val2014/COCO_val2014_000000000042.jpg": picture,
        f"{vqa}llava_vqav2_mscoco_test-dev2015.jsonl": [
            {"question_id": 7, "image": "COCO_test2015_7.jpg", "text": f"Why?\n{SHORT}", "category": "default"}
        ],
        f"{vqa}llava_vqav2_mscoco_test2015.jsonl": [
            {"question_id": 6, "image": "COCO_test2015_6.jpg", "text": f"Who?\n{SHORT}", "category": "default"},
            {"question_id": 7, "image": "COCO_test2015_7.jpg", "text": f"Why?\n{SHORT}", "category": "default"},
        ],
        f"{vqa}test2015/COCO_test2015_7.jpg": picture,
        **{f"data/eval/okvqa/OpenEnded_mscoco_{split}2014_questions.json": {
            "questions": [{"image_id": 42, "question": f"Why {n}?", "question_id": n} for n in range(count)],
        } for split, count in (("val", 2), ("train", 5))},
        **{f"data/eval/okvqa/mscoco_{split}2014_annotations.json": {
            "annotations": [{"question_id": n, "image_id": 42, "answers": people} for n in range(5)]
        } for split in ("val", "train")},
        **{f"data/eval/okvqa/{split}2014/COCO_{split}2014_000000000042.jpg": picture for split in ("val", "train")},
        **{f"data/eval/coco_captions/captions_{split}2014.json": {
            "images": [{"id": n, "file_name": "a.jpg"} for n in range(5)],
            "annotations": [{"image_id": n, "caption": f"A boat {n}."} for n in range(5)],
        } for split in ("val", "train")},
        **{f"data/eval/coco_captions/{split}2014/a.jpg": picture for split in ("val", "train")},
        "data/eval/textvqa/TextVQA_0.5.1_train.json": {
            "data": [{"question_id": n, "image_id": "0054c9", "question": f"what {n}?", "answers": TEN} for n in range(4)]
        },
        "data/eval/gqa/data/testdev_balanced_questions.json": {
            "201": {"question": "Is it red?", "imageId": "n16", "answer": "yes", "fullAnswer": "Yes, it is."}
        },
        "data/eval/gqa/data/images/n16.jpg": picture,
        "data/eval/vizwiz/val.json": [
            {"image": "VizWiz_val_0.jpg", "question": "What?", "answers": people, "answerable": 1}
        ],
        "data/eval/vizwiz/val/VizWiz_val_0.jpg": picture,
        "data/eval/vizwiz/llava_test.jsonl": [
            {"question_id": 3, "image": "VizWiz_test_3.jpg", "text": f"What?\n{SHORT}", "category": "default"}
        ],
        "data/eval/vizwiz/test/VizWiz_test_3.jpg": picture,
        "data/eval/scienceqa/llava_test_CQM-A.json": [
            {"id": "5", "image": "5/image.png", "conversations": [
                {"from": "human", "value": "<image>\nWhich is solid?\nA. a ball\nB. air"},
                {"from": "gpt", "value": "The answer is A."}]},
            {"id": "6", "conversations": [{"from": "human", "value": "Which?\nA. x\nB. y"}, {"from": "gpt", "value": "A"}]},
        ],
        "data/eval/scienceqa/problems.json": {
            "5": {"choices": ["a ball", "air"], "answer": 0}, "6": {"choices": ["x", "y"], "answer": 1}
        },
        "data/eval/scienceqa/images/test/5/image.png": picture,
        "data/scienceqa/problems.json": {
            "5": {"question": "Which is solid?", "choices": ["a ball", "air"], "answer": 0, "hint": "", "image": "image.png",
                  "lecture": "Solids keep their form.", "solution": "A ball does.", "split": "test"}
        },
        "data/scienceqa/pid_splits.json": {"test": ["5"]},
        "data/scienceqa/images/test/5/image.png": picture,
        "data/eval/textvqa/TextVQA_0.5.1_val.json": {
            "data": [{"question_id": 34602, "image_id": "0054c9", "question": "what brand is it?", "answers": TEN},
                     {"question_id": 34603, "image_id": "0054c9", "question": "What year?", "answers": TEN}]
        },
        "data/eval/textvqa/llava_textvqa_val_v051_ocr.jsonl": [
            {"question_id": "0054c9", "image": "0054c9.jpg",
             "text": f"what brand is it?\nReference OCR token: KODAK, 800\n{SHORT}", "category": "default"},
            {"question_id": "0054c9", "image": "0054c9.jpg", "text": f"Reference OCR token: KODAK\nWhat year?\n{SHORT}"},
        ],
        "data/eval/textvqa/train_images/0054c9.jpg": picture,
        **{f"data/eval/pope/coco/coco_pope_{category}.json": [
            {"question_id": 1, "image": "COCO_val2014_1.jpg", "text": "Is there a snowboard in the image?", "label": "yes"},
            {"question_id": 2, "image": "COCO_val2014_1.jpg", "text": "Is there a car in the image?", "label": "no"},
        ] for category in ("random", "popular", "adversarial")},
        "data/eval/pope/val2014/COCO_val2014_1.jpg": picture,
        "data/eval/MME/MME_Benchmark_release_version/color/images/0001.jpg": picture,
        "data/eval/MME/MME_Benchmark_release_version/color/questions_answers_YN/0001.txt":
            "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n",
        "data/eval/MME/MME_Benchmark_release_version/OCR/0002.png": picture,
        "data/eval/MME/MME_Benchmark_release_version/OCR/0002.txt":
            'Is the word "A"? Please answer yes or no.\tYes\nIs the word "B"? Please answer yes or no.\tNo\n',
        "data/eval/seed_bench/SEED-Bench.json": {
            "question_type": {"Scene Understanding": 1},
            "questions": [
                {"question_id": "101", "question": "How many?", "choice_a": "One", "choice_b": "Two", "choice_c": "Three",
                 "choice_d": "Four", "answer": "B", "data_id": "1454426_2591111986", "data_type": "image",
                 "question_type_id": 1},
                {"question_id": "900", "question": "What next?", "choice_a": "a", "choice_b": "b", "choice_c": "c",
                 "choice_d": "d", "answer": "A", "data_id": "v.mp4", "data_type": "video", "question_type_id": 10},
            ],
        },
        "data/eval/seed_bench/SEED-Bench-image/1454426_2591111986": picture,
        "data/eval/llava-bench-in-the-wild/questions.jsonl": [
            {"question_id": 0, "image": "001.jpg", "category": "conv", "text": "What is its name?"}
        ],
        "data/eval/llava-bench-in-the-wild/images/001.jpg": picture,
        "data/eval/llava-bench-coco/qa90_questions.jsonl": [
            {"question_id": 4, "image": "000000441147.jpg", "category": "detail", "text": "What is the colour?"}
        ],
        "data/eval/llava-bench-coco/val2014/COCO_val2014_000000441147.jpg": picture,
        "data/eval/mm-vet/mm-vet.json": {
            "v1_9": {"imagename": "v1_9.png", "question": "What is x?", "answer": "-1<OR>x = -1", "capability": ["math"]}
        },
        "data/eval/mm-vet/images/v1_9.png": picture,
        "data/eval/math_vista/testmini.json": {
            "1": {"pid": "1", "question": "How tall is it?", "image": "images/1.jpg", "choices": None, "unit": "cm",
                  "precision": 1.0, "answer": "1.2", "question_type": "free_form", "answer_type": "float",
                  "metadata": {"split": "testmini", "skills": ["arithmetic reasoning"]}},
            "2": {"pid": "2", "question": "Which side?", "image": "images/1.jpg", "choices": ["the left", "the right"],
                  "unit": None, "precision": None, "answer": "the left", "question_type": "multi_choice",
                  "answer_type": "text", "metadata": {}},
        },
        "data/eval/math_vista/images/1.jpg": picture,
        "data/eval/hallusion_bench/HallusionBench.json": [
            HALLUSION | {"visual_input": "0", "figure_id": "0", "gt_answer": "0"}, HALLUSION],
        "data/eval/hallusion_bench/hallusion_bench/VS/map/0_1.png": picture,
    })  # fmt: skip
    row = "{}\tWhat is it?\t{}\t{}\t{}\t\tlost\t{}\tattribute\t{}\tdev\n"
    table = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsplit\n"
    table += row.format(
        241, "Look at the ground.", "a ball", '"a ""big"" box"', "A", base64.b64encode(picture).decode()
    )
    table += row.format(1000241, "nan", '"a ""big"" box"', "a ball", "B", "241")
    for name in ("mmbench/mmbench_dev_20230712.tsv", "mmbench_cn/mmbench_dev_cn_20231003.tsv"):
        _write(root, **{f"data/eval/{name}": table})
    subjects = {
        "Accounting": [("What is <image 1>?", "['a $5 note', '<image 2>']", "A", "multiple-choice")],
        "Art": [("Read <image 1>.", "[]", "['24/7', '3.429']", "open"), ("How many?", "[]", "3", "open")],
    }
    for subject, questions in subjects.items():
        (root / f"data/eval/mmmu/{subject}").mkdir(parents=True)
        rows = [
            dict(zip(("question", "options", "answer", "question_type"), question, strict=True))
            | {"id": f"validation_{subject}_{at + 1}", "image_1": {"bytes": picture, "path": None}, "image_2": None}
            for at, question in enumerate(questions)
        ]
        parquet.write_table(
            pyarrow.Table.from_pylist(rows), root / f"data/eval/mmmu/{subject}/validation-00000-of-00001.parquet"
        )
    blind = "\n".join("\t".join(line.split("\t")[:7] + line.split("\t")[8:]) for line in table.splitlines())
    _write(root, **{"data/eval/mmbench/mmbench_test_20230712.tsv": blind})
    return root


def _asked(source: Source) -> list[tuple]:
    """(id, text, answers, choices, group) of each question, whose picture can be read."""
    samples = [source[index] for index in range(len(source))]
    assert [image.read(sample).size for sample in samples for image in sample.images] == [(20, 14)] * len(samples)
    assert list(source.image_mask()) == [True] * len(samples)
    texts = ["".join(p.text for p in s.messages[0].content if isinstance(p, TextPart)) for s in samples]
    assert all(text.startswith("\n") for text in texts), "the picture comes first"
    return [
        (s.id, text[1:], [answer for answer, _ in s.answers], list(s.choices), s.group)
        for s, text in zip(samples, texts, strict=True)
    ]


def test_questions_with_short_answers(root: Path) -> None:
    data = root / "data/eval"
    source: Source = VQAv2(
        data / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        data / "vqav2/v2_mscoco_val2014_annotations.json",
        image_root=data / "vqav2/val2014",
    )
    assert _asked(source) == [("42000", f"What is it?\n{SHORT}", TEN, [], None)]
    source = VQAv2(data / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", image_root=data / "vqav2/val2014")
    assert _asked(source) == [("42000", f"What is it?\n{SHORT}", [], [], None)]
    source = GQA(data / "gqa/data/testdev_balanced_questions.json", image_root=data / "gqa/data/images")
    assert _asked(source) == [("201", f"Is it red?\n{SHORT}", ["yes"], [], None)]
    source = VizWiz(data / "vizwiz/val.json", image_root=data / "vizwiz/val")
    wanted = f"What?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"
    assert _asked(source) == [("VizWiz_val_0.jpg", wanted, TEN, [], None)]
    folder = data / "textvqa"
    source = TextVQA(folder / "TextVQA_0.5.1_val.json", image_root=folder / "train_images")
    assert _asked(source)[0] == ("34602", f"what brand is it?\n{SHORT}", TEN, [], None)
    prompts = folder / "llava_textvqa_val_v051_ocr.jsonl"
    source = TextVQA(folder / "TextVQA_0.5.1_val.json", prompts, image_root=folder / "train_images")
    told = f"what brand is it?\nReference OCR token: KODAK, 800\n{SHORT}"
    before = f"Reference OCR token: KODAK\nWhat year?\n{SHORT}"
    assert _asked(source) == [("34602", told, TEN, [], None), ("34603", before, TEN, [], None)]


def test_yes_and_no(root: Path, tmp_path: Path) -> None:
    asked = _asked(Pope(root / "data/eval/pope/coco", image_root=root / "data/eval/pope/val2014"))
    assert [question[4] for question in asked] == ["random"] * 2 + ["popular"] * 2 + ["adversarial"] * 2
    assert asked[1] == ("random/2", f"Is there a car in the image?\n{SHORT}", ["no"], [], "random")
    asked = _asked(MmeFolder(root / "data/eval/MME/MME_Benchmark_release_version"))
    assert asked[0] == ("OCR/0002/0", f'Is the word "A"?\n{SHORT}', ["yes"], [], "OCR/0002")
    assert asked[3] == ("color/0001/1", f"Is it blue?\n{SHORT}", ["no"], [], "color/0001")
    folder = root / "data/eval/hallusion_bench"
    whole = HallusionBench(folder / "HallusionBench.json")
    assert [(whole[n].group, [a for a, _ in whole[n].answers], bool(whole[n].images)) for n in range(len(whole))] == [
        ("VS/map/0/0/3", ["no"], False), ("VS/map/0/1/3", ["yes"], True),
    ]  # fmt: skip
    assert _asked(HallusionBench(folder / "HallusionBench.json", only_images=True)) == [
        ("VS/map/0/1/3", f"Is China red?\n{SHORT}", ["yes"], [], "VS/map/0/1/3"),
    ]
    _write(tmp_path, **{"broken.json": [HALLUSION | {"gt_answer": "yes"}]})
    with pytest.raises(SampleError, match="sample 'VS/map/0/1/3': 'gt_answer' must be 0 or 1, found 'yes'"):
        HallusionBench(tmp_path / "broken.json")[0]


def test_multiple_choice(root: Path) -> None:
    data = root / "data/eval"
    asked = _asked(MMBench(data / "mmbench/mmbench_dev_20230712.tsv"))
    text = 'Look at the ground.\nWhat is it?\nA. a ball\nB. a "big" box\n'
    turned = 'What is it?\nA. a "big" box\nB. a ball\n'
    assert asked == [
        ("241", f"{text}{LETTER}", ["A"], ["a ball", 'a "big" box'], "241"),
        ("1000241", f"{turned}{LETTER}", ["B"], ['a "big" box', "a ball"], "241"),
    ]
    [(_, chinese, *_), _] = _asked(MMBench(data / "mmbench/mmbench_dev_20230712.tsv", language="cn"))
    assert chinese == f"{text}请直接回答选项字母。"
    [asked_seed] = _asked(SeedBench(data / "seed_bench/SEED-Bench.json", data / "seed_bench/SEED-Bench-image"))
    assert asked_seed == (
        "101", f"How many?\nA. One\nB. Two\nC. Three\nD. Four\n{LETTER}", ["B"], ["One", "Two", "Three", "Four"], "1",
    )  # fmt: skip
    folder = data / "scienceqa"
    arguments = folder / "llava_test_CQM-A.json", folder / "problems.json"
    [asked_science] = _asked(LlavaScienceQA(*arguments, image_root=folder / "images/test"))
    assert asked_science == (
        "5", f"Which is solid?\nA. a ball\nB. air\n{LETTER}", ["A"], ["a ball", "air"], None,
    )  # fmt: skip
    whole = LlavaScienceQA(*arguments, only_images=False, image_root=folder / "images/test")
    assert [bool(whole[index].images) for index in range(len(whole))] == [True, False]


def test_knowledge_and_reasoning(root: Path) -> None:
    data = root / "data/eval"
    first, *others = _asked(MMMU(data / "mmmu"))
    options = "(A) a $5 note\n(B) <image 2>\n\n"
    assert first == (
        "validation_Accounting_1", f"What is <image 1>?\n{options}{LETTER}", ["A"], ["a $5 note", "<image 2>"],
        "Accounting",
    )  # fmt: skip
    assert others == [
        ("validation_Art_1", f"Read <image 1>.\n{SHORT}", ["24/7", "3.429"], [], "Art"),
        ("validation_Art_2", f"How many?\n{SHORT}", ["3"], [], "Art"),
    ]
    tall, side = _asked(MathVista(data / "math_vista/testmini.json"))
    assert tall[1] == (
        "Question: How tall is it? (Unit: cm)\nHint: Please answer the question requiring a floating-point number with "
        "one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4, at the end.\nSolution:"
    )
    assert side[1] == (
        "Question: Which side?\nChoices:\n(A) the left\n(B) the right\nHint: Please answer the question and provide the "
        "correct option letter, e.g., A, B, C, D, at the end.\nSolution:"
    )
    rows = [{"id": "2", "answer": "It is (A)."}]
    written = json.loads(MathVistaExtraction(data / "math_vista/testmini.json").content(rows))
    problems = json.loads((data / "math_vista/testmini.json").read_text())
    assert written == {"2": problems["2"] | {"response": "It is (A)."}}
    with pytest.raises(UserError, match=r"testmini\.json: has no '9'"):
        MathVistaExtraction(data / "math_vista/testmini.json").content([{"id": "9", "answer": ""}])


def test_what_a_judge_scores(root: Path) -> None:
    data = root / "data/eval"
    source = LlavaQuestions(
        data / "llava-bench-coco/qa90_questions.jsonl",
        "llava_bench_coco",
        "COCO_val2014_{}",
        image_root=data / "llava-bench-coco/val2014",
    )
    assert _asked(source) == [("4", "What is the colour?", [], [], "detail")]
    source = MMVet(data / "mm-vet/mm-vet.json", image_root=data / "mm-vet/images")
    assert _asked(source) == [("v1_9", "What is x?", ["-1<OR>x = -1"], [], None)]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vqav2/v2_mscoco_val2014_annotations.json", {"annotations": []}, "sample '42000'.*no annotation in .*annotations"),
        ("vqav2/v2_mscoco_val2014_annotations.json", {"answers": []}, "key 'annotations' must hold a list"),
        ("vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [{"question_id": 42000}]}, "'image_id' is missing"),
        ("gqa/data/testdev_balanced_questions.json", {"201": {"question": " ", "imageId": "n16"}}, "sample '201'.*'question' is empty"),
        ("vizwiz/val.json", "[{", "broken JSON"),
        ("vizwiz/val.json", [{"image": "VizWiz_val_0.jpg", "question": "Q", "answers": "cat"}], "'answers' must be a list"),
        ("textvqa/llava_textvqa_val_v051_ocr.jsonl", [{"question_id": "x", "text": "t"}], "no prompt for 'what brand is it"),
        ("pope/coco/coco_pope_popular.json", [{"question_id": 1, "image": "a", "text": "t", "label": "maybe"}], "popular/1.*yes or no"),
        ("MME/MME_Benchmark_release_version/OCR/0002.txt", "Is it?\n", r"0002\.txt: line 1 must be"),
        ("MME/MME_Benchmark_release_version/OCR/0003.txt", "Is it?\tYes\n", "no picture 0003"),
        ("mmbench/mmbench_dev_20230712.tsv", "index\tquestion\tA\tB\timage\n7\tQ\ta\tb\t!!!!\n", "sample '7'.*no base64"),
        ("seed_bench/SEED-Bench.json", {"questions": []}, "holds no questions"),
        ("seed_bench/SEED-Bench.json", {"questions": [5]}, "sample '0'.*expected a JSON object, found int"),
        ("scienceqa/problems.json", {}, "'5' is missing"),
        ("scienceqa/problems.json", {"5": {"choices": ["x", "y"], "answer": 2}}, "sample '5'.*'answer' must be the place"),
        ("vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
         {"questions": [{"question_id": 1, "image_id": "42", "question": "Q"}]}, "sample '1'.*no file name of '42'"),
        ("gqa/data/testdev_balanced_questions.json", {"201": "Is it?"}, "sample '201'.*expected a JSON object, found str"),
        ("MME/MME_Benchmark_release_version/OCR/0002.txt", b"\xff\tYes\n", r"0002\.txt: cannot be read as UTF-8"),
        ("mmbench/mmbench_dev_20230712.tsv", b"index\tquestion\n7\t\xff\n", "no TSV in UTF-8"),
        ("mmbench/mmbench_dev_20230712.tsv", "index\tquestion\tA\tB\n7\tQ\ta\tb\n", "sample '7'.*'image' is missing"),
        ("mm-vet/mm-vet.json", {"v1_9": {"imagename": "v1_9.png"}}, "sample 'v1_9'.*'question' is missing"),
    ],
)  # fmt: skip
def test_wrong_layouts_end_in_one_line(root: Path, tmp_path: Path, name: str, change: object, message: str) -> None:
    shutil.copytree(root / "data/eval", tmp_path / "eval")
    _write(tmp_path / "eval", **{name: change})
    data = tmp_path / "eval"
    sources: dict[str, Source] = {
        "vqav2": VQAv2(
            data / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
            data / "vqav2/v2_mscoco_val2014_annotations.json",
        ),
        "gqa": GQA(data / "gqa/data/testdev_balanced_questions.json"),
        "vizwiz": VizWiz(data / "vizwiz/val.json"),
        "textvqa": TextVQA(data / "textvqa/TextVQA_0.5.1_val.json", data / "textvqa/llava_textvqa_val_v051_ocr.jsonl"),
        "pope": Pope(data / "pope/coco"),
        "MME": MmeFolder(data / "MME/MME_Benchmark_release_version"),
        "mmbench": MMBench(data / "mmbench/mmbench_dev_20230712.tsv"),
        "seed_bench": SeedBench(data / "seed_bench/SEED-Bench.json"),
        "scienceqa": LlavaScienceQA(data / "scienceqa/llava_test_CQM-A.json", data / "scienceqa/problems.json"),
        "mm-vet": MMVet(data / "mm-vet/mm-vet.json"),
    }
    with pytest.raises((SampleError, UserError), match=message) as caught:
        sources[name.split("/")[0]][0]
    assert "\n" not in str(caught.value)


def test_pictures_that_cannot_be_read_end_in_one_line(root: Path, tmp_path: Path) -> None:
    sample = Pope(root / "data/eval/pope/coco", image_root=tmp_path)[1]
    with pytest.raises(SampleError, match=r"sample 'random/2'.*COCO_val2014_1\.jpg") as caught:
        sample.images[0].read(sample)
    assert "\n" not in str(caught.value)
    whole = (root / "data/eval/mmbench/mmbench_dev_20230712.tsv").read_text()
    picture = whole.splitlines()[1].split("\t")[-2]
    (tmp_path / "cut.tsv").write_text(whole.replace(picture, picture[: len(picture) // 8 * 4]))
    sample = MMBench(tmp_path / "cut.tsv")[1]  # the rotation that has its picture in another row
    with pytest.raises(SampleError, match=r"sample '1000241'.*image of 1000241") as caught:
        sample.images[0].read(sample)
    assert "\n" not in str(caught.value)
    (tmp_path / "cut.tsv").write_text(whole.replace(picture, picture[:97]))
    with pytest.raises(SampleError, match=r"sample '241'.*'image' is no base64"):
        MMBench(tmp_path / "cut.tsv")[0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("weights"))


def _run(name: str, weights: Path) -> int:
    command = ["test", "-c", str(CONFIGS / f"{name}.yaml"), "--weights", str(weights)]
    options = ["--data.init_args.num_workers=0", "--evaluation.decoding.max_new_tokens=2", "--trainer.accelerator=cpu"]
    return cli.main([*command, *options])


@pytest.mark.parametrize("name", NAMES)
def test_the_protocol_runs(
    name: str, root: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    assert _run(name, weights) == 0, capfd.readouterr().err
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["evaluation"]
    folder = weights / "2_finetune/evaluation" / config["name"]
    scores = json.loads((folder / "scores.json").read_text())
    [task] = config["metrics"]
    assert scores["counts"][task] == len((folder / "answers.jsonl").read_text().splitlines()) > 0
    assert any(key.startswith(f"{task}/") for key in scores["scores"])
    assert (list(folder.glob("submission.*")) != []) == ("submission" in config)


def test_submissions(root: Path, tmp_path: Path) -> None:
    rows = [{"id": "7", "answer": "Two cats, I think?"}]
    _write(tmp_path, **{
        "llava.jsonl": [{"question_id": 9, "image": "a", "text": "b"}, {"question_id": 7, "image": "a", "text": "b"}],
        "official.json": {"questions": [{"question_id": 9, "image_id": 1}, {"question_id": 7, "image_id": 1}]},
    })  # fmt: skip
    whole = [{"question_id": 9, "answer": ""}, {"question_id": 7, "answer": "2 cats i think"}]
    assert json.loads(VQAServer(tmp_path / "llava.jsonl").content(rows)) == whole
    assert json.loads(VQAServer(tmp_path / "official.json").content(rows)) == whole
    with pytest.raises(UserError, match=r"llava\.jsonl: has no question '8'"):
        VQAServer(tmp_path / "llava.jsonl").content([{"id": "8", "answer": ""}])
    assert json.loads(VizWizServer().content([{"id": "a.jpg", "answer": "The cat."}])) == [
        {"image": "a.jpg", "answer": "cat"}
    ]
    assert json.loads(MMVetGrader().content([{"id": "v1_7", "answer": "Two."}])) == {"v1_7": "Two."}
    assert json.loads(LlavaReview().content(rows)) == {
        "question_id": 7, "text": "Two cats, I think?", "answer_id": "7", "model_id": "vlm",
    }  # fmt: skip


def test_the_sheet_for_mmbench(root: Path) -> None:
    table = MMBenchSheet(root / "data/eval/mmbench/mmbench_dev_20230712.tsv")
    content = table.content([{"id": "1000241", "answer": "B\x08 <&\n "}])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        parts = {name: ElementTree.fromstring(archive.read(name)) for name in archive.namelist()}
    assert set(parts) == {
        "[Content_Types].xml", "_rels/.rels", "xl/workbook.xml", "xl/_rels/workbook.xml.rels", "xl/sheet.xml",
    }  # fmt: skip
    cells = [["".join(cell.itertext()) for cell in row] for row in parts["xl/sheet.xml"][0]]
    assert cells == [
        ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"],
        ["241", "What is it?", "a ball", 'a "big" box', "", "lost", "", "A", "dev"],
        ["1000241", "What is it?", 'a "big" box', "a ball", "", "lost", "B <&\n ", "B", "dev"],
    ]
    with pytest.raises(UserError, match=r"mmbench_dev_20230712\.tsv: has no row '5'"):
        table.content([{"id": "5", "answer": "A"}])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vqav2_test_dev", {"vqav2/llava_vqav2_mscoco_test2015.jsonl": None}, "test2015.jsonl: cannot be read"),
        ("vqav2_test_dev", {"vqav2/llava_vqav2_mscoco_test2015.jsonl": [{"id": 1}]}, "question 0 has no 'question_id'"),
        ("mmbench_test", {"mmbench/mmbench_test_20230712.tsv": "index\tA\n1\ta\n"}, "mmbench_test_20230712.tsv"),
        (
            "mmmu",
            {"mmmu/Art/validation-00000-of-00001.parquet": "x"},
            "validation-00000-of-00001.parquet: cannot be read",
        ),
        ("gqa", {"gqa/data/images/n16.jpg": None}, "testdev_balanced_questions.json: sample '201': image 'n16.jpg'"),
        ("gqa", {"gqa/data/testdev_balanced_questions.json": None}, "testdev_balanced_questions.json: cannot be read"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    name: str,
    change: dict[str, object],
    message: str,
    root: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(root / "data", tmp_path / "data")
    for file, content in change.items():
        (tmp_path / "data/eval" / file).unlink()
        if content is not None:
            _write(tmp_path / "data/eval", **{file: content})
    monkeypatch.chdir(tmp_path)
    assert _run(name, weights) != 0
    printed = capfd.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert "answers" not in printed.out


def test_every_protocol_is_documented() -> None:
    text = (CONFIGS.parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"| `{name}` |" not in text] == []
