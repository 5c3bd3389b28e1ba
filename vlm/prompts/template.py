"""Prompt templates as data: messages become text whose every character is trained or not, and then labelled tokens.

The text between two images is tokenized whole and once; a token is trained if its last character is. Tokenizing turn
by turn instead gives other ids than the published ones (SentencePiece writes a blank before every piece it is given),
and counting tokens of parts gives masks that drift.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from vlm.batch import IGNORE
from vlm.errors import UserError
from vlm.prompts.regions import LLAVA, RegionForm
from vlm.prompts.spans import ImageMark, Span, TextSpan, format_spans, merge, surround, tight
from vlm.prompts.tokenizer import Tokenizer
from vlm.sample import DOCUMENT, ImagePart, Message, Part, TextPart

IMAGE = -200
"""Id that stands where an image is, until its features take the place."""


class Tokenized(NamedTuple):
    """Ids with `IMAGE` at each image mark, and labels on their own token with `IGNORE` where nothing is trained."""

    ids: list[int]
    labels: list[int]


def tokenize(spans: Iterable[Span], tokenizer: Tokenizer) -> Tokenized:
    """Labelled tokens of rendered spans, BOS first if the tokenizer adds one.

    Text of data that spells an image mark or a control token is text. The space before an answer belongs to the trained
    span:
    SentencePiece joins it with the first word.
    """
    ids: list[int] = []
    labels: list[int] = []
    if tokenizer.bos_id is not None:
        ids.append(tokenizer.bos_id)
        labels.append(IGNORE)
    text = ""
    trained = bytearray()  # one flag per character of `text`
    literal: list[tuple[int, int]] = []  # ranges of `text`

    def write() -> None:
        nonlocal text
        if text:
            new_ids, offsets = tokenizer.encode(text, literal=literal)
            # a token without width takes the state of the character it stands before
            last = [end - 1 if end > start else min(start, len(text) - 1) for start, end in offsets]
            ids.extend(new_ids)
            labels.extend(token if trained[at] else IGNORE for token, at in zip(new_ids, last, strict=True))
        text = ""
        trained.clear()
        literal.clear()

    for span in spans:
        if isinstance(span, TextSpan):
            if span.apart:
                write()
            if span.literal:
                literal.append((len(text), len(text) + len(span.text)))
            text += span.text
            trained.extend(bytes([span.trained]) * len(span.text))
        else:
            write()
            ids.append(IMAGE)
            labels.append(IGNORE)
    write()
    return Tokenized(ids, labels)


@dataclass(frozen=True)
class Form:
    """How a conversation is written. `{}` marks the place of the content.

    Attributes:
        user: spans of a user turn.
        assistant: spans of an answer; those before the first trained one are the cue that generation ends with.
        opening: text around the system text; left out where there is none. Spans where a part of it is trained.
        bare: what stands in the place of the opening where a system message says nothing.
        opening_in_turn: the opening stands inside the first user turn, where its content begins (Llama-2).
        between: text before every user turn but the first.
        closing: what follows the last turn.
        image: text around each image, `{n}` its number in the conversation, from 1.
        place: of the single image of a turn: moved to its front with a newline behind it, moved to its end with a
            newline before it, or where the message has it; `listed`: there, but without the newline that the message
            has behind it.
        beside: text between a turn's text and the single image that moved to its front or end.
        tight: white space beside an image is left out. Tokenizers of transformers before 4.34 dropped it beside every
            added token, so the models that were trained with them never saw it.
        trim: white space around each message is left out, as the chat template of Llama 3 does.
    """

    user: tuple[TextSpan, ...]
    assistant: tuple[TextSpan, ...]
    opening: str | tuple[TextSpan, ...] = "{}"
    bare: str | tuple[TextSpan, ...] = ""
    opening_in_turn: bool = False
    between: str = ""
    closing: tuple[TextSpan, ...] = ()
    image: str = "{}"
    place: Literal["front", "back", "given", "listed", "numbered"] = "front"
    beside: str = "\n"
    tight: bool = False
    trim: bool = False


@dataclass(frozen=True)
class Template:
    """A published conversation format.

    Content becomes text by these rules (those of LLaVA's training code; its prompts at inference follow them too):

    - The single image of a turn moves to its front, followed by a newline; the text around it is stripped. A form may
      say another place, or what stands between them.
    - An answer of weight 0 is written and not trained.
    - Several images stay where they are, each on its own line unless the text beside it brings a blank or newline.
    - Text parts are joined as they are. Text that spells an image mark or a control token is text.
    - A system message replaces the template's system text; it may only come first.
    - Answers to nothing at the start are left out, or kept where there is one (`keeps_greeting`). After that, user and
      assistant take turns and the assistant has the last word; with `generate` its last message is left out and the
      text ends where the answer has to begin. One that is only `begun` stays, and the text ends where it ends.

    Attributes:
        system: default system text.
        training: the form that is trained on.
        generation: the form of a prompt, where it differs.
        stop: strings that end a generated answer, besides the tokenizer's end token.
        instructed: False: training leaves the user's text out, and images without text stand bare, outside `user`.
        keeps_greeting: an answer before the first question is written, and trained, like any other.
        regions: how places in an image are written; they are text when messages get here (`write_regions`).
    """

    name: str
    system: str
    training: Form
    generation: Form | None = None
    stop: tuple[str, ...] = ()
    instructed: bool = True
    keeps_greeting: bool = False
    regions: RegionForm = LLAVA

    def render(self, messages: Sequence[Message], *, generate: bool = False) -> list[Span]:
        """The conversation as spans, neighbours of one kind joined; none is trained with `generate`.

        Raises:
            UserError: the messages do not fit the rules above; the line names the message.
        """
        return merge(itertools.chain.from_iterable(self.turns(messages, generate=generate)))

    def tokenize(self, messages: Sequence[Message], tokenizer: Tokenizer, *, generate: bool = False) -> Tokenized:
        """Labelled tokens of a conversation."""
        return tokenize(itertools.chain.from_iterable(self.turns(messages, generate=generate)), tokenizer)

    def turns(self, messages: Sequence[Message], *, generate: bool = False) -> list[list[Span]]:
        """Spans of the opening, of each turn that is written, and of the closing."""
        system, turns = _split(messages, generate=generate, keep_greeting=self.keeps_greeting)
        form = (self.generation or self.training) if generate else self.training
        system = self.system if system is None else system
        if form.trim:
            turns = [(where, _trimmed(message)) for where, message in turns]
        text = form.opening if system else form.bare
        around = (TextSpan(text),) if isinstance(text, str) else text
        opening = [span for span in format_spans(around, [_said(system)]) if span != TextSpan("")]
        num_images = 0
        written: list[list[Span]] = [[] if form.opening_in_turn else opening]
        for index, (where, message) in enumerate(turns):
            if message.role == "user":
                content = self._user_content(message, form, where=where, generate=generate)
                if index == 0 and form.opening_in_turn:
                    content = [*opening, *content]
                bare = not self.instructed and not (generate and _joined_text(message).strip())
                spans = content if bare else format_spans(form.user, content)
                spans = surround(tight(spans) if form.tight else spans, form.image, first=num_images + 1)
                num_images += sum(isinstance(span, ImageMark) for span in spans)
                written.append([TextSpan(form.between), *spans] if index else spans)
                continue
            answer = _said(_text_of(message, where=where))
            spans = format_spans(_up_to_content(form.assistant) if message.begun else form.assistant, [answer])
            written.append(spans if message.weight else _untrained(spans))
        if generate:
            if not turns[-1][1].begun:
                cue = next((i for i, span in enumerate(form.assistant) if span.trained), len(form.assistant))
                written.append(list(form.assistant[:cue]))
            return [_untrained(spans) for spans in written]
        return [*written, list(form.closing)]

    def _user_content(self, message: Message, form: Form, *, where: int, generate: bool) -> list[Span]:
        images = [part for part in message.content if isinstance(part, ImagePart)]
        if not self.instructed and not generate:
            return [ImageMark()] * len(images)
        text = _joined_text(message)
        if not images:
            if not text:
                raise UserError(f"message {where}: the user's turn is empty; fill it in or drop the exchange")
            return [_said(text)]
        if form.place == "given":
            return [_said(part.text) if isinstance(part, TextPart) else ImageMark() for part in _written(message)]
        if form.place == "listed":
            return _listed(message)
        if form.place == "numbered":
            return _numbered(message, strip=not generate)
        if len(images) == 1:
            text = text.strip()
            if not text:
                return [ImageMark()]
            if form.place == "front":
                return [ImageMark(), _said(f"{form.beside}{text}")]
            return [_said(f"{text}{form.beside}"), ImageMark()]
        content: list[Span] = []
        previous: TextPart | ImagePart | None = None
        for part in _written(message):
            if previous is not None and _touch(previous, part):
                content.append(_said("\n"))
            content.append(_said(part.text) if isinstance(part, TextPart) else ImageMark())
            previous = part
        return content


def _said(text: str) -> TextSpan:
    """Text of a message."""
    return TextSpan(text, literal=True)


def _untrained(spans: Iterable[Span]) -> list[Span]:
    return [replace(span, trained=False) if isinstance(span, TextSpan) else span for span in spans]


def _up_to_content(form: Sequence[TextSpan]) -> list[TextSpan]:
    """The spans of a turn without what stands behind its content."""
    place = next(index for index, span in enumerate(form) if "{}" in span.text)
    return [*form[:place], replace(form[place], text=form[place].text.partition("{}")[0] + "{}")]


def _trimmed(message: Message) -> Message:
    """The message without the white space at its ends."""
    parts: list[Part] = list(_written(message))
    for places, strip in ((range(len(parts)), str.lstrip), (reversed(range(len(parts))), str.rstrip)):
        for at in places:
            part = parts[at]
            if not isinstance(part, TextPart):
                break
            parts[at] = TextPart(strip(part.text))
            if strip(part.text):
                break
    return replace(message, content=tuple(parts))


def _listed(message: Message) -> list[Span]:
    """Texts and images in their order, without the newline behind an image."""
    content: list[Span] = []
    behind = False
    for part in _written(message):
        if isinstance(part, TextPart):
            content.append(_said(part.text.removeprefix("\n") if behind else part.text))
        else:
            content.append(ImageMark())
        behind = isinstance(part, ImagePart)
    return content


def _numbered(message: Message, *, strip: bool) -> list[Span]:
    """The images, numbered where they are several, before the text; without `strip` its end stays as it is."""
    parts = _written(message)
    text = _joined_text(message)
    text = text.strip() if strip or isinstance(parts[-1], ImagePart) else text.lstrip()
    num_images = sum(isinstance(part, ImagePart) for part in parts)
    heads = [f"Image {number}:" if num_images > 1 else "" for number in range(1, num_images + 1)]
    content: list[Span] = [span for head in heads for span in (_said(head), ImageMark(), _said("\n"))]
    return [*content, _said(text)] if text else content[:-1]


def _touch(left: TextPart | ImagePart, right: TextPart | ImagePart) -> bool:
    """Whether an image stands right beside text or another image."""
    if isinstance(left, TextPart) and isinstance(right, TextPart):
        return False
    blank_left = isinstance(left, TextPart) and (not left.text or left.text[-1].isspace())
    blank_right = isinstance(right, TextPart) and (not right.text or right.text[0].isspace())
    return not (blank_left or blank_right)


def _written(message: Message) -> list[TextPart | ImagePart]:
    parts = [part for part in message.content if isinstance(part, TextPart | ImagePart)]
    assert len(parts) == len(message.content), "regions are written out before a message is rendered (write_regions)"
    return parts


def _joined_text(message: Message) -> str:
    return "".join(part.text for part in _written(message) if isinstance(part, TextPart))


def _text_of(message: Message, *, where: int) -> str:
    if any(isinstance(part, ImagePart) for part in message.content):
        raise UserError(f"message {where}: an image in a message of the {message.role}; move it to the user's turn")
    return _joined_text(message)


def _split(
    messages: Sequence[Message], *, generate: bool, keep_greeting: bool
) -> tuple[str | None, list[tuple[int, Message]]]:
    """System text and the turns to write, each with its place in `messages`; checks their order."""
    numbered = list(enumerate(messages))
    system = None
    if numbered and numbered[0][1].role == "system":
        system = _text_of(numbered.pop(0)[1], where=0)
    greetings = list(itertools.takewhile(lambda turn: turn[1].role == "assistant", numbered))
    for where, message in greetings:
        _text_of(message, where=where)  # an image may not get lost with it
    if len(greetings) == len(numbered):
        raise UserError("no message of the user; a conversation starts with one")
    if not keep_greeting:
        numbered = numbered[len(greetings) :]
    for turn, (where, message) in enumerate(numbered, 1 if greetings and keep_greeting else 0):
        if message.role == DOCUMENT:
            raise UserError(f"message {where}: a document has no turns; set model.template: document")
        expected = ("user", "assistant")[turn % 2]
        if message.role == "system":
            raise UserError(f"message {where}: a system message may only come first; move it there")
        if message.role != expected:
            raise UserError(f"message {where}: two messages of the {message.role} in a row; join them into one")
    begun = [where for where, message in numbered if message.begun]
    if begun and not (generate and begun == [numbered[-1][0]]):
        why = "only the last one may be" if generate else "it has no end to train on; leave out 'begun', or the sample"
        raise UserError(f"message {begun[0]}: an answer that is only begun; {why}")
    if generate:
        leave_out = numbered[-1][1].role == "assistant" and not begun
        return system, numbered[:-1] if leave_out else numbered
    if numbered[-1][1].role == "user":
        place = numbered[-1][0]
        raise UserError(f"message {place}: the user's last message has no answer; add one or drop it", kind="no label")
    return system, numbered
