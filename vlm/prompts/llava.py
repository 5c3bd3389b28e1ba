"""Conversation formats of the LLaVA family (LLaVA, LLaVA-1.5, LLaVA-NeXT; VILA and others use `v1`).

Names and texts are those of `conversation.py` in haotian-liu/LLaVA; what is trained follows its `train.py`. The two
`v0_first` templates are those of its first release (8959d5c), whose names there are `v0` as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlm.batch import IGNORE
from vlm.prompts.template import IMAGE, Form, Template, TextSpan, Tokenized, tokenize
from vlm.prompts.tokenizer import Tokenizer
from vlm.sample import Message


def _masked(text: str) -> TextSpan:
    return TextSpan(text)


def _trained(text: str) -> TextSpan:
    return TextSpan(text, trained=True)


@dataclass(frozen=True)
class TurnCountedTemplate(Template):
    """A template whose published mask is laid by counting tokens of every turn tokenized alone, BOS included.

    With LLaMA's own tokenizer this is what the spans say: `###` is two tokens inside the text and one behind the BOS
    that a lone turn starts with, so counts agree and the "first two tokens" of a user turn are its stop mark `###`.
    Any other tokenizer that adds a BOS makes the count run ahead by a token per turn, in the published code as here.
    `tokenize(template.render(messages), tokenizer)` lays the spans themselves, without that drift.
    """

    keeps_greeting: bool = True  # these alone: the other published functions skip a first turn that is not the user's

    def tokenize(self, messages: Sequence[Message], tokenizer: Tokenizer, *, generate: bool = False) -> Tokenized:
        ids, labels = super().tokenize(messages, tokenizer, generate=generate)
        if generate:
            return Tokenized(ids, labels)
        opening, *turns, _ = self.turns(messages)
        said = [message for message in messages if message.role != "system"]
        start = len(tokenize(opening, tokenizer).ids)
        labels = [IGNORE if at < start or token == IMAGE else token for at, token in enumerate(ids)]
        for message, spans in zip(said, turns, strict=True):
            end = start + len(tokenize(spans, tokenizer).ids)
            if message.role == "user" or not message.weight:
                for at in range(start + 2 * (message.role == "user"), min(end, len(ids))):
                    labels[at] = IGNORE
            start = end
        return Tokenized(ids, labels)


@dataclass(frozen=True)
class MarkedTemplate(Template):
    """A template whose published labels train some tokens wherever they stand, whatever the spans say.

    Attributes:
        marks: these tokens.
    """

    marks: tuple[str, ...] = ()

    def tokenize(self, messages: Sequence[Message], tokenizer: Tokenizer, *, generate: bool = False) -> Tokenized:
        ids, labels = super().tokenize(messages, tokenizer, generate=generate)
        marks = set() if generate else {tokenizer.token_id(mark) for mark in self.marks}
        return Tokenized(ids, [token if token in marks else label for token, label in zip(ids, labels, strict=True)])


_POLITE = "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
_CURIOUS = "A chat between a curious {0} and an artificial intelligence assistant. " + _POLITE
_SEEING = (
    "able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_TAGGED = (
    f"A chat between a curious user and an artificial intelligence assistant. The assistant is {_SEEING}"
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)

# The published prompts at inference put no tags around an image, even for the two `mmtag` templates
_TAGS = "<Image>{}</Image>"

# Trained and prompted in two forms: the training code writes its own marks around the turns
_V0 = Form(
    opening="{}\n\n",
    user=(_trained("###"), _masked(" Human: {}\n")),
    assistant=(_trained("### Assistant: {}\n"),),
    closing=(_trained("### "),),
)
_V0_PROMPT = Form(
    opening="{}###", user=(_masked("Human: {}###"),), assistant=(_masked("Assistant:"), _trained(" {}###"))
)
# Its first release left the image where the data has it, and asked with the image behind the question
_FIRST = replace(_V0, place="given", tight=True)
_FIRST_PROMPT = replace(_V0_PROMPT, place="back", tight=True)
_MARKED = "<im_start>{}<im_end>"
# Without a system text the blank behind it stays (`vflan_no_system_prompt` of VILA)
_V1 = Form(
    opening="{} ",
    bare=" ",
    user=(_masked("USER: {} "),),
    assistant=(_masked("ASSISTANT:"), _trained(" {}</s>")),
)
_LLAMA_2 = Form(
    opening="<<SYS>>\n{}\n<</SYS>>\n\n",
    opening_in_turn=True,
    user=(_masked("[INST] {} [/INST]"),),
    assistant=(_trained(" {} </s>"),),
    between="<s>",
)
_CHATML = Form(
    opening="<|im_start|>system\n{}<|im_end|>",
    user=(_masked("<|im_start|>user\n{}<|im_end|>"),),
    assistant=(_masked("<|im_start|>assistant\n"), _trained("{}<|im_end|>")),
)
_LLAMA_3 = Form(
    opening="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    user=(_masked("<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"),),
    assistant=(_trained("<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>"),),
    trim=True,
)
_LLAMA_3_PROMPT = replace(
    _LLAMA_3,
    assistant=(_masked("<|start_header_id|>assistant<|end_header_id|>\n\n"), _trained("{}<|eot_id|>")),
)

_V0_TEMPLATE = TurnCountedTemplate(
    "v0", system=_CURIOUS.format("human"), training=_V0, generation=_V0_PROMPT, stop=("###",)
)
_V1_TEMPLATE = Template("v1", system=_CURIOUS.format("user"), training=_V1, stop=("</s>",))
_LLAMA_2_TEMPLATE = Template("llama_2", system=_LLAMA_2_SYSTEM, training=_LLAMA_2, stop=("<s>",))
_MPT_TEMPLATE = Template(
    "mpt",
    system="A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers.",
    training=_CHATML,
    stop=("<|im_end|>",),
)

TEMPLATES: dict[str, Template] = {
    # Captions only. As a prompt the user's text does stand, followed by a newline, as published; an image alone is
    # what the caption stage was trained on.
    "plain": Template(
        "plain",
        system="",
        training=Form(opening="", user=(_masked("{}\n"),), assistant=(_trained("{}\n"),)),
        instructed=False,
        stop=("\n",),
    ),
    "v0": _V0_TEMPLATE,
    "llava_v0": _V0_TEMPLATE,
    # ScienceQA was trained without the two tokens around an image, the chat model with them
    "v0_first": replace(_V0_TEMPLATE, name="v0_first", training=_FIRST, generation=_FIRST_PROMPT),
    "v0_first_marked": replace(
        _V0_TEMPLATE,
        name="v0_first_marked",
        training=replace(_FIRST, image=_MARKED),
        generation=replace(_FIRST_PROMPT, image=_MARKED),
    ),
    "v0_mmtag": replace(_V0_TEMPLATE, name="v0_mmtag", system=_TAGGED, training=replace(_V0, image=_TAGS)),
    "v1": _V1_TEMPLATE,
    "vicuna_v1": _V1_TEMPLATE,
    "llava_v1": replace(_V1_TEMPLATE, name="llava_v1", system=_CURIOUS.format("human")),
    "v1_mmtag": replace(
        _V1_TEMPLATE, name="v1_mmtag", system=_TAGGED, training=replace(_V1, image=_TAGS), generation=_V1
    ),
    "llama_2": _LLAMA_2_TEMPLATE,
    "llava_llama_2": replace(
        _LLAMA_2_TEMPLATE,
        name="llava_llama_2",
        system=f"You are a helpful language and vision assistant. You are {_SEEING}",
    ),
    # LLaVA-VL/LLaVA-NeXT, `conversation.py` and `preprocess_llama3` of `train.py`: the name of the answer's role is
    # trained, and so are Llama 3's marks, the user's too. The blank line is on that list as well, but is named there by
    # a text that the vocabulary does not have.
    "llava_llama_3": MarkedTemplate(
        "llava_llama_3",
        system=f"You are a helpful language and vision assistant. You are {_SEEING}",
        training=_LLAMA_3,
        generation=_LLAMA_3_PROMPT,
        stop=("<|eot_id|>",),
        marks=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral_instruct": Template("mistral_instruct", system="", training=replace(_LLAMA_2, between="")),
    "mpt": _MPT_TEMPLATE,
    "chatml_direct": replace(_MPT_TEMPLATE, name="chatml_direct", system="Answer the questions."),
}
