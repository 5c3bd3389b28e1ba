"""The file that Qwen-VL's authors fine-tune from."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from vlm.data.formats.base import IMAGE, Fields, Part, RecordSource, text

_PICTURE = re.compile(r"Picture (\d+): ?<img>(.*?)</img>\n?")
_PLACE = re.compile(r"<ref>(.*?)</ref>|<(box|quad)>((?:\(\d+,\d+\),?)+)</(?:box|quad)>", re.DOTALL)
_ROLES = {"user": "user", "assistant": "assistant", "system": "system"}
_SCALE = 1000


class QwenJson(RecordSource):
    """Conversations of Qwen-VL's `finetune.py` (Bai et al., 2023).

    ::

        [{"id": "identity_0", "conversations": [
            {"from": "user", "value": "Picture 1: <img>a.jpg</img>\\nWhere is the shirt?"},
            {"from": "assistant", "value": "<ref>the shirt</ref><box>(588,499),(725,789)</box>"}]}]

    Pictures are counted through the conversation. Phrases and places become parts of the message; a place is in the
    picture that was shown last.

    Args:
        path: JSON list or JSONL.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    @staticmethod
    def _flag(record: Mapping[str, Any]) -> bool:
        turns = record.get("conversations")
        turns = turns if isinstance(turns, list) else []
        return any(isinstance(turn, Mapping) and "<img>" in str(turn.get("value")) for turn in turns)

    def chat(self, fields: Fields) -> dict[str, Any]:
        images: list[str] = []
        messages = []
        for turn in fields.objects("conversations"):
            role, value = turn.text("from"), turn.text("value")
            if role not in _ROLES:
                raise fields.error(f"unknown role 'from': {role!r}; use one of {', '.join(_ROLES)}")
            messages.append({"role": _ROLES[role], "content": list(self._parts(value, images, fields))})
        if not messages:
            raise fields.error("'conversations' is empty; remove the record")
        return {"images": images, "messages": messages}

    def _parts(self, value: str, images: list[str], fields: Fields) -> Iterator[Part]:
        end = 0
        for found in _PICTURE.finditer(value):
            yield from self._places(value[end : found.start()], images, fields)
            images.append(found[2])
            if int(found[1]) != len(images):
                raise fields.error(f"picture {len(images)} of the conversation is announced as 'Picture {found[1]}:'")
            yield IMAGE
            end = found.end()
        yield from self._places(value[end:], images, fields)

    def _places(self, value: str, images: list[str], fields: Fields) -> Iterator[Part]:
        if "<img>" in value:
            raise fields.error(f"a picture is not announced as 'Picture {len(images) + 1}: <img>...</img>'")
        end = 0
        for found in _PLACE.finditer(value):
            if found.start() > end:
                yield text(value[end : found.start()])
            end = found.end()
            if found[1] is not None:
                yield {"type": "ref", "text": found[1]}
                continue
            numbers = [int(number) for number in re.findall(r"\d+", found[3])]
            if len(numbers) != (4 if found[2] == "box" else 8) or max(numbers) > _SCALE:
                raise fields.error(f"{found[0]!r} is no {found[2]} of places in [0, {_SCALE})")
            if not images:
                raise fields.error(f"{found[0]!r} stands before any picture")
            shares = [number / _SCALE for number in numbers]
            yield {"type": found[2], found[2]: shares, "image": len(images) - 1, "unit": "share"}
        if value[end:]:
            yield text(value[end:])
