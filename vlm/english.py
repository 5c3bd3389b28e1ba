"""spaCy's small English model, where it is installed."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from vlm.errors import UserError

MODEL = "en_core_web_sm"
INSTALL = f"`pip install 'vlm[nouns]'` and `python -m spacy download {MODEL}`"
"""What brings it."""


def has_english() -> bool:
    """Whether spaCy and its model are there."""
    return find_spec("spacy") is not None and find_spec(MODEL) is not None


def check_english(wanted: str) -> None:
    """
    Args:
        wanted: what asks for it.

    Raises:
        UserError: spaCy or its model is not installed.
    """
    if not has_english():
        raise UserError(f"{wanted}: spaCy or its model {MODEL} is not installed; {INSTALL}, or leave it out")


def open_english(disable: Sequence[str] = ()) -> Any:
    """The model, without some of its steps."""
    import spacy

    return spacy.load(MODEL, disable=[*disable])


@cache
def _tagger() -> Any:
    return open_english()


def lemmatize(text: str) -> str:
    """A text with the lemmas of its nouns and verbs, as LAVIS scores answers to OK-VQA."""
    return " ".join(token.lemma_ if token.pos_ in ("NOUN", "VERB") else token.text for token in _tagger()(text))
