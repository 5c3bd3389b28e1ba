"""Metrics of agents that look at screens: elements, steps, actions."""

import json
import warnings
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm.batch import SampleInfo
from vlm.metrics.base import CorpusMetric, references, sample_error
from vlm.metrics.grounding import region_form
from vlm.prompts.operations import Operation, middle, read_operation
from vlm.prompts.regions import Region, RegionForm

_DUAL_POINT = 4
_ACTION_TYPES = {
    "TYPE": 3,
    "PRESS BACK": 5,
    "PRESS HOME": 6,
    "PRESS ENTER": 7,
    "TASK COMPLETE": 10,
    "TASK IMPOSSIBLE": 11,
}
_DRAGS = {
    "SCROLL DOWN": ((0.5, 0.8), (0.5, 0.2)),
    "SCROLL UP": ((0.5, 0.2), (0.5, 0.8)),
    "SCROLL LEFT": ((0.2, 0.5), (0.8, 0.5)),
    "SCROLL RIGHT": ((0.8, 0.5), (0.2, 0.5)),
}
"""Where the finger touches and lifts, (x, y)."""
_TAP, _NEAR, _LARGER = np.float32(0.04), np.float32(0.14), np.float32(1.4)
"""Android in the Wild's: what is still a tap, which taps are the same, and by how much boxes are enlarged."""


