"""Conversations as Qwen-VL publishes them for fine-tuning, and its files of questions and referring expressions."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.data.sources.base import EXTRA_KEYS, turn_extras, with_system
from vlm.data.sources.fields import Fields
from vlm.data.sources.record_sources import IMAGE, Part, RecordSource, after_image, exchange, text
from vlm.data.sources.requests import asked
from vlm.errors import UserError, quoted, shorten
from vlm.sample.keys import check_turn

_PART = re.compile(
    r"(?:Picture \d+: ?)?<img>(?P<img>.*?)</img>|<ref>(?P<ref>.*?)</ref>"
    r"|<box>(?P<box>.*?)</box>|<quad>(?P<quad>.*?)</quad>",
    re.DOTALL,
)
_NUMBERS = re.compile(r"(?=.*\d)[\s\d.,;()\[\]-]+", re.DOTALL)
_POINT = re.compile(r"\(\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\)")
_POINTS = re.compile(rf"\s*{_POINT.pattern}(?:\s*,\s*{_POINT.pattern})*\s*")
_NUM_POINTS = {"box": 2, "quad": 4}
_THOUSAND = 1000
_ROLES = ("system", "user", "assistant")


def parse_text(content: str, *, first_image: int = 0) -> tuple[list[Part], list[str]]:
    """A text with Qwen-VL's marks as parts of a message (`vlm.sample`), and the paths of its images in their order.

    ::

        Image 1: <img>a.jpg</img>\\n<ref>the dog</ref><box>(120,300),(550,800)</box>

    `Picture 1: ` goes: the template of the chat model writes it. Places belong to the last image before them.
    Where there is none, and around words, their text stays text.

    Args:
        first_image: number of images before this text.

    Raises:
        UserError: numbers between the marks of a place in an image that are none.
    """
    parts: list[Part] = []
    paths: list[str] = []
    end = 0

    def add(value: str) -> None:
        if value and parts and parts[-1]["type"] == "text":
            parts[-1] = text(parts[-1]["text"] + value)
        elif value:
            parts.append(text(value))

    for match in _PART.finditer(content):
        add(content[end : match.start()])
        end = match.end()
        kind, value = str(match.lastgroup), match[str(match.lastgroup)]
        if kind == "img":
            parts.append(IMAGE)
            paths.append(value)
        elif kind == "ref" and value.strip():
            parts.append({"type": "ref", "text": value})
        elif kind in _NUM_POINTS and _NUMBERS.fullmatch(value) and first_image + len(paths):
            parts.append(_place(kind, value, image=first_image + len(paths) - 1))
        else:
            add(match.group())
    add(content[end:])
    return parts, paths


class QwenJson(RecordSource):
    """The form that Qwen-VL's `finetune.py` reads.

    ::

        [{"id": "identity_0", "conversations": [
            {"from": "user", "value": "Picture 1: <img>a.jpg</img>\\n框出图中的格子衬衫"},
            {"from": "assistant", "value": "<ref>格子衬衫</ref><box>(588,499),(725,789)</box>"}]}]

    Images are numbered anew by the template, over the whole conversation; see `parse_text`. A `value` may be a list of
    parts as in `ChatJson`, in which text that spells `<img>` is text.
    """

    def _flag(self, record: Mapping[str, Any]) -> bool:  # type: ignore[override]
        turns = record.get("conversations")
        turns = turns if isinstance(turns, list) else []
        return any("<img>" in str(turn.get("value")) for turn in turns if isinstance(turn, Mapping))

    def chat(self, fields: Fields) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        paths: list[str] = []
        for at, turn in enumerate(fields.objects("conversations")):
            where = f"conversations[{at}]"
            check_turn(turn.record, read=("from", "value"), where=where, error=fields.error)
            role, content = turn.text("from"), turn.need("value", (str, list), "a text or a list of parts")
            if role not in _ROLES:
                raise fields.error(f"{where}: unknown role {quoted(role)}; use one of {', '.join(_ROLES)}")
            if isinstance(content, str):
                try:
                    content, found = parse_text(content, first_image=len(paths))
                except UserError as error:
                    raise fields.error(f"{where}: {error}", kind=error.kind) from error
                paths += found
            messages.append({"role": role, "content": content, **turn_extras(turn.record)})
        messages = with_system(messages, fields.record.get("system"), error=fields.error)
        extra = {key: fields.record[key] for key in EXTRA_KEYS if fields.record.get(key) is not None}
        return {"images": paths, "messages": messages, **extra}


class QwenQuestions(RecordSource):
    """Questions in the files that Qwen-VL publishes for its benchmarks, to ask and to train on.

    ::

        {"image": "a.png", "question": "Who is the author?", "question_id": 7, "answer": "Ann"}

    `answer` may be a list, of which the first is trained.

    Args:
        path: JSONL.
        task: name of the benchmark.
        request: on a line behind the question, or text with `{}` in the place of the question.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    def __init__(self, path: str | Path, task: str, request: str = "{} Answer:", **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.task, self.request = task, request

    def chat(self, fields: Fields) -> dict[str, Any]:
        found = fields.need("answer", (str, list), "a text or a list of texts")
        answers = fields.texts("answer") if isinstance(found, list) else [fields.text("answer")]
        question = asked(fields.text("question"), self.request)
        return {
            "images": [fields.text("image")],
            "messages": exchange(after_image(question), [text(answers[0])]),
            "answers": answers,
        } | ({"id": fields.record["question_id"]} if "question_id" in fields.record else {})


class QwenReferring(RecordSource):
    """RefCOCO, RefCOCO+ and RefCOCOg in the files that Qwen-VL publishes: one expression and its box a line.

    ::

        {"image": "a.jpg", "sent": "the left dog", "bbox": [x0, y0, x1, y1], "width": 640, "height": 480}

    Questions alone: the box is the only one of `answers`, in LLaVA's form and not rounded, to be judged with
    `vlm.metrics.GroundingAccuracy` and `references: llava`.

    Args:
        path: JSONL.
        request: text with `{}` in the place of the expression.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "refcoco"

    def __init__(self, path: str | Path, request: str = "<ref>{}</ref><box>", **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.request = request

    def chat(self, fields: Fields) -> dict[str, Any]:
        values = fields.numbers("bbox", 4)
        sides = [fields.length("width"), fields.length("height")] * 2
        if values[0] >= values[2] or values[1] >= values[3]:
            sides = sides[:2]
            found = f"'bbox' {values} must be left, top, right, bottom in an image of {sides} pixels"
            raise fields.error(found, kind="region")
        shares = ", ".join(f"{value / side:.9f}" for value, side in zip(values, sides, strict=True))
        content = after_image(asked(fields.text("sent"), self.request))
        return {
            "images": [fields.text("image")],
            "messages": [{"role": "user", "content": content}],
            "answers": [f"[{shares}]"],
        }


def _place(kind: str, value: str, *, image: int) -> Part:
    """A place in thousandths of an image as a part of a message."""
    found = f"<{kind}>{shorten(value)}</{kind}>"
    points = [tuple(map(int, point)) for point in _POINT.findall(value)]
    if len(points) != _NUM_POINTS[kind] or not _POINTS.fullmatch(value):
        form = ",".join(["(x,y)"] * _NUM_POINTS[kind])
        raise UserError(f"{found} is no {kind}; write <{kind}>{form}</{kind}> in whole numbers", kind="region")
    if max(map(max, points)) > _THOUSAND:
        raise UserError(f"{found} lies outside of its image; places are counted in 0..{_THOUSAND}", kind="region")
    if kind == "box" and not (points[0][0] < points[1][0] and points[0][1] < points[1][1]):
        raise UserError(f"{found} is empty or inverted; give left, top, right, bottom", kind="region")
    return {"type": kind, kind: [number / _THOUSAND for point in points for number in point], "image": image}
