"""Pieces of a rendered text: what is trained and what is not, and where the images are."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import count


@dataclass(frozen=True)
class TextSpan:
    """Text of which every character is trained, or none.

    Attributes:
        apart: tokenized apart from the text before it, where the published code joins ids instead of texts.
        literal: it comes from data: control tokens that it spells are text.
    """

    text: str
    trained: bool = False
    apart: bool = False
    literal: bool = False


@dataclass(frozen=True)
class ImageMark:
    """Place of the next image."""


Span = TextSpan | ImageMark


def merge(spans: Iterable[Span]) -> list[Span]:
    """The same text with neighbouring spans of one kind joined and empty ones dropped; what is literal is forgotten."""
    merged: list[Span] = []
    apart = False  # an empty span keeps the texts around it apart, too
    for span in spans:
        last = merged[-1] if merged else None
        if not isinstance(span, TextSpan):
            merged.append(span)
            apart = False
            continue
        apart = apart or span.apart
        if span.text:
            if isinstance(last, TextSpan) and last.trained == span.trained and not apart:
                merged[-1] = replace(last, text=last.text + span.text)
            else:
                merged.append(TextSpan(span.text, span.trained, apart=apart and isinstance(last, TextSpan)))
            apart = False
    return merged


def format_spans(form: Iterable[TextSpan], content: Iterable[Span]) -> list[Span]:
    """Spans of one turn with the content in the place of `{}`, trained where the place is."""
    spans: list[Span] = []
    for span in form:
        before, place, after = span.text.partition("{}")
        spans.append(replace(span, text=before))
        if place:
            spans += [replace(c, trained=span.trained) if isinstance(c, TextSpan) else c for c in content]
            spans.append(TextSpan(after, span.trained))
    return spans


def tight(spans: Iterable[Span]) -> list[Span]:
    """The spans of a turn without the white space beside its images."""
    bare = _strip_behind_images(spans, str.lstrip)
    return _strip_behind_images(bare[::-1], str.rstrip)[::-1]


def _strip_behind_images(spans: Iterable[Span], strip: Callable[[str], str]) -> list[Span]:
    bare: list[Span] = []
    behind = False
    for span in spans:
        if isinstance(span, TextSpan):
            span = replace(span, text=strip(span.text) if behind else span.text)
            behind = behind and not span.text
        else:
            behind = True
        bare.append(span)
    return bare


def surround(spans: Iterable[Span], form: str, *, first: int) -> list[Span]:
    """The spans with each image between the two halves of `form`; `first` is the number of the first image."""
    numbers = count(first)
    surrounded: list[Span] = []
    for span in spans:
        if isinstance(span, TextSpan):
            surrounded.append(span)
        else:
            before, _, after = form.replace("{n}", str(next(numbers))).partition("{}")
            surrounded += [TextSpan(before), span, TextSpan(after)]
    return surrounded
