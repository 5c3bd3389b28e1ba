"""Texts of Qwen-VL: `qwen_vl` of the pre-trained model and `qwen_vl_chat` of Qwen-VL-Chat.

Names of the parts, ids and labels follow `tokenization_qwen.py`, `qwen_generation_utils.py` and `finetune.py` of
QwenLM/Qwen-VL; the texts of the pre-training tasks appendix B of the paper (Bai et al., 2023).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlm.errors import UserError
from vlm.prompts.documents import DocumentTemplate
from vlm.prompts.regions import REGION_FORMS
from vlm.prompts.template import Form, Span, Template, TextSpan
from vlm.prompts.tiktoken import END
from vlm.sample import DOCUMENT, ImagePart, Message

_QWEN = REGION_FORMS["qwen"]


def _masked(text: str, *, apart: bool = False) -> TextSpan:
    return TextSpan(text, apart=apart)


def _trained(text: str, *, apart: bool = False) -> TextSpan:
    return TextSpan(text, trained=True, apart=apart)


@dataclass(frozen=True)
class ContinuedTemplate(DocumentTemplate):
    """Texts without turns: the answer goes on where the user's text ends, behind a blank.

    No blank stands between a phrase and its regions (`<ref>the ear</ref><box>...`). A document is text alone.
    """

    def turns(self, messages: Sequence[Message], *, generate: bool = False) -> list[list[Span]]:
        if any(message.role == DOCUMENT and ImagePart() in message.content for message in messages):
            raise UserError(f"template {self.name!r}: a document with pictures; it was trained on plain ones alone")
        turns = super().turns(messages, generate=generate)
        written = [[span for span in spans if not isinstance(span, TextSpan) or span.text] for spans in turns]
        for before, after in itertools.pairwise(written):
            last, first = before[-1] if before else None, after[0] if after else None
            joined = isinstance(last, TextSpan) and last.text.endswith(("</ref>", "<box>", "<quad>"))
            if joined and isinstance(first, TextSpan) and first.trained:
                after[0] = replace(first, text=first.text.removeprefix(" "))
        return written


# The marks of a turn and the newline behind it are trained in all turns. Ids of the role, of the newline behind it and
# of the content are joined, so a newline that a content begins with stays a token of its own.
_TURN = (_trained("<|im_start|>"), _masked("user\n"), _masked("{}", apart=True), _trained("<|im_end|>\n"))
_OPENING = (_trained("<|im_start|>"), _masked("system\n"), _masked("{}", apart=True), _trained("<|im_end|>\n"))
_ANSWER = (_trained("<|im_start|>"), _masked("assistant\n"), _trained("{}", apart=True), _trained("<|im_end|>\n"))
# what generation ends with are the spans before the first trained one
_CUE = (_masked("<|im_start|>assistant\n"), _trained("{}", apart=True), _trained("<|im_end|>\n"))
_CHAT = Form(
    opening=_OPENING,
    bare=tuple(span for span in _OPENING if "{}" not in span.text),
    user=_TURN,
    assistant=_ANSWER,
    image="Picture {n}: <img>{}</img>\n",
    place="listed",
)


_CHAT_PROMPT = replace(_CHAT, assistant=_CUE)
_CHAT_TEMPLATE = Template(
    "qwen_vl_chat",
    system="You are a helpful assistant.",
    training=_CHAT,
    generation=_CHAT_PROMPT,
    stop=("<|im_end|>", END),
    regions=_QWEN,
)
_PLAIN_IMAGE = "<img>{}</img>\n"
_TEXT = Form(
    opening="", user=(_masked("{}"),), assistant=(_trained(" {}" + END),), image="<img>{}</img>", place="listed"
)

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        _CHAT_TEMPLATE,
        # as the chat model is asked in the published evaluation on MME
        replace(
            _CHAT_TEMPLATE,
            name="qwen_vl_chat_unnumbered",
            training=replace(_CHAT, image=_PLAIN_IMAGE),
            generation=replace(_CHAT_PROMPT, image=_PLAIN_IMAGE),
        ),
        ContinuedTemplate(
            "qwen_vl",
            system="",
            training=_TEXT,
            # solved examples before a question do not end, as in the published evaluation
            generation=replace(_TEXT, assistant=(_trained(" {}"),)),
            stop=(END,),
            regions=_QWEN,
            end=END,
            unmark=False,
        ),
    )
}
