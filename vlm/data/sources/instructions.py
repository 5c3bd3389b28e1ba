"""The ways of putting a task into words that InstructBLIP was tuned with, as data.

The paper's appendix prints them; these lists were read where they circulate in public code, in several agreeing copies.
"""

from collections.abc import Mapping, Sequence

from vlm.data.sources.requests import filled
from vlm.errors import UserError

SETS: Mapping[str, tuple[str, ...]] = {
    "caption": (
        "A short image caption:",
        "A short image description:",
        "A photo of",
        "An image that shows",
        "Write a short description for the image.",
        "Write a description for the photo.",
        "Provide a description of what is presented in the photo.",
        "Briefly describe the content of the image.",
        "Can you briefly explain what you see in the image?",
        "Could you use a few words to describe what you perceive in the photo?",
        "Please provide a short depiction of the picture.",
        "Using language, provide a short account of the image.",
        "Use a few words to illustrate what is happening in the picture.",
    ),
    "vqa": (
        "{}",
        "Question: {}",
        "{} A short answer to the question is",
        "Q: {} A:",
        "Question: {} Short answer:",
        "Given the image, answer the following question with no more than three words. {}",
        "Based on the image, respond to this question with a short answer: {}. Answer:",
        "Use the provided image to answer the question: {} Provide your answer as short as possible:",
        'What is the answer to the following question? "{}"',
        'The question "{}" can be answered using the image. A short answer is',
    ),
    "vqg": (  # the answer stands in the place of {}, and a question is what is asked for
        "Given the image, generate a question whose answer is: {}. Question:",
        "Based on the image, provide a question with the answer: {}. Question:",
        'Given the visual representation, create a question for which the answer is "{}".',
        "From the image provided, craft a question that leads to the reply: {}. Question:",
        "Considering the picture, come up with a question where the answer is: {}.",
        "Taking the image into account, generate an question that has the answer: {}. Question:",
    ),
    "choice": (  # memory: what the evaluation asks is published, no list of what was trained
        "Question: {} Options: {options}. Short answer:",
        "{} Options: {options}. A short answer to the question is",
        "Question: {} Options: {options}. Answer:",
    ),
}
"""`{}` is the place of what the sample asks, `{options}` that of its choices as `(a) x (b) y`."""


def instruction_set(name: str | Sequence[str]) -> tuple[str, ...]:
    """A set by its name, or one that is written out.

    Raises:
        UserError: there is none of that name, or nothing in it.
    """
    if isinstance(name, str):
        if name not in SETS:
            raise UserError(f"instructions: no set {name!r}; use one of {', '.join(SETS)}, or list your own")
        return SETS[name]
    if not name or not all(isinstance(text, str) and text.strip() for text in name):
        raise UserError(f"instructions: needs at least one text and none of them empty, found {list(name)!r}")
    return tuple(name)


def fill_instruction(form: str, said: str, choices: Sequence[str] = ()) -> str:
    """An instruction with what is said in the place of `{}` and the choices in that of `{options}`; without a form what
    is said alone.
    """
    return filled(form.replace("{}", "{said}"), said=said, options=write_options(choices)) if form else said


def write_options(choices: Sequence[str]) -> str:
    """`(a) x (b) y`."""
    return " ".join(f"({chr(ord('a') + at)}) {choice}" for at, choice in enumerate(choices))
