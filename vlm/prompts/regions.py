"""How the systems write places in an image as text, and how they are read back from what a system says.

Boxes, quads and points are parts of a message (`vlm.sample.RegionPart`) until a sample is encoded: only then is it
known how the image is cut, padded or mirrored, and in which of these forms its places are written.
"""

import dataclasses
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, NamedTuple

from vlm.errors import UserError
from vlm.geometry import Box, Point, Points, View, bounds, clipped, corners
from vlm.sample import Message, Part, RefPart, RegionKind, RegionPart, Sample, TextPart

_NUMBER = r"\s*(-?(?:\d+(?:\.\d+)?|\.\d+))\s*"
_PAIR = rf"\({_NUMBER},{_NUMBER}\)"
_THOUSAND = 1000


class Region(NamedTuple):
    """A place that was read from a text.

    Attributes:
        kind: what it is.
        points: of it, in shares of the view; a box has its top left and bottom right corner.
    """

    kind: RegionKind
    points: Points


class RegionForm(ABC):
    """A system's way to write regions. Points arrive and leave in shares of the view."""

    name: str

    def ref(self, text: str) -> str:
        """The phrase that the regions behind it belong to."""
        return text

    @abstractmethod
    def write(self, kind: RegionKind, regions: Sequence[Points], *, size: tuple[float, float]) -> str:
        """Neighbouring regions of one kind.

        Args:
            size: of the view in pixels.

        Raises:
            UserError: the system has no form for this kind.
        """

    @abstractmethod
    def find(self, text: str, *, size: tuple[float, float] | None = None) -> list[Region]:
        """All regions in a text, in order, whether they make sense or not.

        Args:
            size: of the view in pixels, for forms that count in pixels.
        """

    def _refuse(self, kind: RegionKind) -> UserError:
        return UserError(
            f"templates with regions of form {self.name!r} cannot write a {kind}; turn it into a box", kind="region"
        )


class LlavaRegions(RegionForm):
    """LLaVA-1.5's `[0.12, 0.30, 0.55, 0.80]`: shares with two decimals, counted from the padded square.

    Published for boxes alone; a quad is written as its four corners and a point as `[0.12, 0.30]` in the same way.
    """

    name = "llava"
    _list = re.compile(rf"\[{_NUMBER}((?:,{_NUMBER})+)\]")
    _kinds: ClassVar[dict[int, RegionKind]] = {1: "point", 2: "box", 4: "quad"}

    def write(self, kind: RegionKind, regions: Sequence[Points], *, size: tuple[float, float]) -> str:
        written = (", ".join(f"{value:.2f}" for point in points for value in point) for points in regions)
        return ", ".join(f"[{text}]" for text in written)

    def find(self, text: str, *, size: tuple[float, float] | None = None) -> list[Region]:
        lists = (re.findall(_NUMBER, match.group()) for match in self._list.finditer(text))
        pairs = (_pairs(map(float, values)) for values in lists if len(values) % 2 == 0)
        return [Region(self._kinds[len(points)], points) for points in pairs if len(points) in self._kinds]


class QwenRegions(RegionForm):
    """Qwen-VL's `<ref>a dog</ref><box>(120,300),(550,800)</box>`: whole numbers in [0, 1000) of the image.

    The encoder was never published; cutting off, as here, and dividing by a thousand stays within a unit of the
    examples in the paper. Published readers disagree: what draws boxes divides by 1000 (`tokenization_qwen.py`), what
    judges them by 999 (`eval_mm/evaluate_grounding.py`).

    Args:
        right: the number that is read as the right or lower edge of the image.
    """

    _part = re.compile(rf"{_PAIR}(?:\s*,\s*{_PAIR}){{0,3}}")

    def __init__(self, name: str = "qwen", *, right: int = _THOUSAND) -> None:
        self.name = name
        self.right = right

    def ref(self, text: str) -> str:
        return f"<ref>{text}</ref>"

    def write(self, kind: RegionKind, regions: Sequence[Points], *, size: tuple[float, float]) -> str:
        if kind == "point":
            raise self._refuse(kind)
        written = (",".join(f"({_thousandths(x)},{_thousandths(y)})" for x, y in points) for points in regions)
        return "".join(f"<{kind}>{text}</{kind}>" for text in written)

    def find(self, text: str, *, size: tuple[float, float] | None = None) -> list[Region]:
        found: list[Region] = []
        for match in self._part.finditer(text):
            points = _pairs(float(value) / self.right for value in re.findall(_NUMBER, match.group()))
            if len(points) in (2, 4):
                found.append(Region("box" if len(points) == 2 else "quad", points))
        return found


