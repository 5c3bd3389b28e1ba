"""Texts of InternLM-XComposer2 and -4KHD: `xcomposer2` of the models that talk about images, `xcomposer2_plain` of the
one that composes articles, and the prompts of the published evaluation.

What is trained follows `finetune/data_mix.py` (`conv2text`) and `mask_human_targets` of the released model, prompts its
`chat`, what is asked of benchmarks `evaluation/` of InternLM/InternLM-XComposer (InternLM-XComposer-2.0).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlm.batch import IGNORE
from vlm.prompts.documents import DocumentTemplate
from vlm.prompts.spans import ImageMark, Span, TextSpan
from vlm.prompts.template import IMAGE, Form, Tokenized
from vlm.prompts.tokenizer import Tokenizer
from vlm.sample import Message

START, END = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"
"""Begin and end of a turn (ids 92543 and 92542)."""
STOP = "[UNUSED_TOKEN_0]"
"""Ends an article (id 92397)."""
_EOS = "</s>"
_META = (
    "You are an AI assistant whose name is InternLM-XComposer (浦语·灵笔).\n"
    "- InternLM-XComposer (浦语·灵笔) is a multi-modality conversational language model that is developed by Shanghai "
    "AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM-XComposer (浦语·灵笔) can understand and communicate fluently in the language chosen by the user such "
    "as English and 中文.\n"
    "- InternLM-XComposer (浦语·灵笔) is capable of comprehending and articulating responses effectively based on the "
    "provided image."
)


def _masked(text: str) -> TextSpan:
    return TextSpan(text)


def _trained(text: str) -> TextSpan:
    return TextSpan(text, trained=True)


_TRAINING = Form(
    opening=f"{START}system\n{{}}{END}\n",
    user=(_masked(f"{START}user\n{{}}{END}\n"),),
    assistant=(_masked(f"{START}assistant\n"), _trained(f"{{}}{END}"), _masked("\n")),
    closing=(_trained(_EOS),),
    place="listed",
    trim=True,
)
_PROMPT = replace(_TRAINING, trim=False)


@dataclass(frozen=True)
class XComposer2Template(DocumentTemplate):
    """A chat whose images stand where the message has them.

    In training there is no system text, unless the data brings one; white space around a message is left out; of the
    newlines behind answers only the last one is trained. A document (stage 1) is image and text as they are.

    Attributes:
        bos_everywhere: in a prompt BOS stands before every text between images, not only before the first.
        image_first: in a prompt the image stands before everything but BOS.
    """

    unmark: bool = False
    bos_everywhere: bool = False
    image_first: bool = False

    def turns(self, messages: Sequence[Message], *, generate: bool = False) -> list[list[Span]]:
        turns = DocumentTemplate.turns(self if generate else replace(self, system=""), messages, generate=generate)
        if generate and self.image_first:
            marks: list[Span] = [span for turn in turns for span in turn if isinstance(span, ImageMark)]
            texts: list[list[Span]] = [[span for span in turn if not isinstance(span, ImageMark)] for turn in turns]
            return [marks, *texts]
        if not generate and turns[-1] == [_trained(_EOS)]:
            *answer, newline = turns[-2]
            assert newline == _masked("\n"), newline
            turns[-2] = [*answer, replace(newline, trained=any(_is_trained(span) for span in answer))]
        return turns

    def tokenize(self, messages: Sequence[Message], tokenizer: Tokenizer, *, generate: bool = False) -> Tokenized:
        tokens = super().tokenize(messages, tokenizer, generate=generate)
        if not generate or not self.bos_everywhere or tokenizer.bos_id is None:
            return tokens
        ids: list[int] = []
        for token in tokens.ids:
            if ids and ids[-1] == IMAGE and token != IMAGE:
                ids.append(tokenizer.bos_id)
            ids.append(token)
        return Tokenized(ids, [IGNORE] * len(ids))


def _is_trained(span: Span) -> bool:
    return isinstance(span, TextSpan) and span.trained


_CHAT = XComposer2Template(
    "xcomposer2",
    system=_META,
    training=_TRAINING,
    generation=_PROMPT,
    stop=(END,),
    end=_EOS,
    bos_everywhere=True,
)
_PLAIN = replace(_CHAT, name="xcomposer2_plain", system="", bos_everywhere=False)

TEMPLATES: dict[str, XComposer2Template] = {
    template.name: template
    for template in (
        _CHAT,
        _PLAIN,
        # the user's text says itself where its images and blanks are (`vlm run compose`)
        replace(
            _PLAIN,
            name="xcomposer2_compose",
            training=replace(_TRAINING, place="given", trim=False),
            generation=replace(_PROMPT, place="given"),
            stop=(END, STOP),
        ),
        # as the published evaluation asks: BOS, image, turn
        replace(_PLAIN, name="xcomposer2_asked", image_first=True),
        replace(_CHAT, name="xcomposer2_detail", image_first=True, bos_everywhere=False),
        replace(
            _PLAIN,
            name="xcomposer2_options",
            image_first=True,
            generation=replace(_PROMPT, assistant=(_masked(f"{START}assistant\nThe answer is"), _trained("{}"))),
        ),
    )
}
