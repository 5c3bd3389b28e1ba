"""Interleaved documents: no turns, every text token is trained, image tokens never.

A document is a sample with one message of the role `document`, in which text and images alternate as they stand on
the page. A role of its own, because nobody asks and nobody answers: a template of turns refuses it by name instead of
training on half of it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vlm.batch import IGNORE
from vlm.errors import UserError
from vlm.prompts.template import IMAGE, Form, ImageMark, Span, Template, TextSpan, Tokenized
from vlm.sample import DOCUMENT, ImagePart, Message, Sample, TextPart

CUT, DROPPED = "cut_documents", "dropped_images"


@dataclass(frozen=True)
class DocumentTemplate(Template):
    """Documents as they are, and the mark `end` behind them (VILA's pre-training, which has no template).

    A conversation is written by the form: with the one named `document`, an image and its caption are the shortest of
    documents.

    Attributes:
        end: trained text behind a document.
        unmark: text that spells an image mark is written `<IMAGE>`, as VILA's code does in pre-training. It is no mark
            either way.
    """

    end: str = "</s>"
    unmark: bool = True

    def turns(self, messages: Sequence[Message], *, generate: bool = False) -> list[list[Span]]:
        if not any(message.role == DOCUMENT for message in messages):
            turns = super().turns(messages, generate=generate)
            return [[_unmarked(span) for span in spans] for spans in turns] if self.unmark else turns
        if len(messages) > 1:
            raise UserError(f"a document stands alone, found {len(messages)} messages; take each by itself")
        spans: list[Span] = []
        for part in messages[0].content:
            assert isinstance(part, TextPart | ImagePart), "regions are written out before a message is rendered"
            written = TextSpan(part.text, not generate, literal=True) if isinstance(part, TextPart) else ImageMark()
            spans.append(_unmarked(written) if self.unmark else written)
        return [spans] if generate else [[*spans, TextSpan(self.end, trained=True)]]


def _unmarked(span: Span) -> Span:
    return (
        dataclasses.replace(span, text=span.text.replace("<image>", "<IMAGE>")) if isinstance(span, TextSpan) else span
    )


DOCUMENTS = DocumentTemplate(
    "document",
    system="",
    training=Form(
        opening="",
        user=(TextSpan("{}"),),
        assistant=(TextSpan("{}</s>", trained=True),),
    ),
    instructed=False,
    stop=("</s>",),
)


def documents_of(sample: Sample) -> list[Sample]:
    """Each document of a sample that is several, with its own images; a sample of another kind as it is."""
    if len(sample.messages) == 1 or sample.messages[0].role != DOCUMENT:
        return [sample]
    found, start = [], 0
    for message in sample.messages:
        end = start + sum(isinstance(part, ImagePart) for part in message.content)
        found.append(dataclasses.replace(sample, messages=(message,), images=sample.images[start:end]))
        start = end
    return found


class Fitted(NamedTuple):
    """A document cut to a number of tokens.

    Attributes:
        events: how much had to go, for the log: `cut_documents` and `dropped_images`; empty where nothing had to.
    """

    sample: Sample
    tokens: Tokenized
    image_tokens: list[int]
    events: Mapping[str, float]


def fit_document(sample: Sample, tokens: Tokenized, image_tokens: Sequence[int], *, max_tokens: int | None) -> Fitted:
    """The longest beginning of a document that has at most `max_tokens` tokens and ends with text.

    An image goes as a whole, and also when all the text behind it had to go. Anything but a document stays whole.

    Args:
        tokens: of the sample, one `IMAGE` for each image.
        image_tokens: how many tokens each image takes.
        max_tokens: None for no limit.

    Raises:
        SampleError: not even one token of text fits.
    """
    widths = list(image_tokens)
    length = sum(widths) + len(tokens.ids) - len(widths)
    if max_tokens is None or length <= max_tokens or sample.messages[0].role != DOCUMENT:
        return Fitted(sample, tokens, widths, {})
    end = used = images = kept = 0
    for position, token in enumerate(tokens.ids):
        used += widths[images] if token == IMAGE else 1
        if used > max_tokens:
            break
        if token == IMAGE:
            images += 1
        else:
            end, kept = position + 1, images
    if not any(label != IGNORE for label in tokens.labels[:end]):
        raise sample.error(
            f"the beginning of the document takes {used} tokens with its picture, over the limit of {max_tokens}, so "
            "that no text is left to train on; raise max_tokens or drop the document",
            kind="too long",
        )
    cut = Tokenized(tokens.ids[:end], tokens.labels[:end])
    events = {CUT: 1.0, DROPPED: float(len(widths) - kept)}
    return Fitted(_first_images(sample, kept), cut, widths[:kept], events)


def _first_images(sample: Sample, count: int) -> Sample:
    """The document before its image number `count`, counted from 0."""
    (message,) = sample.messages
    marks = [place for place, part in enumerate(message.content) if isinstance(part, ImagePart)]
    end = marks[count] if count < len(marks) else len(message.content)
    message = dataclasses.replace(message, content=message.content[:end])
    return dataclasses.replace(sample, messages=(message,), images=sample.images[:count])