class CogRegions(RegionForm):
    """CogVLM's and CogAgent's `[[120,300,550,800]]`: three digits each, in [0, 1000); `;` between several boxes."""

    name = "cogvlm"
    _outer = re.compile(r"\[\[([^\[\]]+)\]\]")

    def write(self, kind: RegionKind, regions: Sequence[Points], *, size: tuple[float, float]) -> str:
        if kind == "quad":
            raise self._refuse(kind)
        written = (",".join(f"{_thousandths(value):03d}" for point in points for value in point) for points in regions)
        return "[[" + ";".join(written) + "]]"

    def find(self, text: str, *, size: tuple[float, float] | None = None) -> list[Region]:
        found: list[Region] = []
        for match in self._outer.finditer(text):
            for part in match.group(1).split(";"):
                values = part.split(",")
                if len(values) in (2, 4) and all(re.fullmatch(_NUMBER, value) for value in values):
                    points = _pairs(float(value) / _THOUSAND for value in values)
                    found.append(Region("box" if len(points) == 2 else "point", points))
        return found


class FuyuRegions(RegionForm):
    """Fuyu's `<box>388, 428, 404, 488</box>` (top, left, bottom, right) and `<point>x, y</point>`.

    Half the pixels of the image after it was scaled down to fit; Fuyu's tokenizer has a token for every number.
    """

    name = "fuyu"
    _part = re.compile(rf"<(box|point)>{_NUMBER},{_NUMBER}(?:,{_NUMBER},{_NUMBER})?</(?:box|point)>")

    def write(self, kind: RegionKind, regions: Sequence[Points], *, size: tuple[float, float]) -> str:
        if kind == "quad":
            raise self._refuse(kind)
        width, height = size
        texts = []
        for points in regions:
            # nine decimals: 25 of 39 pixels are a share of which the half is 12.500000000000002
            halves = [(round(round(x * width / 2, 9)), round(round(y * height / 2, 9))) for x, y in points]
            # y first in boxes, x first in points: as published
            values = [value for x, y in halves for value in ((y, x) if kind == "box" else (x, y))]
            texts.append(f"<{kind}>{', '.join(map(str, values))}</{kind}>")
        return "".join(texts)

    def find(self, text: str, *, size: tuple[float, float] | None = None) -> list[Region]:
        width, height = size if size is not None else (2.0, 2.0)
        found: list[Region] = []
        for match in self._part.finditer(text):
            values = [2 * float(value) for value in match.groups()[1:] if value is not None]
            if match.group(1) == "box" and len(values) == 4:
                y0, x0, y1, x1 = values
                found.append(Region("box", corners((x0 / width, y0 / height, x1 / width, y1 / height))))
            elif match.group(1) == "point" and len(values) == 2:
                found.append(Region("point", ((values[0] / width, values[1] / height),)))
        return found


LLAVA = LlavaRegions()
REGION_FORMS: dict[str, RegionForm] = {
    form.name: form for form in (LLAVA, QwenRegions(), QwenRegions("qwen_999", right=999), CogRegions(), FuyuRegions())
}


