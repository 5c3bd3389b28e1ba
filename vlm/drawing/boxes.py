"""Boxes on images: one way of drawing them for answers, panels and pages."""

from collections.abc import Iterable

from PIL import ImageDraw

from vlm.geometry import Box

COLORS = ("#e6194b", "#1b7f3b", "#4363d8", "#f58231", "#911eb4", "#008080")
_PAPER = "#ffffff"
_LABEL_SIZE = 14


def draw_boxes(
    pen: ImageDraw.ImageDraw, boxes: Iterable[tuple[str, Box]], *, scale: tuple[float, float], color: str | None = None
) -> None:
    """Outlines that are seen on any ground, with labels in their top left corners.

    Args:
        boxes: (label, box); an empty label is not drawn.
        scale: factors from the units of the boxes to pixels, across and down.
        color: of all boxes; None: each one another of `COLORS`.
    """
    across, down = scale
    for at, (label, (x0, y0, x1, y1)) in enumerate(boxes):
        ink = color if color is not None else COLORS[at % len(COLORS)]
        left, top, right, bottom = x0 * across, y0 * down, x1 * across, y1 * down
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=_PAPER, width=5)
        pen.rectangle((left, top, right, bottom), outline=ink, width=3)
        if label:
            width = pen.textlength(label, font_size=_LABEL_SIZE)
            pen.rectangle((left, top, left + width + 8, top + _LABEL_SIZE + 5), fill=ink)
            pen.text((left + 4, top + 1), label, fill=_PAPER, font_size=_LABEL_SIZE)
