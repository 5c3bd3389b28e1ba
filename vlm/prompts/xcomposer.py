"""Texts of InternLM-XComposer: `xcomposer` of the -7b release, `xcomposer_vl` of -vl-7b, and prompts as they are.

What is trained and asked follows `modeling_InternLM_XComposer.py` (`align_text`, `mask_human_targets`, `wrap_prompt`),
`finetune/data_mix.py`, `web_demo.py` and the evaluation code of InternLM/InternLM-XComposer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlm.prompts.spans import ImageMark, Span, TextSpan
from vlm.prompts.template import IMAGE, Form, Template, Tokenized
from vlm.prompts.tokenizer import Tokenizer
from vlm.sample import ImagePart, Message, TextPart

EOH, EOA = "<TOKENS_UNUSED_0>", "<TOKENS_UNUSED_1>"
"""End of what a person says, and of what the assistant says (ids 103027 and 103028)."""
_BOS, _EOS = "<s>", "</s>"
_META = (
    "meta instruction\n"
    "You are an AI assistant whose name is 浦语.\n"
    "- 浦语 is a conversational language model that is developed by Shanghai AI Laboratory (上海人工智能实验室). "
    "It is designed to be helpful, honest, and harmless.\n"
    "- 浦语 can understand and communicate fluently in the language chosen by the user such as English and 中文.\n"
    "conversation\n"
)


def _masked(text: str, *, apart: bool = False) -> TextSpan:
    return TextSpan(text, apart=apart)


def _trained(text: str) -> TextSpan:
    return TextSpan(text, trained=True)


_USER = _masked(" <|User|>: ")
_TRAINING = Form(
    user=(_USER, _masked("{}\n")),
    assistant=(_masked(f" {EOH} <|Bot|>:"), _trained(" {}" + EOA)),
    closing=(_trained(_EOS),),
)
# the published code joins the ids of a question with those of what stands around it
_PROMPT = Form(
    user=(_masked(" <|User|>:"), _masked("{}", apart=True)),
    assistant=(_masked(f"\n{EOH} <|Bot|>:", apart=True), _trained(" {}" + EOA)),
)
_HISTORY = Form(
    user=(_masked(" <|User|>:"), _masked("{}", apart=True)),
    assistant=(_masked(" <|Bot|>:", apart=True), _masked(_BOS + " {}", apart=True)),
    between=_BOS,
)


@dataclass(frozen=True)
class XComposerTemplate(Template):
    """A chat whose image stands right behind `<|User|>:`; several images of a turn stay where they are.

    Trained and asked in two forms, both as published:

    - In training a blank stands before a question without an image and before the mark behind a question; every answer
      but the last has a newline behind it; a conversation without an image has no BOS; the system text is not there,
      unless the data brings one.
    - A prompt has neither blank, and starts with the system text. One that goes on from earlier turns has these without
      their marks, each behind a BOS of its own and its answer behind another, and no system text.
    """

    def turns(self, messages: Sequence[Message], *, generate: bool = False) -> list[list[Span]]:
        bare = replace(self, system="")
        if not generate:
            opening, *turns, closing = Template.turns(bare, messages)
            last = len(turns) - 1
            written = [
                _beside_image(turn) if at % 2 == 0 else _ended(turn, last=at == last) for at, turn in enumerate(turns)
            ]
            return [opening, *written, closing]
        prompt = Template.turns(self, messages, generate=True)
        asked = max((at for at, message in enumerate(messages) if message.role == "user"), default=0)
        earlier = messages[:asked]
        if not any(message.role == "assistant" for message in earlier):
            return prompt
        history = Template.turns(replace(bare, training=_HISTORY), earlier)
        return [*history, *Template.turns(bare, messages[asked:], generate=True)]

    def tokenize(self, messages: Sequence[Message], tokenizer: Tokenizer, *, generate: bool = False) -> Tokenized:
        tokens = super().tokenize(messages, tokenizer, generate=generate)
        if generate or tokenizer.bos_id is None or IMAGE in tokens.ids:
            return tokens
        return Tokenized(tokens.ids[1:], tokens.labels[1:])

    def _user_content(self, message: Message, form: Form, *, where: int, generate: bool) -> list[Span]:
        if sum(isinstance(part, ImagePart) for part in message.content) != 1:
            return super()._user_content(message, replace(form, place="given"), where=where, generate=generate)
        text = "".join(part.text for part in message.content if isinstance(part, TextPart)).strip()
        return [ImageMark(), TextSpan(text, literal=True)]


def _beside_image(turn: list[Span]) -> list[Span]:
    """The user's turn, without the blank that stands before text where an image is first."""
    first = next(span for span in turn[1:] if not isinstance(span, TextSpan) or span.text)
    return turn if isinstance(first, TextSpan) else [_masked(_USER.text.rstrip()), *turn[1:]]


def _ended(turn: list[Span], *, last: bool) -> list[Span]:
    """The assistant's turn; a newline ends all answers but the last."""
    end = turn[-1]
    assert isinstance(end, TextSpan)
    return turn if last else [*turn[:-1], replace(end, text=f"\n{end.text}")]


_TEMPLATE = XComposerTemplate("xcomposer", system=_META, training=_TRAINING, generation=_PROMPT, stop=(EOH, EOA))
# the user's text says itself where its images and its last blanks are; an answer may be begun
_PLAIN = Form(
    opening="",
    user=(_masked(" <|User|>:{}"),),
    assistant=(_masked(f"{EOH} <|Bot|>:"), _trained("{}" + EOA)),
    closing=(_trained(_EOS),),
    place="given",
)

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        _TEMPLATE,
        replace(_TEMPLATE, name="xcomposer_vl", system=""),
        Template("xcomposer_plain", system="", training=_PLAIN, stop=(EOH, EOA)),
        # as the published evaluation asks: the question stands right behind its image
        Template("xcomposer_asked", system="", training=replace(_PLAIN, place="listed"), stop=(EOH, EOA)),
        Template(
            "xcomposer_options",
            system="",
            training=replace(
                _PLAIN,
                assistant=(_masked(f"{EOH} <|Bot|>: Answer: The answer is"), _trained("{}" + EOA)),
                place="listed",
            ),
            stop=(EOH, EOA),
        ),
        # `web_demo.py` sends its last prompt, the choice between images, through the code that prepares training text:
        # that puts a second blank before the role and a second mark behind the question
        Template(
            "xcomposer_choose",
            system="",
            training=replace(
                _PLAIN,
                user=(_masked("  <|User|>:{}"),),
                assistant=(_masked(f"{EOH} {EOH} <|Bot|>:"), _trained("{}" + EOA)),
            ),
            stop=(EOH, EOA),
        ),
    )
}
