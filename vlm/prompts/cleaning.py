"""How BLIP and its successors clean texts before they are tokenized."""

import re

_MARKS = re.compile(r'[.!"()*#:;~]')


def clean_caption(text: str, max_words: int) -> str:
    """A caption in lower case, some marks as blanks, cut to `max_words` (BLIP, `data/utils.py`, `pre_caption`)."""
    text = re.sub(r"\s{2,}", " ", _MARKS.sub(" ", text.lower())).rstrip("\n").strip(" ")
    return _first_words(text, max_words)


def clean_question(text: str, max_words: int = 50) -> str:
    """A question in lower case, without the same marks (BLIP, `data/utils.py`, `pre_question`)."""
    return _first_words(_MARKS.sub("", text.lower()).rstrip(" "), max_words)


def _first_words(text: str, max_words: int) -> str:
    words = text.split(" ")
    return " ".join(words[:max_words]) if len(words) > max_words else text
