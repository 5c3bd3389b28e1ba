"""MMMU's own reading of answers (Yue et al., 2024; MMMU-Benchmark/MMMU, `eval_utils.py`)."""

import re
from collections.abc import Sequence

from vlm.batch import SampleInfo
from vlm.metrics.base import MeanScore, references
from vlm.metrics.choice import LETTERS

_MARKS = (",", ".", "!", "?", ";", ":", "'")
_LONG = 5
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


class MMMUAccuracy(MeanScore):
    """The share of questions that are answered right, in [0, 1].

    With `choices` the last option that the answer names counts: as `(B)`, else as a `B` that stands alone, else, in
    answers of more than five words, by its text. Where the script guesses at random because it finds none, the answer
    is wrong here. Without `choices`, a reference has to be among the numbers of the answer's telling parts (rounded to
    two decimals), or inside one of these parts.
    """

    name = "accuracy"

    def score(self, prediction: str, sample: SampleInfo) -> float:
        wanted = references(sample)
        if sample.choices:
            return float(chosen_option(prediction, sample.choices) in wanted)
        known = [value for text in wanted for value in _normal(text)]
        return float(any(_is_right(value, known) for value in _found(prediction)))


def chosen_option(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that an answer names."""
    for mark in _MARKS:
        answer = answer.strip(mark)
    text = f" {answer} "
    letters = LETTERS[: len(choices)]
    for form in ("({})", " {} "):
        places = {letter: text.rfind(form.format(letter)) for letter in letters}
        if max(places.values()) >= 0:
            return max(places, key=places.__getitem__)
    if len(text.split()) <= _LONG:
        return None
    places = {letter: text.lower().rfind(choice.lower()) for letter, choice in zip(letters, choices, strict=True)}
    return max(places, key=places.__getitem__) if max(places.values()) >= 0 else None


def _is_right(value: str | float, known: Sequence[str | float]) -> bool:
    if isinstance(value, float):
        return value in known
    return any(isinstance(text, str) and text in value for text in known)


def _found(answer: str) -> list[str | float]:
    """The telling parts of an answer and their numbers, normalised."""
    text = answer.strip().strip(".").lower()
    lines = text.split("\n")
    parts = []
    for number, line in enumerate(lines):
        shortest = ""
        for cue in (*_CUES, "=") if number == len(lines) - 1 else _CUES:
            if cue in line:
                tail = line.rsplit(cue, 1)[1].strip()
                if not shortest or len(tail) < len(shortest):  # an empty one gives way to the next, as published
                    shortest = tail
        if shortest and shortest not in _MARKS:
            parts.append(shortest)
    parts = parts or [text]
    numbers = [number for part in parts for pattern in _NUMBERS for number in re.findall(pattern, part)]
    return [value for piece in (*parts, *numbers) for value in _normal(piece)]


def _normal(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
