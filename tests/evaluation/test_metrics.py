"""Metrics of answers: against the public implementations' numbers (tests/data) and cases counted by hand."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchmetrics import Metric

from tests.support.ranks import run_ranks
from vlm import english
from vlm.batch import SampleInfo
from vlm.errors import SampleError, UserError
from vlm.evaluation.judges import AnswerJudge
from vlm.language import Decoding
from vlm.language.choosing import WeighedChoices
from vlm.metrics import (
    ANLS,
    BLEU,
    MME,
    POPE,
    AnswerMetric,
    AreaUnderCurve,
    CIDErD,
    ExactMatch,
    GroundingAccuracy,
    HallusionBench,
    MeanReciprocalRank,
    MMMUAccuracy,
    MultipleChoice,
    QwenGQA,
    RelaxedAccuracy,
    TextVQAAccuracy,
    VQAAccuracy,
)
from vlm.metrics.anls import levenshtein
from vlm.metrics.mmmu import chosen_option
from vlm.metrics.vqa import normalize_answer, normalize_textvqa
from vlm.metrics.words import caption_words

DATA = Path(__file__).parents[1] / "support/files"
CAPTIONS = json.loads((DATA / "captions.json").read_text())
VQA = json.loads((DATA / "vqa_answers.json").read_text())


def info(*answers: str | tuple[str, float], id: str = "7", **kwargs: Any) -> SampleInfo:
    pairs = tuple(a if isinstance(a, tuple) else (a, 1.0) for a in answers)
    return SampleInfo(id, "file.json", answers=pairs, **kwargs)


def value(metric: AnswerMetric, *cases: tuple[str, SampleInfo]) -> Any:
    metric.update([answer for answer, _ in cases], [sample for _, sample in cases])
    values = metric.values()
    return next(iter(values.values())) if set(values) == {metric.name} else values


# -- words and captions


def test_captions_are_cut_as_stanfords_tokenizer_cuts_them() -> None:
    different = {
        caption: caption_words(caption) for caption, words in CAPTIONS["tokens"] if caption_words(caption) != words
    }
    assert not different


def caption_cases() -> list[tuple[str, SampleInfo]]:
    return [(image["candidate"], info(*image["references"])) for image in CAPTIONS["images"]]


def test_cider_and_bleu_equal_coco_caption() -> None:
    assert value(CIDErD(), *caption_cases()) == pytest.approx(CAPTIONS["cider_d"], rel=1e-6)
    bleu = value(BLEU(), *caption_cases())
    assert list(bleu.values()) == pytest.approx(CAPTIONS["bleu"], rel=1e-6)
    assert list(bleu) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4"]


def test_cider_by_hand() -> None:
    # two images, one word each: idf log 2 for every word; the right word scores 10 / 4 (only unigrams exist)
    right, wrong = ("cat", info("cat")), ("bird", info("dog"))
    assert value(CIDErD(), right, wrong) == pytest.approx(10 / 4 / 2)
    # three times the word: clipped to the reference's one; cosine 1 * 1 / (3 * 1); two pairs more: exp(-4 / 72)
    assert value(CIDErD(), ("cat cat cat", info("cat")), wrong) == pytest.approx(10 / 4 / 3 * math.exp(-4 / 72) / 2)
    assert value(CIDErD(), right) == 0.0  # every word occurs in every image


def test_bleu_by_hand() -> None:
    bleu = value(BLEU(), ("the the the cat", info("the cat sat", "a cat on the mat today")))
    # unigrams: the (1 of 3 counts), cat; length 4 is as near to 3 as ... 3 is nearer than 6: no penalty
    assert bleu["bleu_1"] == pytest.approx(2 / 4)
    assert bleu["bleu_2"] == pytest.approx(math.sqrt(2 / 4 * 1 / 3))
    assert bleu["bleu_3"] == 0.0
    assert value(BLEU(), ("the cat", info("the cat sat on")))["bleu_1"] == pytest.approx(math.exp(1 - 4 / 2))


# -- short answers


def test_answers_are_normalised_as_the_official_scripts_do() -> None:
    for text, vqa, textvqa in VQA["normalised"]:
        assert (normalize_answer(text), normalize_textvqa(text)) == (vqa, textvqa), text


def leave_one_out(answer: str, people: list[str]) -> float:
    scores = [min(1.0, sum(a == answer for j, a in enumerate(people) if j != i) / 3) for i in range(len(people))]
    return sum(scores) / len(scores)


def test_vqa_accuracy_leaves_each_person_out_once() -> None:
    for answer, people, expected in VQA["accuracy"]:
        assert value(VQAAccuracy(), (answer, info(*people))) == pytest.approx(expected, abs=1e-6)
        by_hand = leave_one_out(normalize_textvqa(answer), [normalize_textvqa(text) for text in people])
        assert value(TextVQAAccuracy(), (answer, info(*people))) == pytest.approx(by_hand, abs=1e-6)
    people = ["red"] * 2 + ["blue"] * 8
    assert value(VQAAccuracy(), ("Red.", info(*people))) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert value(VQAAccuracy(), ("red", info(("red", 2.0), ("blue", 8.0)))) == pytest.approx(0.6)
    assert value(VQAAccuracy(), ("two", info(*["2"] * 9, "three"))) == 1.0
    assert value(VQAAccuracy(), ("a dog's", info("dog's"))) == 0.0  # nothing is normalised when all wrote the same
    assert value(VQAAccuracy(as_submitted=True), ("The dog.", info("dog"))) == 1.0


def test_exact_match_anls_and_relaxed_accuracy() -> None:
    assert value(ExactMatch(), (" Yes. ", info("no", "yes")), ("yes sir", info("yes"))) == 0.5
    # what the published code cuts out, its oddities included
    cut = {"It is a dog, I think": "dog", "The top of it": "top", "banana tree": "tree", "Yes! No.": "yes"}
    assert value(QwenGQA(), *((answer, info(found)) for answer, found in cut.items())) == 1.0
    assert [levenshtein(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("ab", "ba"))] == [3, 3, 2]
    # one of five letters wrong; half of the letters wrong: at the threshold; more: nothing
    assert value(ANLS(), ("hellp", info("HELLO", "x"))) == pytest.approx(0.8)
    assert value(ANLS(), ("abxy", info("abcd"))) == 0.5
    assert value(ANLS(), ("axyz", info("abcd"))) == 0.0
    cases = {
        ("10.4", "10"): 1,
        ("10.6", "10"): 0,
        ("7%", "0.07"): 1,
        ("Yes", "yes"): 1,
        ("0.01", "0"): 0,
        ("x", "3"): 0,
    }
    for (answer, reference), expected in cases.items():
        assert value(RelaxedAccuracy(), (answer, info(reference))) == expected, answer


def test_boxes_are_right_from_an_iou_of_one_half() -> None:
    half = info("[0.0, 0.0, 0.5, 1.0]")
    assert value(GroundingAccuracy(), ("It is at [0.0, 0.0, 1.0, 1.0].", half)) == 1.0  # exactly 1/2
    assert value(GroundingAccuracy(), ("[0.01, 0.0, 1.0, 1.0]", half)) == 0.0
    assert value(GroundingAccuracy(), ("[0.5, 1.0, 0.0, 0.0]", half)) == 0.0  # corners swapped
    assert value(GroundingAccuracy(), ("no box", half)) == 0.0
    qwen = ("<ref>a</ref><box>(0,0),(500,1000)</box>", info("<box>(0,0),(480,1000)</box>"))
    assert value(GroundingAccuracy(form="qwen"), qwen) == 1.0
    with pytest.raises(UserError, match=r"like 'voc'; use one of llava, qwen, qwen_999, cogvlm"):
        GroundingAccuracy(form="voc")


def test_letters_are_read_as_the_official_script_reads_them() -> None:
    question = info("B", choices=("cat", "dog", "B. eel"))
    right = ("B", " B ", "B. dog", "It barks. The answer is B.")
    wrong = ("b", "A", "(B)", "The answer is B. The answer is C.", "dog", "D", "")
    for answer in right + wrong:
        assert value(MultipleChoice(), (answer, question)) == (answer in right), answer
    for answer in ("(B)", "B)", "dog.", "Dog"):
        assert value(MultipleChoice(lenient=True), (answer, question)) == 1.0, answer
    assert value(MultipleChoice(), ("B", info("dog", choices=("cat", "dog")))) == 1.0


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("B", "B"), ("B.", "B"), ("(C)", "C"), ("The answer is B", "B"), ("Not (A), rather (B).", "B"),
        ("A or B", "B"), ("B. a green boat", None), ("a", None), ("red", None),
        ("I would say it is a green boat there", "B"), ("It is neither of these, I think", None), ("", None),
    ],
)  # fmt: skip
def test_options_are_read_as_mmmus_script_reads_them(answer: str, option: str | None) -> None:
    assert chosen_option(answer, ("a red car", "a green boat", "a sun")) == option
    asked = info("B", choices=("a red car", "a green boat", "a sun"))
    assert value(MMMUAccuracy(), (answer, asked)) == (option == "B")


@pytest.mark.parametrize(
    ("answer", "wanted", "right"),
    [
        ("24/7", ["24/7", "3.429"], True), ("3.4291", ["24/7", "3.429"], True), ("3.44", ["3.43"], False),
        ("1,000 dollars", ["1000"], True), ("So the total is 12 = 1e3", ["1000"], True),
        ("First it is 5.\nThe final answer is 7", ["5"], True), ("It is 5 or so", ["7"], False),
        ("The result is a sine wave.", ["Sine"], True), ("the x axis", ["x"], True),
        ("x", ["x"], True), ("xylophone", ["x"], False),
    ],
)  # fmt: skip
def test_open_answers_are_read_as_mmmus_script_reads_them(answer: str, wanted: list[str], right: bool) -> None:
    assert value(MMMUAccuracy(), (answer, info(*wanted))) == right


def test_pope_by_hand() -> None:
    yes, no = info("yes"), info("no")
    cases = [("Yes, there is.", yes), ("yes", no), ("No.", no), ("There is not. Yes", yes)]  # tp, fp, tn, fn
    assert value(POPE(), *cases) == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5}
    groups = [("yes", info("yes", group="random")), ("yes", info("no", group="popular"))]
    values = value(POPE(categories=["random", "popular"]), *groups)
    assert (values["random/f1"], values["popular/f1"], values["f1"]) == (1.0, 0.0, 0.5)
    with pytest.raises(SampleError, match="sample '7': 'group' is None; POPE counts random"):
        value(POPE(categories=["random"]), ("yes", yes))


def test_mme_by_hand() -> None:
    def ask(group: str, reference: str) -> SampleInfo:
        return info(reference, group=group)

    values = value(
        MME(),
        *[("Yes", ask("count/1.jpg", "Yes")), ("No, two.", ask("count/1.jpg", "No"))],
        *[("yes", ask("count/2.jpg", "Yes")), ("yes", ask("count/2.jpg", "No"))],
        *[("I think yes", ask("code_reasoning/1.png", "Yes")), ("no", ask("code_reasoning/1.png", "No"))],
    )
    # count: 3 of 4 questions, 1 of 2 images; the answer with "yes" behind its first four characters is wrong
    assert values == {"perception": 125.0, "cognition": 50.0, "count": 125.0, "code_reasoning": 50.0}


def test_hallusion_bench_by_hand() -> None:
    asked = {  # figure, question: the reference and what is said
        ("VS/map/0/0", "1"): ("no", "No."), ("VS/map/0/1", "1"): ("yes", "Yes, it is."),
        ("VS/map/0/1", "2"): ("no", "yes or no"), ("VS/map/0/0", "2"): ("yes", "Yes"),
        ("VD/map/0/0", "1"): ("yes", "I do not know"), ("VD/map/0/1", "1"): ("no", "no, not yes-no"),
        ("VD/video/0/0", "1"): ("no", "There is no dog."),
    }  # fmt: skip
    values = value(
        HallusionBench(), *[(said, info(wanted, group="/".join(at))) for at, (wanted, said) in asked.items()]
    )
    # figures: VS 0/1 has a wrong question and VS 0/0 is none; VD's two of the map are wrong and that of the video right
    assert values == pytest.approx({"aAcc": 4 / 7, "fAcc": 1 / 4, "qAcc": 2 / 4, "mean": (4 / 7 + 1 / 4 + 1 / 2) / 3})
    with pytest.raises(SampleError, match="'group' is 'VD/map', not category/subcategory/set/figure/question"):
        HallusionBench().update(["yes"], [info("yes", group="VD/map")])


def weighed(*losses: float) -> WeighedChoices:
    return WeighedChoices("ABCDE"[: len(losses)], torch.tensor(losses))


def test_ranks_and_areas_by_hand() -> None:
    three = info("c", choices=("a", "b", "c"))
    cases = [(weighed(1, 2, 0.5), three), (weighed(1, 2, 3), three), (weighed(2, 2, 2), three)]  # of equals the first
    assert value(MeanReciprocalRank(), *cases) == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    no, yes = (info(word, choices=("no", "yes")) for word in ("no", "yes"))
    margins = [(0.0, no), (1.0, no), (1.0, yes), (900.0, yes), (800.0, no)]  # large ones lie apart too
    area = AreaUnderCurve()
    # of the six pairs of yes and no: 1 > 0, 1 = 1, 1 < 800, and 900 over all
    assert value(area, *[(weighed(margin, 0.0), sample) for margin, sample in margins]) == pytest.approx(4.5 / 6)
    assert math.isnan(value(AreaUnderCurve(), (weighed(0, 1), yes)))
    with pytest.raises(SampleError, match="its answer 'd' is none of its 3 'choices'"):
        MeanReciprocalRank().update([weighed(1, 2, 3)], [info("d", choices=("a", "b", "c"))])
    with pytest.raises(SampleError, match="has 3 'choices'; this metric compares two"):
        AreaUnderCurve().update([weighed(1, 2, 3)], [three])
    with pytest.raises(UserError, match=r"auroc weighs choices; set options or candidates"):
        AnswerJudge([area])
    judge = AnswerJudge([AreaUnderCurve(), MultipleChoice()], Decoding(options="{choice}"))
    judge.start(torch.device("cpu"))
    judge.hear([weighed(1, 0), weighed(1, 0)], [yes, no])
    assert judge.finish(None) == {"auroc": 0.5, "accuracy": 0.5}
    assert [row["answer"] for row in judge.records()] == ["B", "B"]


def test_answers_are_lemmatized_where_spacy_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = VQAAccuracy(lemmas=True)
    monkeypatch.setattr(english, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"VQAAccuracy.lemmas: spaCy or its model en_core_web_sm is not installed; `pip"
    ):
        metric.check()
    tags = {"dogs": ("NOUN", "dog"), "ran": ("VERB", "run"), "faster": ("ADV", "fast")}

    def nlp(text: str) -> list[SimpleNamespace]:
        found = [(word, *tags.get(word, ("X", "?"))) for word in text.split()]
        return [SimpleNamespace(text=word, pos_=kind, lemma_=lemma) for word, kind, lemma in found]

    monkeypatch.setattr(english, "_tagger", lambda: nlp)
    monkeypatch.setattr(english, "find_spec", lambda name: name)
    metric.check()
    assert english.lemmatize("red dogs ran faster") == "red dog run faster"
    assert value(metric, ("dogs", info("dog")), ("faster", info("fast"))) == 0.5


# -- all of them

EVERY = [
    *((kind, info("red")) for kind in (ANLS, BLEU, CIDErD, ExactMatch, RelaxedAccuracy, TextVQAAccuracy, VQAAccuracy)),
    (GroundingAccuracy, info("[0, 0, 1, 1]")),
    (MultipleChoice, info("A", choices=("a", "b"))),
    (POPE, info("yes")),
    (HallusionBench, info("yes", group="VD/map/0/0/1")),
    (MME, info("yes", group="count/1")),
]


@pytest.mark.parametrize(("kind", "sample"), EVERY, ids=lambda value: getattr(value, "__name__", ""))
def test_fillers_do_not_count_and_a_sample_without_answers_is_named(kind: Any, sample: SampleInfo) -> None:
    def states(metric: Metric) -> str:
        return str({name: getattr(metric, name) for name in metric._defaults})

    metric = kind()
    filler = SampleInfo(**{**vars(sample), "filler": True})
    metric.update(["something", "red"], [filler, filler])
    assert states(metric) == states(kind())
    bare = SampleInfo(**{**vars(sample), "answers": ()})
    with pytest.raises(SampleError, match=r"file\.json: sample '7': has no 'answers'"):
        metric.update(["red"], [bare])


# -- ranks


def _values_on_rank(order: list[int]) -> dict[str, Any]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    cases = caption_cases()
    mine = [cases[i] for i in order[rank::world]] if len(order) >= world or rank < len(order) else []
    found = {}
    for metric in (CIDErD(), BLEU(), ANLS()):
        for answer, sample in mine:
            metric.update([answer], [sample])
        found |= metric.values()
    return found


@pytest.mark.parametrize("count", [20, 3, 1])
def test_two_ranks_count_as_one(count: int) -> None:
    order = list(range(count))
    [alone] = run_ranks(_values_on_rank, 1, order)
    assert run_ranks(_values_on_rank, 2, order[::-1]) == [alone, alone]  # exactly, in any order; with 1, a rank is idle
