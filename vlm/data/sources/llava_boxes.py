"""Boxes that stand as text in files of LLaVA's kind, as places in an image."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_SHARE = r"(0?\.\d+|[01](?:\.0+)?)"
_BOX = re.compile(r"\[" + ", ".join([_SHARE] * 4) + r"\]")


def mark_places(messages: Sequence[dict[str, Any]]) -> bool:
    """Puts a part in the place of each box in the texts of a conversation with images.

    A box is in the image that was shown last, counted from its padded square; four numbers that are no box stay text.

    Returns:
        Whether the last message got one.
    """
    shown, seen, marked = 0, 0, False
    for message in messages:
        parts: list[dict[str, Any]] = []
        marked = False
        for part in message["content"]:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str) or part.get("type") != "text":
                if isinstance(part, Mapping) and part.get("type") == "image":
                    shown, seen = seen, seen + 1
                parts.append(part)
                continue
            end = 0
            for found in _BOX.finditer(part["text"]):
                values = [float(value) for value in found.groups()]
                if values[0] >= values[2] or values[1] >= values[3]:
                    continue
                if found.start() > end:
                    parts.append({"type": "text", "text": part["text"][end : found.start()]})
                parts.append({"type": "box", "box": values, "image": shown, "unit": "square"})
                end, marked = found.end(), True
            if part["text"][end:]:
                parts.append({"type": "text", "text": part["text"][end:]})
        message["content"] = parts
    return marked


def says_again(answers: Any, text: str) -> bool:
    """Whether the only one of a record's `answers` is this text."""
    if not isinstance(answers, list) or len(answers) != 1:
        return False
    (answer,) = answers
    return (answer.get("text") if isinstance(answer, Mapping) else answer) == text
