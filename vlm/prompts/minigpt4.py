"""Conversation formats of MiniGPT-4 (Zhu et al., 2023): Vision-CAIR/MiniGPT-4@d94738a, the same in its first release.

What stands between two images and an answer are tokenized apart, as there: the answer begins with a blank of its own
behind the one that ends the cue.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlm.batch import IGNORE
from vlm.prompts.cleaning import clean_caption
from vlm.prompts.template import Form, Template, TextSpan, Tokenized
from vlm.prompts.tokenizer import Tokenizer
from vlm.sample import Message, TextPart

_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)
_TAGS = "<Img>{}</Img>"


@dataclass(frozen=True)
class AnswerTemplate(Template):
    """A template whose answers are cleaned and cut.

    Attributes:
        max_words: of an answer, which is cleaned as BLIP cleans captions; None: it stays as it is.
        max_answer: longest answer in tokens, its end mark among them; None: any length.
    """

    max_words: int | None = None
    max_answer: int | None = None

    def tokenize(self, messages: Sequence[Message], tokenizer: Tokenizer, *, generate: bool = False) -> Tokenized:
        if self.max_words is not None and not generate:
            messages = [_cleaned(message, self.max_words) for message in messages]
        ids, labels = super().tokenize(messages, tokenizer, generate=generate)
        if generate or self.max_answer is None:
            return Tokenized(ids, labels)
        kept, length = [], 0
        for at, label in enumerate(labels):
            length = 0 if label == IGNORE else length + 1
            if length <= self.max_answer:
                kept.append(at)
        return Tokenized([ids[at] for at in kept], [labels[at] for at in kept])


def _cleaned(message: Message, max_words: int) -> Message:
    if message.role != "assistant":
        return message
    text = "".join(part.text for part in message.content if isinstance(part, TextPart))
    return replace(message, content=(TextPart(clean_caption(text, max_words)),))


# The mark that ends an answer also begins the next question, so the first one stands before the conversation
_V0 = Form(
    opening="{}###",
    bare="###",
    user=(TextSpan("Human: {} "),),
    assistant=(TextSpan("###Assistant: "), TextSpan("{}###", trained=True, apart=True)),
    image=_TAGS,
    beside=" ",
)
_V0_CHAT = replace(
    _V0,
    bare=f"{_SYSTEM}###",
    user=(TextSpan("Human: {}###"),),
    assistant=(TextSpan("Assistant: "), TextSpan("{}###", trained=True)),
)
_LLAMA_2 = Form(
    opening="{} ",
    user=(TextSpan("[INST] {} [/INST] "),),
    assistant=(TextSpan("{}</s>", trained=True, apart=True),),
    between="<s>",
    image=_TAGS,
    beside=" ",
)
_LLAMA_2_CHAT = replace(_LLAMA_2, bare=_SYSTEM, assistant=(TextSpan("{}</s>", trained=True),))

TEMPLATES = {
    # Stage 1: no instruction and no tags around the image
    "minigpt4_caption": AnswerTemplate(
        "minigpt4_caption",
        system="",
        training=Form(user=(TextSpan("{}"),), assistant=(TextSpan("{}\n", trained=True, apart=True),), beside=" "),
        instructed=False,
        max_words=50,
        stop=("\n",),
    ),
    "minigpt4": AnswerTemplate("minigpt4", system="", training=_V0, generation=_V0_CHAT, stop=("###",)),
    "minigpt4_llama_2": AnswerTemplate(
        "minigpt4_llama_2", system="", training=_LLAMA_2, generation=_LLAMA_2_CHAT, stop=("</s>",)
    ),
}
