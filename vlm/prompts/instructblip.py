"""InstructBLIP's text: images first, then an instruction and what is to be said to it, each tokenized by itself.

There are no marks and no roles. Where the published code cuts, it is cut here, and that is counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vlm.batch import IGNORE
from vlm.errors import UserError
from vlm.prompts.template import IMAGE, Form, Template, TextSpan, Tokenized
from vlm.prompts.tokenizer import Tokenizer
from vlm.sample import DOCUMENT, ImagePart, Message, TextPart

CUT_INSTRUCTIONS, CUT_ANSWERS = "cut_instructions", "cut_answers"


class Exchange(NamedTuple):
    """What is read and what is written.

    Attributes:
        instruction: everything that was said up to the answer, a line each.
        output: the answer, or its beginning; empty where it has to be found.
    """

    instruction: str
    output: str


class Cut(NamedTuple):
    """Tokens, and what had to go for them: {`cut_instructions` or `cut_answers`: 1}."""

    tokens: Tokenized
    events: Mapping[str, float]


@dataclass(frozen=True)
class InstructTemplate(Template):
    """[images] BOS instruction output `</s>`, the output and its end trained.

    Attributes:
        max_instruction: longest instruction, BOS included, of which the end is kept. In a prompt all of it is, as in
            the published code; the Q-Former reads its end alone.
        max_output: longest output, its end and the BOS that the published code takes away again included; of a longer
            one the beginning is kept, without an end.
    """

    max_instruction: int = 128
    max_output: int = 256

    def exchange(self, messages: Sequence[Message], *, generate: bool = False) -> Exchange:
        """The last exchange of a conversation.

        Raises:
            UserError: there is none, or the instruction is empty.
        """
        if any(message.role == DOCUMENT for message in messages):
            raise UserError("a document asks nothing and answers nothing; give instructions with answers")
        *said, last = messages
        if last.role == "user" or (generate and last.role == "assistant" and not last.begun):
            if last.role == "user" and not generate:
                raise UserError("the user's last message has no answer; add one or drop it", kind="no label")
            said = [*messages] if last.role == "user" else said
            output = ""
        else:
            if last.begun and not generate:
                raise UserError("an answer that is only begun; it has no end to train on")
            output = _text_of(last)
        if not any(message.role == "user" for message in said):
            raise UserError("no message of the user; give an instruction")
        instruction = "\n".join(text for message in said if (text := _text_of(message).strip("\n")))
        if not instruction.strip():
            raise UserError(
                "the instruction is empty; say something beside the image (`prompt` or `request` of the reader, or "
                "vlm.data.WithInstructions)"
            )
        return Exchange(instruction, output)

    def tokenize(self, messages: Sequence[Message], tokenizer: Tokenizer, *, generate: bool = False) -> Tokenized:
        return self.cut(messages, tokenizer, generate=generate).tokens

    def cut(self, messages: Sequence[Message], tokenizer: Tokenizer, *, generate: bool = False) -> Cut:
        """Labelled tokens of the last exchange, an `IMAGE` for each image before them."""
        instruction, output = self.exchange(messages, generate=generate)
        asked, events = encode_literal(tokenizer, instruction), {}
        before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        room = self.max_instruction - len(before)
        if not generate and len(asked) > room:
            asked, events[CUT_INSTRUCTIONS] = asked[len(asked) - room :], 1.0
        told = encode_literal(tokenizer, output) if output else []
        if not generate:
            told.append(tokenizer.eos_id)
            if len(told) > self.max_output - 1:
                told, events[CUT_ANSWERS] = told[: self.max_output - 1], 1.0
        num_images = sum(isinstance(part, ImagePart) for message in messages for part in message.content)
        prompt = [*[IMAGE] * num_images, *before, *asked]
        labels = [IGNORE] * len(told) if generate else told
        return Cut(Tokenized([*prompt, *told], [*[IGNORE] * len(prompt), *labels]), events)


def encode_literal(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text of data: control tokens that it spells are text."""
    return list(tokenizer.encode(text, literal=[(0, len(text))])[0])


def _text_of(message: Message) -> str:
    if message.role == "assistant" and any(isinstance(part, ImagePart) for part in message.content):
        raise UserError("an image in an answer; move it to the user's turn")
    return "".join(part.text for part in message.content if isinstance(part, TextPart))


INSTRUCTBLIP = InstructTemplate(
    "instructblip",
    system="",
    training=Form(user=(TextSpan("{}"),), assistant=(TextSpan("{}</s>", trained=True),)),
    stop=("</s>",),
)

TEMPLATES = {INSTRUCTBLIP.name: INSTRUCTBLIP}