def find_boxes(text: str, form: RegionForm, *, size: tuple[float, float] | None = None) -> list[Box]:
    """The boxes in a text that can be drawn: inside the view, not inverted and not empty."""
    boxes = [points[0] + points[1] for kind, points in form.find(text, size=size) if kind == "box"]
    return [box for box in boxes if min(box) >= 0 and max(box) <= 1 and box[0] < box[2] and box[1] < box[3]]


def write_regions(sample: Sample, form: RegionForm, *, view: Callable[[int], View]) -> Sample:
    """The sample with all its phrases and regions written out as text.

    Where the last answer holds regions and the sample names no `answers`, the written answer becomes its reference.

    Args:
        view: what the system sees of image number k; asked only for images that have regions.

    Raises:
        SampleError: a region outside of the image, or of which the view shows nothing; a kind without a form.
    """
    if not any(isinstance(part, RefPart | RegionPart) for message in sample.messages for part in message.content):
        return sample
    messages = tuple(
        dataclasses.replace(message, content=tuple(_joined(_written(message, sample, form, view))))
        for message in sample.messages
    )
    answers = sample.answers
    if not answers and messages[-1].role == "assistant":
        answers = (("".join(part.text for part in messages[-1].content if isinstance(part, TextPart)), 1.0),)
    return dataclasses.replace(sample, messages=messages, answers=answers)


def _written(message: Message, sample: Sample, form: RegionForm, view: Callable[[int], View]) -> Iterable[Part]:
    def together(part: Part) -> object:
        return (part.kind, part.image) if isinstance(part, RegionPart) else id(part)

    for _, group in itertools.groupby(message.content, key=together):
        parts = list(group)
        first = parts[0]
        if isinstance(first, RefPart):
            yield TextPart(form.ref(first.text))
        elif isinstance(first, RegionPart):
            seen = view(first.image)
            regions = [_in_view(part, sample, seen) for part in parts if isinstance(part, RegionPart)]
            try:
                yield TextPart(form.write(first.kind, regions, size=seen.size))
            except UserError as error:
                raise sample.error(str(error), kind=error.kind) from error
        else:
            yield first


def _in_view(region: RegionPart, sample: Sample, view: View) -> Points:
    points = region.points
    if region.unit != "share":
        width, height = sample.images[region.image].size(sample)
        if region.unit == "pixel" and (max(x for x, _ in points) > width or max(y for _, y in points) > height):
            raise sample.error(
                f"{region.kind} {_numbers(points)} lies outside of its picture of {width}x{height} pixels; "
                "correct it, or give shares with 'unit': 'share'",
                kind="region",
            )
        points = region.shares(width, height)
    moved = view.placement(points)
    if region.kind == "box":
        moved = corners(bounds(moved))
    elif region.kind == "quad" and view.placement.scale_x < 0:
        # read on from the top left corner of the mirrored text
        moved = (moved[1], moved[0], moved[3], moved[2])
    inside = clipped(moved)
    left, top, right, bottom = bounds(inside)
    hidden = inside != moved if region.kind == "point" else left >= right or top >= bottom
    if hidden:
        raise sample.error(
            f"{region.kind} {_numbers(region.points)} lies outside of what the system sees of the picture; pad or "
            "squash pictures with regions instead of cropping them",
            kind="region",
        )
    return inside


def _joined(parts: Iterable[Part]) -> Iterable[Part]:
    text: list[str] = []
    for part in parts:
        if isinstance(part, TextPart):
            text.append(part.text)
            continue
        if text:
            yield TextPart("".join(text))
            text.clear()
        yield part
    if text:
        yield TextPart("".join(text))


def _pairs(values: Iterable[float]) -> tuple[Point, ...]:
    flat = iter(values)
    return tuple(zip(flat, flat, strict=False))


def _thousandths(share: float) -> int:
    # 1e-9: 0.29 * 1000 is 289.99999999999994
    return min(int(share * _THOUSAND + 1e-9), _THOUSAND - 1)


def _numbers(points: Points) -> str:
    return "[" + ", ".join(f"{value:g}" for point in points for value in point) + "]"
