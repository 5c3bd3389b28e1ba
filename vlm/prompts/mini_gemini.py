"""Conversation formats and requests of Mini-Gemini (dvlab-research/MGM `conversation.py`, `train.py`, `serve/cli.py`).

Each is a form of LLaVA's but for several images, which are numbered, and for the end of a prompt, which is kept as it
is: `asked` writes what follows a question.
"""

from collections.abc import Sequence
from dataclasses import replace

from vlm.prompts import llava
from vlm.prompts.template import Form, Template, TextSpan

PICTURE = "<GEN>"
"""Trigger behind a request for an image."""
_SYSTEM = llava.TEMPLATES["llava_llama_2"].system

_GEMMA = Form(
    opening="",
    user=(TextSpan("<start_of_turn>user\n{}<end_of_turn>\n"),),
    assistant=(TextSpan("<start_of_turn>model\n"), TextSpan("{}<end_of_turn>\n<eos>", trained=True)),
)
# The answer stands under the header of the system, as released
_LLAMA_3 = Form(
    opening="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    user=(TextSpan("<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"),),
    assistant=(
        TextSpan("<|start_header_id|>system<|end_header_id|>\n\n"),
        TextSpan("{}<|eot_id|>", trained=True),
    ),
)


def _of(template: Template, name: str, **changes: object) -> Template:
    assert template.generation is None, "trained and prompted in one form"
    return replace(template, name=name, training=replace(template.training, place="numbered"), **changes)  # type: ignore[arg-type]


_FROM = llava.TEMPLATES
TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        _of(_FROM["vicuna_v1"], "mini_gemini_vicuna_v1"),
        _of(Template("", system="", training=_GEMMA, stop=("<end_of_turn>", "<eos>")), "mini_gemini_gemma"),
        # as `llama_2` without a system text: turns are joined by <s>, which LLaVA's own leaves out
        _of(_FROM["llama_2"], "mini_gemini_mistral_instruct", system=""),
        _of(_FROM["chatml_direct"], "mini_gemini_chatml_direct"),
        _of(Template("", system=_SYSTEM, training=_LLAMA_3, stop=("<|eot_id|>",)), "mini_gemini_llama_3"),
    )
}


def asked(question: str, *, ocr: Sequence[str] = (), picture: bool = False) -> str:
    """A question with the help and the trigger that may follow it.

    Args:
        ocr: texts that a reader of letters found in the image.
        picture: the answer is to be a prompt for an image generator.
    """
    if ocr:
        question += f"\nReference OCR Token: {', '.join(ocr)}\n"
    return f"{question} {PICTURE}" if picture else question


def find_prompt(answer: str) -> str | None:
    """What an image generator is told to draw: the last text between <h> and </h>; None where there is none."""
    head, closed, _ = answer.rpartition("</h>")
    _, opened, prompt = head.rpartition("<h>")
    return prompt if closed and opened else None
