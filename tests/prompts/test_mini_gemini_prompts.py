"""Mini-Gemini's conversations against the official prompts, ids and labels."""

import vlm  # noqa: F401
import pytest

from tests.conftest import golden_json
from tests.support.systems import TOKENIZER
from vlm.prompts import ImageMark, LlamaTokenizer, Template, TextSpan, get_template
from vlm.prompts.mini_gemini import asked, find_prompt
from vlm.sample import ImagePart, Message, TextPart

CASE = golden_json("mgm_templates__a", "data.json")


def message(role: str, text: str) -> Message:
    head, *others = text.split("<image>")
    parts = [TextPart(head)] if head else []
    for piece in others:
        parts += [ImagePart(), TextPart(piece)] if piece else [ImagePart()]
    return Message(role, tuple(parts))


def template(name: str) -> Template:
    return get_template(name if name == "plain" else f"mini_gemini_{name}")


def written(name: str, messages: list[Message]) -> str:
    spans = template(name).render(messages, generate=True)
    return "".join(span.text if isinstance(span, TextSpan) else "<image>" for span in spans)


@pytest.mark.parametrize("case", CASE["prompts"], ids=lambda case: case["template"])
def test_conversations(case: dict) -> None:
    turns = [text for text in case["turns"] if text is not None]
    messages = [message(("user", "assistant")[at % 2], text) for at, text in enumerate(turns)]
    assert written(case["template"], messages) == case["prompt"]


@pytest.mark.parametrize("case", CASE["cli_prompts"], ids=lambda case: case["template"])
def test_requests(case: dict) -> None:
    ocr = [] if case["ocr"] is None else case["ocr"].split(", ")
    text = asked(case["question"], ocr=ocr, picture=case["gen"])
    images = [ImagePart()] * case["n_images"]
    parts = (*images, TextPart(f"\n{text}" if images else text))
    assert written(case["template"], [Message("user", parts)]) == case["prompt"]


@pytest.mark.parametrize("case", CASE["labels"], ids=lambda case: case["template"])
def test_ids_and_labels(case: dict) -> None:
    tokenizer = LlamaTokenizer(TOKENIZER.path, legacy=case["legacy"], pad_token="<unk>")
    for turns, ids, labels in zip(case["sources"], case["input_ids"], case["labels"], strict=True):
        roles = {"human": "user", "gpt": "assistant"}
        messages = [message(roles[turn["from"]], turn["value"]) for turn in turns]
        found = template(case["template"]).tokenize(messages, tokenizer)
        assert (found.ids, found.labels) == (ids, labels)


TRAINED = {
    "gemma": ["A dog.<end_of_turn>\n<eos>", "Brown.<end_of_turn>\n<eos>"],
    "llama_3": ["A dog.<|eot_id|>", "Brown.<|eot_id|>"],
    "mistral_instruct": [" A dog. </s>", " Brown. </s>"],
    "chatml_direct": ["A dog.<|im_end|>", "Brown.<|im_end|>"],
}


@pytest.mark.parametrize("name", TRAINED)
def test_answers_and_their_ends_are_trained(name: str) -> None:
    """What `train.py` means to train; its counts of tokens go astray with some tokenizers."""
    turns = ["<image>\nWhat is this?", "A dog.", "Colour?", "Brown."]
    messages = [message(("user", "assistant")[at % 2], text) for at, text in enumerate(turns)]
    spans = template(name).render(messages)
    assert [span.text for span in spans if isinstance(span, TextSpan) and span.trained] == TRAINED[name]
    assert sum(isinstance(span, ImageMark) for span in spans) == 1


def test_the_end_of_a_prompt_is_kept_and_that_of_a_training_text_is_not() -> None:
    messages = [message("user", "<image>\nRead.\nReference OCR Token: a\n"), message("assistant", "a")]
    assert "Token: a\n ASSISTANT:" in written("vicuna_v1", messages)
    trained = template("vicuna_v1").render(messages)
    assert trained[-2].text == "\nRead.\nReference OCR Token: a ASSISTANT:"
    assert "USER: <image>\nRead. ASSISTANT:" in written("vicuna_v1", [message("user", "Read.\n<image>")])


@pytest.mark.parametrize(
    ("text", "trained", "asked_as"),
    [
        ("Look at <image> and count", "Look at  and count", "Look at  and count"),
        ("Look at<image>and count", "Look atand count", "Look atand count"),
        ("<image>  Look \n", "Look", "Look \n"),
        ("Look \n<image>", "Look", "Look"),
        (" Look \n <image> \n", "Look", "Look \n  \n"),
    ],
)
def test_only_the_mark_goes_where_an_image_stood(text: str, trained: str, asked_as: str) -> None:
    """`preprocess_multimodal` takes the mark out of the text, strips the whole and writes the image before it."""
    assert trained == text.replace("<image>", "").strip()
    messages = [message("user", text), message("assistant", "a")]
    spans = template("vicuna_v1").render(messages)
    assert spans[-2] == TextSpan(f"\n{trained} ASSISTANT:")
    assert f"USER: <image>\n{asked_as} ASSISTANT:" in written("vicuna_v1", messages)
    several = written("vicuna_v1", [message("user", "Left <image> and right <image> differ?")])
    assert "USER: Image 1:<image>\nImage 2:<image>\nLeft  and right  differ? ASSISTANT:" in several


def test_the_last_marked_prompt_is_drawn() -> None:
    assert find_prompt("Here: <h>a cat</h>, or <h>a dog</h>.") == "a dog"
    assert find_prompt("no picture") is None
    assert find_prompt("</h><h>") is None
