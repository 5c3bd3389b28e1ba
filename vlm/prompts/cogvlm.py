"""Texts of CogVLM: the four that its checkpoints are trained and asked with (`utils/utils/language.py`, THUDM/CogVLM).

`cogvlm_base` of the base models and the grounding generalist, `cogvlm_vqa` of its benchmarks, `cogvlm_chat_old` of
cogvlm-chat-v1.1 and `cogvlm_chat` of the chat models after it. Prompt and answer are tokenized apart, as there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlm.prompts.regions import REGION_FORMS
from vlm.prompts.spans import ImageMark, Span, TextSpan
from vlm.prompts.template import Form, Template
from vlm.sample import ImagePart, Message

_SHORT, _ANSWER = " Short answer:", TextSpan(" Answer:")


@dataclass(frozen=True)
class CogTemplate(Template):
    """An image stands before its whole turn, right behind BOS where it is the first.

    Several images of a turn stay where they are, with nothing between them and the text; those that it begins with
    stand before it. Earlier answers are joined with the text around them and have no end mark; in training they are
    trained all the same.

    A question that ends in `Short answer:` (the request of a source) is not followed by `Answer:` as well: the chat
    model is trained on both.

    Attributes:
        joins: what stands between a question and an earlier answer; None: of earlier exchanges only the images are
            there, before the last question.
    """

    joins: str | None = None

    @property
    def is_single(self) -> bool:
        """Whether it writes one exchange."""
        return self.joins is None

    def turns(self, messages: Sequence[Message], *, generate: bool = False) -> list[list[Span]]:
        if self.is_single:
            messages = _asked_last(messages)
        opening, *turns = super().turns(messages, generate=generate)
        closing = [] if generate else [turns.pop()]
        last = len(turns) - 1  # what is answered now, or the cue of it
        for at in range(last):
            turns[at] = self._joined(turns[at]) if at % 2 else _image_first(turns[at], at)
        return [opening, *turns, *closing]

    def _user_content(self, message: Message, form: Form, *, where: int, generate: bool) -> list[Span]:
        several = sum(isinstance(part, ImagePart) for part in message.content) > 1
        form = replace(form, place="given") if several else form
        return super()._user_content(message, form, where=where, generate=generate)

    def _joined(self, turn: list[Span]) -> list[Span]:
        """An earlier answer, in one text with its question."""
        (answer, *rest) = [span for span in turn if not isinstance(span, TextSpan) or span.text]
        assert isinstance(answer, TextSpan)
        assert self.joins is not None
        return [TextSpan(self.joins, trained=answer.trained), replace(answer, apart=False), *rest]


def _image_first(turn: list[Span], at: int) -> list[Span]:
    """A user's turn whose first images stand before what the template writes around it."""
    between, spans = (turn[:1], turn[1:]) if at else ([], turn)
    texts = [place for place, span in enumerate(spans) if isinstance(span, TextSpan) and span.literal and span.text]
    leading = [span for span in spans[: texts[0] if texts else len(spans)] if isinstance(span, ImageMark)]
    behind = list(spans)
    for mark in leading:
        behind.remove(mark)
    asks_shortly = any(isinstance(span, TextSpan) and span.text.endswith(_SHORT) for span in behind if span != _ANSWER)
    return [*between, *leading, *(span for span in behind if not (asks_shortly and span == _ANSWER))]


def _asked_last(messages: Sequence[Message]) -> list[Message]:
    """The system's text, the last question with the images of earlier ones, and what answers it."""
    messages = [*messages]
    questions = [at for at, message in enumerate(messages) if message.role == "user"]
    if len(questions) < 2:
        return messages
    system = [message for message in messages[:1] if message.role == "system"]
    earlier = [part for at in questions[:-1] for part in messages[at].content if isinstance(part, ImagePart)]
    question = messages[questions[-1]]
    return [*system, replace(question, content=(*earlier, *question.content)), *messages[questions[-1] + 1 :]]


def _template(name: str, user: str, *, between: str = "", joins: str | None = None) -> CogTemplate:
    form = Form(
        opening="{}",
        user=(TextSpan(user),),
        assistant=(TextSpan("{}", trained=True, apart=True),),
        between=between,
        closing=(TextSpan("</s>", trained=True),),
        beside="",
    )
    return CogTemplate(name, system="", training=form, regions=REGION_FORMS["cogvlm"], joins=joins)


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        _template("cogvlm_base", "{}"),
        _template("cogvlm_vqa", "Question: {} Short answer:"),
        _template("cogvlm_chat_old", "Question: {} Answer:", between="\n", joins=" "),
        _template("cogvlm_chat", " [INST] {} [/INST] ", joins=""),
    )
}
