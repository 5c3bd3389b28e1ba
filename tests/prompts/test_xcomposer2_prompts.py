"""InternLM-XComposer2's texts, ids and labels against the official ones (`xc2_templates__a`).

Its tokenizer is not here: a stand-in gives the ids of the golden case, one character of content for each.
"""

import re
from collections.abc import Sequence
from typing import Any

import pytest

from tests.conftest import GOLDEN, golden_json
from vlm.batch import IGNORE
from vlm.prompts import LlamaTokenizer, get_template
from vlm.prompts.spans import ImageMark
from vlm.prompts.template import IMAGE
from vlm.prompts.xcomposer2 import END, START
from vlm.sample import DOCUMENT, ImagePart, Message, TextPart
from vlm.systems.row import RowCodec

CASE = golden_json("xc2_templates__a", "data.json")
_MARKS = {START: [92543], END: [92542], "assistant": [525, 11353], "user": [1008], "\n": [364], "</s>": [2]}
_CONTENT = 0xE000


class StandIn:
    """The ids of the golden case; of content, a character for each."""

    bos_id = 1

    def encode(self, text: str, *, literal: Sequence[tuple[int, int]] = ()) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for found in re.finditer("|".join(map(re.escape, _MARKS)) + "|.", text, re.DOTALL):
            these = _MARKS[found[0]] if found[0] in _MARKS else [ord(found[0]) - _CONTENT]
            ids += these
            offsets += [found.span()] * len(these)
        return ids, offsets


def message(role: str, text: str, **more: Any) -> Message:
    parts: list[TextPart | ImagePart] = []
    for at, piece in enumerate(text.split("<ImageHere>")):
        parts += [ImagePart()] if at else []
        parts += [TextPart(piece)] if piece else []
    return Message({"human": "user", "gpt": "assistant"}.get(role.lower(), role.lower()), tuple(parts), **more)  # type: ignore[arg-type]


def text(spans: Sequence[Any]) -> str:
    return "".join("<ImageHere>" if isinstance(span, ImageMark) else span.text for span in spans)


@pytest.mark.parametrize("case", CASE["conv2text"])
def test_training_texts_equal_the_official_ones(case: dict[str, Any]) -> None:
    messages = [message(turn["from"], turn["value"]) for turn in case["conversations"]]
    for name in ("xcomposer2", "xcomposer2_plain"):
        assert text(get_template(name).render(messages)) == case["text"]


def _conversation(spec: dict[str, Any], ids: Sequence[int]) -> list[Message]:
    """The messages of a golden row: content between `user\\n` or `assistant\\n` and the end of the turn."""
    messages, at = [], 1
    while ids[at] == 92543:
        head = 3 if ids[at + 1] == 1008 else 4
        end = ids.index(92542, at)
        content = ids[at + head : end]
        images = content.count(-100)
        said = "".join(chr(token + _CONTENT) for token in content if token != -100)
        messages.append(message("assistant" if head == 4 else "user", ("<ImageHere>" if images else "") + said))
        at = end + 2
    return messages


@pytest.mark.parametrize("number", range(len(CASE["mask_human_targets"])))
def test_ids_and_labels_equal_the_official_mask(number: int) -> None:
    """Of the whole conversations; one that is too long is an error here, never cut."""
    case = CASE["mask_human_targets"][number]
    if not case["spec"].get("eos", True):
        assert case["spec"]["trunc"]
        return
    ids, targets = case["ids"], case["targets"]
    length = len(ids) - case["spec"].get("pad", 0)
    tokens = get_template("xcomposer2").tokenize(_conversation(case["spec"], ids), StandIn())  # type: ignore[arg-type]
    reserved = RowCodec.reserve(tokens.ids, tokens.labels, [case["spec"].get("img", 0)] * 9)
    wide, labels, slots = (part.tolist() for part in reserved)
    assert [-100 if at in set(slots) else token for at, token in enumerate(wide)] == ids[:length]
    assert labels == targets[:length]


def test_what_is_not_said_is_not_trained() -> None:
    """The newline behind the last answer goes with it; the end of the row does not."""
    template, tokenizer = get_template("xcomposer2"), StandIn()
    said = [message("user", chr(_CONTENT + 7)), message("assistant", chr(_CONTENT + 8), weight=0.0)]
    tokens = template.tokenize(said, tokenizer)  # type: ignore[arg-type]
    assert tokens.labels == [IGNORE] * (len(tokens.ids) - 1) + [2]


def test_prompts_equal_the_official_ones() -> None:
    for case in CASE["chat_prompts"]:
        messages = [message("system", case["meta_instruction"])] if case["meta_instruction"] else []
        for asked, answered in case["history"]:
            messages += [message("user", asked), message("assistant", answered)]
        messages.append(message("user", case["query"]))
        found = text(get_template("xcomposer2_plain").render(messages, generate=True))
        assert found == case["prompt"].removeprefix("<s>")
    asked = [message("user", "<ImageHere>Please describe")]
    meta = text(get_template("xcomposer2").render(asked, generate=True))
    assert meta.startswith(f"{START}system\nYou are an AI assistant whose name is InternLM-XComposer (浦语·灵笔).\n- ")
    assert meta.endswith(f"provided image.{END}\n{START}user\n<ImageHere>Please describe{END}\n{START}assistant\n")


def test_bos_stands_where_the_released_code_has_it() -> None:
    """Its chat asks the tokenizer for each text between images, which begins each with BOS; its evaluation does not."""
    tokenizer = LlamaTokenizer(
        str(GOLDEN / "_shared" / "llama_sp_tokenizer.model"), added_tokens=(START, END), pad_token="<unk>"
    )
    asked = [message("user", "<ImageHere><ImageHere>Compare them")]
    chat = get_template("xcomposer2").tokenize(asked, tokenizer, generate=True)
    at = chat.ids.index(IMAGE)
    assert chat.ids[0] == 1
    assert chat.ids[at : at + 3] == [IMAGE, IMAGE, 1]
    assert chat.ids.count(1) == 2
    assert set(chat.labels) == {IGNORE}
    one = [message("user", "<ImageHere>Compare them")]
    for name in ("xcomposer2_asked", "xcomposer2_options"):
        ids = get_template(name).tokenize(one, tokenizer, generate=True).ids
        assert ids[:2] == [1, IMAGE]
        assert ids[2] == tokenizer.token_id(START)
        assert ids.count(1) == 1
    end = text(get_template("xcomposer2_options").render(one, generate=True))
    assert end.endswith(f"<ImageHere>{START}user\nCompare them{END}\n{START}assistant\nThe answer is")


def test_a_document_is_image_and_text_as_they_are() -> None:
    said = Message(DOCUMENT, (ImagePart(), TextPart("a cat <image>")))  # type: ignore[arg-type]
    spans = get_template("xcomposer2").render([said])
    assert text(spans) == "<ImageHere>a cat <image></s>"
    assert spans[-1].trained  # type: ignore[union-attr]
