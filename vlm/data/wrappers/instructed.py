"""Tasks put into words in one of several ways, another one each time that a sample is seen (InstructBLIP)."""

import dataclasses
from collections.abc import Sequence

from vlm.data.sources.base import Source
from vlm.data.sources.instructions import fill_instruction, instruction_set
from vlm.data.wrappers.wrapped import Wrapped
from vlm.sample import Sample, TextPart
from vlm.seeding import seed_from


class WithInstructions(Wrapped):
    """A source whose questions are put as one of a set of instructions says.

    Which one is drawn from (seed, epoch, sample); validation takes `fixed`. It is laid around the last text of the
    question and stands at its end; what a reader puts before as a text of its own (OCR tokens) stays before it.

    Args:
        source: where the samples come from; each asks once.
        instructions: name of a set (`vlm.data.sources.instructions`), or texts. `{}` is the place of the question,
            `{options}` that of the sample's choices as `(a) x (b) y`.
        fixed: number of the instruction where nothing is drawn.
    """

    def __init__(self, source: Source, instructions: str | Sequence[str], fixed: int = 0) -> None:
        super().__init__(source)
        self.instructions = instruction_set(instructions)
        self.fixed = self.instructions[fixed]

    def __getitem__(self, index: int) -> Sample:
        return dataclasses.replace(self.source[index], instructions=(self.fixed, *self.instructions))


def put_question(sample: Sample, seed: int | None) -> Sample:
    """A sample with its question as one of its instructions puts it; one without instructions stays as it is.

    Args:
        seed: of the sample; None: the fixed instruction.

    Raises:
        SampleError: it asks more than once, or lacks what the instruction wants to write.
    """
    if not sample.instructions:
        return sample
    fixed, *drawn = sample.instructions
    form = fixed if seed is None else drawn[seed_from(seed, "instruction") % len(drawn)]
    asked = [at for at, message in enumerate(sample.messages) if message.role == "user"]
    if len(asked) != 1:
        raise sample.error(
            f"an instruction is laid around one question, found {len(asked)}; leave the instructions out"
        )
    message = sample.messages[asked[0]]
    content = list(message.content)
    places = [at for at, part in enumerate(content) if isinstance(part, TextPart) and part.text.strip()]
    question = ""
    if "{}" in form and places:
        part = content.pop(places.pop())
        assert isinstance(part, TextPart)
        question = part.text.strip()
    for mark, there, what in (("{}", question, "question"), ("{options}", sample.choices, "'choices'")):
        if mark in form and not there:
            raise sample.error(f"has no {what}, which the instruction {form!r} has a place for; take another set")
    text = fill_instruction(form, question, sample.choices)
    content.append(TextPart(text if places else f"\n{text}"))
    messages = list(sample.messages)
    messages[asked[0]] = dataclasses.replace(message, content=tuple(content))
    return dataclasses.replace(sample, messages=tuple(messages), instructions=())
