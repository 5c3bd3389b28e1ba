"""Words of captions, as the COCO caption tools count them."""

import re
from collections import Counter

_DROPPED = {"''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"}
"""The tokens that coco-caption's `ptbtokenizer.py` takes out."""

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
"""Treebank names of brackets. coco-caption means to drop them but lists them in capitals, after the text was made lower
case: they count as words in the published figures."""

_TOKEN = re.compile(
    r"""
      (?:[a-z]\.){2,}                                     # u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|mt|ave|blvd)\.
    | no\.(?=\s*\d)
    | \d+:\d\d(?=[ap]m\b)                                 # 7:00 of 7:00pm
    | \d+(?:[.,:/]\d+)*(?:[a-z]+)?(?:-[a-z\d]+)*          # 1,000  3.5  3/4  2nd  20-year-old
    | '(?:s|re|ve|ll|d|m)\b                               # what `_CUT` sets apart
    | n't\b
    | '(?:n'|\d\ds\b)                                     # rock 'n' roll, the '70s
    | o'[a-z]+ | y'(?=all\b)                              # o'clock, o'reilly, y' all
    | [^\W\d_]+(?:[-_.&@/]?\w+)*                          # words; hyphens and slashes hold them together
    | \.\.\. | -- | \S
    """,
    re.VERBOSE,
)
_CUT = (
    (re.compile("[’‘´]"), "'"),
    (re.compile("[“”]"), '"'),
    (re.compile(r"(?<=\w)n't\b"), " n't"),
    (re.compile(r"(?<=\w)'(s|re|ve|ll|d|m)\b"), r" '\1"),
    (re.compile(r"\b(can)(not)\b"), r"\1 \2"),
    (re.compile(r"\b(gon|wan)(na)\b"), r"\1 \2"),
)


def caption_words(caption: str) -> list[str]:
    """Lower-case words of a caption in the manner of the Penn Treebank, without punctuation.

    The published figures use Stanford's PTBTokenizer 3.4.1, a Java program. These rules do what it does to captions:
    "n't", "'s" and the like become words of their own, "cannot" is two, hyphenated words and decimal numbers stay
    whole. Web addresses, smileys, currency signs and rare abbreviations may come out differently;
    `tests/support/files/captions.json` holds what the Java program makes of ordinary and of odd captions.
    """
    text = caption.lower()
    for pattern, replacement in _CUT:
        text = pattern.sub(replacement, text)
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(text) if token not in _DROPPED]


def ngrams(words: list[str], longest: int = 4) -> Counter[tuple[str, ...]]:
    """How often each run of 1 to `longest` words occurs."""
    return Counter(tuple(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1))