class _AgentMetric(CorpusMetric):
    """Answers in which a system names elements.

    Args:
        form: how the answers write places: a name in `vlm.prompts.regions.REGION_FORMS`, or a form.
        references: the same for the references.
    """

    missing = "no_element"
    _what = "name no element"

    def __init__(
        self, *, form: str | RegionForm = "cogvlm", references: str | RegionForm = "llava", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.form, self.reference_form = region_form("form", form), region_form("references", references)

    @abstractmethod
    def means(self, records: list[dict[str, Any]]) -> dict[str, float]:
        """The figures, by name."""

    def compute(self) -> dict[str, Tensor]:
        """float32[] each; says in one line which answers could not be read."""
        records = list(self.records())
        lost = [record for record in records if record["lost"] is not None]
        if lost:
            warnings.warn(
                f"{len(lost)} of {len(records)} answers {self._what} and count as wrong; the first is that to sample "
                f"{lost[0]['id']!r} of {lost[0]['source']}: {lost[0]['lost']!r}",
                stacklevel=2,
            )
        values = {**self.means(records), self.missing: _mean(record["lost"] is not None for record in records)}
        return {name: torch.tensor(value, device=self.device) for name, value in values.items()}

    def _base(self, prediction: str, sample: SampleInfo, *, lost: bool) -> dict[str, Any]:
        return {"id": sample.id, "source": sample.source, "lost": prediction[:80] if lost else None}

    def _targets(self, sample: SampleInfo) -> list[Region]:
        found = [region for text in references(sample) for region in self.reference_form.find(text)]
        boxes = [region for region in found if region.kind == "box"]
        if not boxes:
            raise sample_error(sample, f"no box in its answers {references(sample)}; write them as 'references' says")
        return boxes


class ElementAccuracy(_AgentMetric):
    """The share of answers whose first box or point lies on the right element: its middle is in the element's box.

    ScreenSpot's click accuracy (Cheng et al., "SeeClick", 2024), in all and by `group` (text, icon), in [0, 1].
    `no_element` is the share of answers without a box or point.
    """

    name = "element_accuracy"

    def record(self, prediction: str, sample: SampleInfo) -> Any:
        targets, found = self._targets(sample), self.form.find(prediction)
        is_right = bool(found) and any(_holds(target, middle(found[0])) for target in targets)
        return self._base(prediction, sample, lost=not found) | {"group": sample.group, "right": is_right}

    def means(self, records: list[dict[str, Any]]) -> dict[str, float]:
        groups = _by(records, "group")
        by_group = {f"{self.name}_{key}": _mean(r["right"] for r in groups[key]) for key in sorted(groups) if key}
        return {self.name: _mean(r["right"] for r in records)} | by_group


class StepSuccess(_AgentMetric):
    """Mind2Web's figures (Deng et al., 2023): each is the mean over tasks of the mean over a task's steps, in [0, 1].

    `element_accuracy`: the middle of the first box or point lies in a box of the references (there a person's element;
    choosing among candidates, as the paper has it, is not asked of a system that sees). `operation_f1`: shared words
    of the operation and its value, case aside. `step_success`: the element is right and F1 is 1. `task_success`: the
    share of tasks whose steps all are. `no_element`: the share of answers that name no operation or no element.

    `SampleInfo.group` is the task. References are operations too (`vlm.prompts.operations`); with several, any counts.
    """

    name = "step_success"

    def record(self, prediction: str, sample: SampleInfo) -> Any:
        targets = self._targets(sample)
        wanted = [read_operation(text, self.reference_form) for text in references(sample)]
        if None in wanted:
            raise sample_error(
                sample, f"no operation in its answers {references(sample)}; write '... -> CLICK at the box'"
            )
        answer = read_operation(prediction, self.form)
        point = answer.point if answer else None
        element = point is not None and any(_holds(target, point) for target in targets)
        f1 = max(_shared_words(answer, one) for one in wanted if one) if answer else 0.0
        return self._base(prediction, sample, lost=point is None) | {
            "task": sample.group or sample.id,
            "element": element,
            "f1": f1,
            "step": element and f1 == 1,
        }

    def means(self, records: list[dict[str, Any]]) -> dict[str, float]:
        tasks = list(_by(records, "task").values())
        keys = {"step_success": "step", "element_accuracy": "element", "operation_f1": "f1"}
        found = {name: _mean(_mean(r[key] for r in steps) for steps in tasks) for name, key in keys.items()}
        return found | {"task_success": _mean(all(r["step"] for r in steps) for steps in tasks)}


class ActionMatching(_AgentMetric):
    """Android in the Wild's matching score (Rawles et al., 2023; `action_matching.py`), the share of steps, in [0, 1].

    Taps match when they are within 0.14 of each other or in one element's box, enlarged by 1.4 of its size; drags when
    their longer axis is the same; everything else when its type is, whatever is typed. Counted in float32, as there.
    `no_action` is the share of answers that name no action, or a tap without a place.

    A reference is what `vlm.data.AndroidInTheWild` writes: `{"action_type", "touch": [x, y], "lift", "boxes": [[y, x,
    height, width]]}`.
    """

    name = "action_matching"
    missing = "no_action"
    _what = "name no action"

    def record(self, prediction: str, sample: SampleInfo) -> Any:
        try:
            reference = json.loads(references(sample)[0])
            wanted = (int(reference["action_type"]), reference["touch"], reference["lift"])
            boxes = np.array(reference["boxes"], dtype=np.float32).reshape(-1, 4)
        except (ValueError, KeyError, TypeError) as error:
            raise sample_error(sample, f"its answer is no action ({error}); read it with AndroidInTheWild") from error
        answer = read_operation(prediction, self.form)
        said = _gesture(answer) if answer else None
        is_right = said is not None and actions_match(said, wanted, boxes)
        return self._base(prediction, sample, lost=said is None) | {"right": is_right}

    def means(self, records: list[dict[str, Any]]) -> dict[str, float]:
        return {self.name: _mean(r["right"] for r in records)}


Action = tuple[int, Any, Any]
"""Type, touch (x, y) and lift."""


def actions_match(one: Action, other: Action, boxes: np.ndarray) -> bool:
    """Whether two actions lead to the same screen, as far as can be told.

    Args:
        boxes: float32[n, 4] of the screen's elements: y, x, height, width.
    """
    if one[0] != _DUAL_POINT or other[0] != _DUAL_POINT:
        return one[0] == other[0]
    points = np.array([one[1:], other[1:]], dtype=np.float32)  # action, touch or lift, x or y
    taps = [bool(np.linalg.norm(touch - lift) <= _TAP) for touch, lift in points]
    if taps[0] != taps[1]:
        return False
    if not taps[0]:
        return bool(
            np.argmax(np.abs(points[0, 1] - points[0, 0])[::-1]) == np.argmax(np.abs(points[1, 1] - points[1, 0])[::-1])
        )
    if np.linalg.norm(points[0, 0] - points[1, 0]) <= _NEAR:
        return True
    corner, size = boxes[:, :2], boxes[:, 2:]
    start = np.maximum(0, corner - _LARGER * size / 2)
    end = start + np.minimum(1, size + _LARGER * size)
    inside = [((start <= touch[::-1]) & (touch[::-1] <= end)).all(1) for touch in points[:, 0]]
    return bool((inside[0] & inside[1]).any())


def _gesture(operation: Operation) -> Action | None:
    if operation.action in _DRAGS:
        return _DUAL_POINT, *_DRAGS[operation.action]
    if operation.action == "CLICK":
        return (_DUAL_POINT, operation.point, operation.point) if operation.point else None
    kind = _ACTION_TYPES.get(operation.action)
    return None if kind is None else (kind, (-1.0, -1.0), (-1.0, -1.0))


def _holds(target: Region, point: tuple[float, float]) -> bool:
    (left, top), (right, bottom) = target.points
    return left <= point[0] <= right and top <= point[1] <= bottom


def _shared_words(one: Operation, other: Operation) -> float:
    """F1 of two sets of words, Mind2Web's `calculate_f1`."""
    said, wanted = ({operation.action, *operation.value.lower().split()} for operation in (one, other))
    shared = len(said & wanted)
    return 2 * shared / (len(said) + len(wanted))


def _by(records: Iterable[Mapping[str, Any]], key: str) -> dict[Any, list[Mapping[str, Any]]]:
    found: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        found[record[key]].append(record)
    return found


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else float("nan")
