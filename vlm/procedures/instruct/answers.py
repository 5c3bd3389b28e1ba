"""What came back from a model: read, and refused where it may not become training data."""

import re
from collections.abc import Iterable

from vlm.procedures.instruct.task_specs import Kind

FIELDS = {"pairs": ("Question", "Answer"), "generation": ("Request", "Prompt")}


class Rejected(Exception):
    """An answer that cannot be used.

    Attributes:
        reason: in a few words, the same words for the same fault.
        is_final: whether another attempt would be in vain.
    """

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_final = is_final


_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_BAR = re.compile(r"^\s*={3,}\s*$", re.MULTILINE)


def tidy(text: str) -> str:
    """Without the thoughts that some models write first, and without blanks at both ends.

    Raises:
        Rejected: it cannot be written to a file.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Rejected("holds half a surrogate pair, which is no character") from None
    return _THOUGHTS.sub("", text).strip()


def rounds_of(text: str, kind: Kind) -> list[tuple[str, str]]:
    """(question, answer) pairs of an answer with blocks, checked.

    Raises:
        Rejected: a block is missing, empty, twice or at the wrong place; text stands outside of blocks; the rules of
            the kind.
    """
    first, second = FIELDS[kind.form]
    label = re.compile(rf"^[*#\s]*({first}|{second})\s*(?:\d+\s*)?:[*\s]*", re.MULTILINE)
    if not text:
        raise Rejected("empty")
    if not label.search(text):
        raise Rejected(f"no {first} and {second}")
    if not all(label.match(block) for block in _BAR.split(text) if block.strip()):
        raise Rejected(f"text outside of {first} and {second}")
    _, *found = label.split(_BAR.sub("", text))
    names, contents = found[::2], [content.strip() for content in found[1::2]]
    if names != [first, second] * (len(names) // 2):
        raise Rejected(f"{first} and {second} do not take turns")
    rounds = list(zip(contents[::2], contents[1::2], strict=True))
    if len({question for question, _ in rounds}) < len(rounds):
        raise Rejected("a question is asked twice")
    least, most = kind.limits.get("rounds", (1, 1))
    if not least <= len(rounds) <= most:
        raise Rejected(f"not {least} to {most} rounds" if least < most else f"not {most} round")
    for question, answer in rounds:
        check(question, kind, part="question")
        check(answer, kind, part="answer")
    return rounds


def check(text: str, kind: Kind, *, part: str) -> str:
    """A question or an answer that keeps to the limits and rules of its kind.

    Raises:
        Rejected: it does not.
    """
    least, most = kind.limits[part]
    if not text:
        raise Rejected(f"empty {part}")
    if not least <= len(text) <= most:
        raise Rejected(f"{part} shorter than {least} characters" if len(text) < least else f"{part} over {most}")
    if not kind.may_repeat and repeats(text):
        raise Rejected("repeats a sentence")
    for group, patterns in kind.forbidden.items():
        if any(pattern.search(text) for pattern in patterns):
            raise Rejected(_MEANING[group])
    return text


_MEANING = {
    "refusal": "refuses",
    "sources": "mentions captions, boxes or coordinates",
    "apology": "apologises or calls itself incomplete",
    "marks": "holds a mark of the data format",
}


def repeats(text: str) -> bool:
    """Whether a sentence stands in a text twice; case, blanks and the end mark do not count."""
    sentences = [sentence for sentence in map(_plain, re.split(r"(?<=[.!?])\s+|\n+", text)) if sentence]
    return len(set(sentences)) < len(sentences)


def _plain(sentence: str) -> str:
    return " ".join(sentence.casefold().split()).rstrip(".!? ")


def count_words(texts: Iterable[str]) -> int:
    """Words and signs: the length of a text in tokens where nobody says it."""
    return sum(len(re.findall(r"\w+|[^\w\s]", text)) for text in texts)
