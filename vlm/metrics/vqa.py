"""Accuracy of short answers against ten people: VQAv2, TextVQA, VizWiz."""

import re
from typing import Any

from vlm.batch import SampleInfo
from vlm.english import check_english, lemmatize
from vlm.metrics.base import MeanScore, references, sample_error

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
"""As published; the first group is a misspelt look-behind, so a period goes unless a digit follows it."""
_MAX_PERIODS = 32
"""The official code passes `re.UNICODE` (32) where `sub` expects how many to replace."""
_DIGIT_COMMA = re.compile(r"\d,\d")
_NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"},
    **{"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_ARTICLES = ("a", "an", "the")

_SPELLINGS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in _SPELLINGS.split()
    for at, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}
"""Spelling without one of its apostrophes -> with all of them. The last entry is reversed in the official table too."""


def normalize_answer(answer: str) -> str:
    """The normalisation of the official VQA evaluation (GT-Vision-Lab/VQA, `vqaEval.py`).

    Punctuation goes, or becomes a blank where it stands between two words; number words up to ten become digits;
    articles go; contractions get their apostrophes back.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    # the tests look at the text as it came, so one comma between digits makes every mark vanish without a blank
    comma = _DIGIT_COMMA.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        cleaned = cleaned.replace(mark, "" if comma or f"{mark} " in text or f" {mark}" in text else " ")
    cleaned = _PERIOD.sub("", cleaned, count=_MAX_PERIODS)
    words = [_NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalize_textvqa(answer: str) -> str:
    """The normalisation of TextVQA's evaluation (facebookresearch/mmf, `EvalAIAnswerProcessor`).

    It sets "'s" apart, drops commas and question marks, and goes on as `normalize_answer`. LLaVA-1.5 also puts every
    answer through it that it submits to VQAv2 and VizWiz.
    """
    return normalize_answer(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


class VQAAccuracy(MeanScore):
    """The share of people who agree, the official metric of VQA v2: mean over samples, in [0, 1].

    Antol et al., "VQA: Visual Question Answering", 2015; GT-Vision-Lab/VQA, `vqaEval.py`. Each of the ten people is
    left out once; an answer that at least three of the other nine gave counts 1, two 2/3, one 1/3; the mean over the
    ten. As in the official code nothing is normalised when all ten wrote the same; case never counts here.

    `SampleInfo.answers` holds one entry per person, or one per distinct answer with the number of people as its weight.
    With fewer than four people "three of the others" cannot be met, so all of the others have to agree; a single
    reference means equality.

    Args:
        as_submitted: put predictions through `normalize_textvqa` first, as LLaVA-1.5 does before it submits.
        lemmas: of predictions, nouns and verbs become their lemmas first, by spaCy: so BLIP-2 is scored on OK-VQA,
            whose references are lemmas.
    """

    name = "vqa_accuracy"

    def __init__(self, *, as_submitted: bool = False, lemmas: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.as_submitted, self.lemmas = as_submitted, lemmas

    def check(self) -> None:
        if self.lemmas:
            check_english("VQAAccuracy.lemmas")

    def score(self, prediction: str, sample: SampleInfo) -> float:
        prediction = lemmatize(prediction) if self.lemmas else prediction
        people = [" ".join(re.split(r"[\n\t]", text)).strip() for text in _people(sample)]
        answer = normalize_textvqa(prediction) if self.as_submitted else prediction
        answer = " ".join(re.split(r"[\n\t]", answer)).strip()
        if len(set(people)) > 1:
            people, answer = [normalize_answer(text) for text in people], normalize_answer(answer)
        return agreement(answer.lower(), [text.lower() for text in people])


class TextVQAAccuracy(MeanScore):
    """`VQAAccuracy` as TextVQA counts it: answers and references are always normalised, by `normalize_textvqa`.

    Singh et al., "Towards VQA Models That Can Read", 2019; facebookresearch/mmf, `TextVQAAccuracyEvaluator`.
    """

    name = "textvqa_accuracy"

    def score(self, prediction: str, sample: SampleInfo) -> float:
        return agreement(normalize_textvqa(prediction), [normalize_textvqa(text) for text in _people(sample)])


class IVQAAccuracy(MeanScore):
    """The share of people who agree as iVQA counts it: an answer that two of the five people gave counts 1, one 1/2.

    Yang et al., "Just Ask: Learning to Answer Questions from Millions of Narrated Videos", 2021.
    """

    name = "ivqa_accuracy"

    def score(self, prediction: str, sample: SampleInfo) -> float:
        answer = normalize_answer(prediction)
        return min(1.0, sum(normalize_answer(text) == answer for text in _people(sample)) / 2)


def agreement(answer: str, people: list[str]) -> float:
    """The mean over people left out of min(1, how many of the others gave `answer` / 3)."""
    matches, others = people.count(answer), len(people) - 1
    if not others:
        return float(matches)
    needed = min(3, others)
    with_one, without = min(1.0, (matches - 1) / needed), min(1.0, matches / needed)
    return (matches * with_one + (len(people) - matches) * without) / len(people) if matches else 0.0


def _people(sample: SampleInfo) -> list[str]:
    texts: list[str] = []
    for (_, weight), text in zip(sample.answers, references(sample), strict=True):
        if weight < 1 or weight != int(weight):
            raise sample_error(
                sample,
                f"answer {text!r} has weight {weight}; here a weight is the number of people who gave the answer, so "
                "write 1, 2, ...",
            )
        texts += [text] * int(weight)
    return texts
