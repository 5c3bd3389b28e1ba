"""Screens and what is done on them: Mind2Web, Android in the Wild, ScreenSpot."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.data.sources.base import JsonSource
from vlm.data.sources.fields import Fields, Record, read_object
from vlm.data.sources.forms import read_with
from vlm.data.sources.json_records import RecordFile
from vlm.data.sources.record_sources import ObjectSource, Part, RecordSource, after_image, box, exchange, text
from vlm.data.sources.requests import asked, filled
from vlm.errors import UserError
from vlm.prompts.operations import MARK
from vlm.sample import Sample, parse_image

STEP = 'What steps do I need to take to "{task}"? Previous steps: {previous}(with grounding)'
FIND = 'What steps do I need to take to "{}"?(with grounding)'
"""The first of CogAgent's published requests; how it was asked with steps before is not published."""
_HISTORY = 4
_CLICKS = ("CLICK", "HOVER", "ENTER")
_DUAL_POINT, _TYPE = 4, 3
_TAP = 0.04
_PRESSES = {5: "PRESS BACK", 6: "PRESS HOME", 7: "PRESS ENTER", 10: "TASK COMPLETE", 11: "TASK IMPOSSIBLE"}


class StepSource(ObjectSource):
    """Steps of tasks on screens, a sample each: the screen, the task and the steps before it; its operation.

    The answer is `Grounded Operation:` with the element, the operation and its box, which each system writes in its own
    form (`vlm.prompts.operations`).

    Args:
        path: the file.
        request: text with `{task}` and `{previous}` in the places of the task and of the last steps.
        history: how many steps before it are told.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    def __init__(self, path: str | Path, request: str = STEP, history: int = _HISTORY, **keywords: Any) -> None:
        super().__init__(path, **keywords)
        if "{task}" not in request:
            raise UserError(f"{type(self).__name__}: request {request!r} has no {{task}}; write it where the task goes")
        if history < 0:
            raise UserError(f"{type(self).__name__}: history is {history}; it must be at least 0")
        self.request, self.history = request, history

    def asking(self, task: str, before: list[str]) -> list[Part]:
        """The screen and the task."""
        last = before[-self.history :] if self.history else []
        previous = " ".join(f"{at}. {step}" for at, step in enumerate(last, start=1)) or "none."
        return after_image(filled(self.request, task=task, previous=f"{previous} "))


class Mind2Web(StepSource):
    """Mind2Web (Deng et al., 2023) with screenshots and boxes, as SeeClick publishes it.

    ::

        [{"annotation_id": "8f62", "confirmed_task": "Find ...", "action_reprs": ["[button] Apply -> CLICK", ...],
          "actions": [{"action_uid": "f3ae", "operation": {"op": "TYPE", "original_op": "TYPE", "value": "New York"},
                       "bbox": {"x": 60.0, "y": 163.0, "width": 146.2, "height": 34.0}, ...}]}]

    Hovering and pressing Enter are a click, as there. What of a box lies outside of its screenshot is cut off. Steps
    without a box are in no sample; every command says how many there are.

    Args:
        path: JSON list, `mind2web_data_{train,test_task,test_website,test_domain}.json`.
        image_pattern: file name from `{annotation_id}` and `{action_uid}`.
        **keywords: as in `StepSource`.
    """

    task = "mind2web"

    def __init__(
        self, path: str | Path, image_pattern: str = "{annotation_id}-{action_uid}.jpg", **keywords: Any
    ) -> None:
        super().__init__(path, **keywords)
        self.image_pattern = image_pattern

    def records(self) -> Iterator[Record]:
        self._num_without_box = 0
        file = RecordFile(self.path, flag=bool)
        for index in range(len(file)):
            fields = Fields(file[index], identity=index, source=self.path)
            with read_with("Mind2Web", file[index]):
                task, identity = fields.text("confirmed_task"), fields.text("annotation_id")
                told, actions = fields.texts("action_reprs"), fields.objects("actions")
            if len(told) != len(actions):
                raise fields.error(f"{len(told)} 'action_reprs' but {len(actions)} 'actions'; fetch the file again")
            told = [" ".join(one.split()) for one in told]
            for at, action in enumerate(actions):
                if not action.has("bbox"):
                    self._num_without_box += 1
                    continue
                names = {"annotation_id": identity, "action_uid": action.text("action_uid")}
                yield {
                    "id": "-".join(names.values()),
                    "group": identity,
                    "image": filled(self.image_pattern, **names),
                    "task": task,
                    "before": told[:at],
                    "element": told[at].rpartition("->")[0].strip(),
                    "operation": action.value("operation"),
                    "bbox": action.value("bbox"),
                }

    def notes(self) -> list[str]:
        len(self)  # reads the file
        left_out = self._num_without_box
        return [f"{self.name}: {left_out:,} steps without a 'bbox' left out"] if left_out else []

    def chat(self, fields: Fields) -> dict[str, Any]:
        place, operation = (
            Fields(fields.value(key), identity=fields.identity, source=self.path) for key in ("bbox", "operation")
        )
        left, top = (place.need(key, (int, float), "a number of pixels") for key in ("x", "y"))
        image = fields.text("image")
        corners = [left, top, left + place.length("width"), top + place.length("height")]
        shares = _shares(self, fields, image, corners)
        action = operation.text("op").upper()
        done = "CLICK" if action in _CLICKS else f"{action}: {operation.words('value')}"
        words = f"{MARK}{fields.text('element')} -> {done} at the box "
        asking = self.asking(fields.text("task"), fields.value("before"))
        return {
            "images": [image],
            "messages": exchange(asking, [text(words), box(shares, unit="share")]),
            "answers": [f"{words}{_written(shares)}"],
            "group": fields.text("group"),
        }


class AndroidInTheWild(StepSource):
    """Android in the Wild (Rawles et al., 2023) as SeeClick publishes it: the screens as images, the episodes as JSON.

    ::

        {"googleapps": [[{"img_filename": "googleapps/7_0", "goal": "turn off javascript", "action_type_id": 4,
                          "touch": [x, y], "lift": [x, y], "type_text": "", "annot_position": [y, x, height, width, ...]
                          }, ...], ...], "general": [...], ...}

    All places are shares. A tap is written with the box of the smallest element around it, or as a point where it is on
    none; a drag as the direction that shows more (finger up: `SCROLL DOWN`); the rest as `TYPE: hello`, `PRESS BACK`,
    `PRESS HOME`, `PRESS ENTER`, `TASK COMPLETE`, `TASK IMPOSSIBLE`. CogAgent's words for them are not published.
    `answers` has what `vlm.metrics.ActionMatching` compares.

    Args:
        path: `aitw_data_{train,val,test}.json`.
        subset: one of general, single, webshopping, install and googleapps; each is reported by itself, and CogAgent
            takes a tenth of googleapps.
        image_pattern: file name from `img_filename`.
        name: of the source; the subset where nothing else is said.
        **keywords: as in `StepSource`.
    """

    task = "aitw"

    def __init__(
        self,
        path: str | Path,
        subset: str,
        image_pattern: str = "{}.png",
        name: str | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(path, name=subset if name is None else name, **keywords)
        self.subset, self.image_pattern = subset, image_pattern

    def records(self) -> Iterator[Record]:
        content = read_object(self.path)
        if not isinstance(content.get(self.subset), list):
            raise UserError(f"{self.path}: has no subset {self.subset!r}; it has {', '.join(sorted(content))}")
        for number, episode in enumerate(content[self.subset]):
            before: list[str] = []
            if not isinstance(episode, list):
                raise UserError(f"{self.path}: episode {number} of {self.subset!r} is no list of steps; fetch it again")
            for at, step in enumerate(episode):
                fields = Fields(step, identity=f"{self.subset}/{number}/{at}", source=self.path)
                done, _ = _action(fields)
                yield {**step, "id": fields.identity, "before": list(before), "group": f"{self.subset}/{number}"}
                before.append(done)

    def chat(self, fields: Fields) -> dict[str, Any]:
        done, place = _action(fields)
        answer = [text(f"{MARK}{done}"), *([text(f" at the {place['type']} "), place] if place else [])]
        reference = {
            "action_type": fields.number("action_type_id"),
            "touch": fields.record.get("touch"),
            "lift": fields.record.get("lift"),
            "boxes": _elements(fields),
        }
        return {
            "images": [fields.file_name(self.image_pattern, "img_filename")],
            "messages": exchange(self.asking(fields.text("goal"), fields.value("before")), answer),
            "answers": [json.dumps(reference)],
            "group": fields.text("group"),
        }


class ScreenSpot(RecordSource):
    """ScreenSpot (Cheng et al., "SeeClick", 2024): an instruction and the element of a screen that it means.

    ::

        [{"img_filename": "a.png", "bbox": [x, y, width, height], "instruction": "open settings", "data_type": "icon"}]

    Questions alone; the element's box is the only one of `answers`, in LLaVA's form and not rounded, to be judged with
    `vlm.metrics.ElementAccuracy`.

    Args:
        path: JSON list or JSONL, `screenspot_{mobile,desktop,web}.json`.
        request: text with `{}` in the place of the instruction.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "screen_spot"
    image_key = "img_filename"

    def __init__(self, path: str | Path, request: str = FIND, **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.request = request

    def chat(self, fields: Fields) -> dict[str, Any]:
        x, y, width, height = fields.numbers("bbox", 4)
        image = fields.text("img_filename")
        shares = _shares(self, fields, image, [x, y, x + width, y + height])
        content = after_image(asked(fields.text("instruction"), self.request))
        return {
            "images": [image],
            "messages": [{"role": "user", "content": content}],
            "answers": [_written(shares)],
            "group": fields.words("data_type") or None,
        }


def _shares(source: JsonSource, fields: Fields, name: str, corners: list[float]) -> list[float]:
    """A box of pixels in shares of its image, without what lies outside of it."""
    image = parse_image(name, error=fields.error, image_root=source.image_root, max_pixels=source.max_pixels)
    width, height = image.size(Sample(fields.identity, (), source=fields.source))
    shares = [min(max(value / side, 0.0), 1.0) for value, side in zip(corners, 2 * (width, height), strict=True)]
    if shares[0] >= shares[2] or shares[1] >= shares[3]:
        raise fields.error(
            f"'bbox' {[round(value) for value in corners]} (left, top, right, bottom) shows nothing of its image of "
            f"{width}x{height} pixels; remove the record",
            kind="region",
        )
    return shares


def _written(shares: list[float]) -> str:
    """LLaVA's form of a box, not rounded."""
    return "[" + ", ".join(f"{share:.9f}" for share in shares) + "]"


def _action(fields: Fields) -> tuple[str, Part | None]:
    """A step of Android in the Wild in words, and the place of a tap."""
    kind = fields.number("action_type_id")
    if kind in _PRESSES:
        return _PRESSES[kind], None
    if kind == _TYPE:
        return f"TYPE: {fields.words('type_text')}", None
    if kind != _DUAL_POINT:
        known = ", ".join(map(str, sorted((_TYPE, _DUAL_POINT, *_PRESSES))))
        raise fields.error(f"'action_type_id' {kind} means nothing; there are {known}")
    (x, y), (to_x, to_y) = fields.numbers("touch", 2), fields.numbers("lift", 2)
    across, down = to_x - x, to_y - y
    if math.hypot(across, down) > _TAP:
        vertical = abs(down) >= abs(across)
        shown = ("DOWN" if down < 0 else "UP") if vertical else ("RIGHT" if across < 0 else "LEFT")
        return f"SCROLL {shown}", None
    around = [
        (height * width, [left, top, left + width, top + height])
        for top, left, height, width in _elements(fields)
        if top <= y <= top + height and left <= x <= left + width and min(height, width) > 0
    ]
    if around:
        return "CLICK", box([min(max(value, 0.0), 1.0) for value in min(around)[1]], unit="share")
    return "CLICK", {"type": "point", "point": [min(max(value, 0.0), 1.0) for value in (x, y)]}


def _elements(fields: Fields) -> list[list[float]]:
    """y, x, height and width of a screen's elements."""
    flat = fields.record.get("annot_position") or []
    if not isinstance(flat, list) or len(flat) % 4 or not all(isinstance(value, int | float) for value in flat):
        raise fields.error("'annot_position' must be a list of four numbers for each element: y, x, height, width")
    return [flat[at : at + 4] for at in range(0, len(flat), 4)]
