"""Bars beside each other, as a picture."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw

from vlm.drawing.fonts import typeset

_PAPER, _INK, _OURS, _THEIRS = "#ffffff", "#1f2328", "#1b4b91", "#afb8c1"
_ROW, _LEFT, _BAR, _SIZE = 24, 190, 300, 14


def draw_bars(path: Path, groups: Mapping[str, Mapping[str, float]], *, unit: str) -> None:
    """Horizontal bars in groups with titles; those whose names begin with `vlm` stand out.

    Args:
        groups: {title: {name: value}}.
    """
    height = _ROW * sum(len(group) + 2 for group in groups.values())
    page = Image.new("RGB", (_LEFT + _BAR + 120, height), _PAPER)
    pen = ImageDraw.Draw(page)

    def write(text: str, x: float, y: float, anchor: str) -> None:
        font = typeset(text, size=_SIZE, width=page.width, max_lines=1).font
        pen.text((x, y + _ROW / 2), text, fill=_INK, font=font, anchor=anchor)

    y = 0
    for title, group in groups.items():
        write(f"{title} ({unit})", 8, y, "lm")
        y += _ROW
        for name, value in group.items():
            write(name, _LEFT - 8, y, "rm")
            color = _OURS if name.startswith("vlm") else _THEIRS
            end = _LEFT + _BAR * value / max(group.values())
            pen.rectangle((_LEFT, y + 4, end, y + _ROW - 4), fill=color)
            write(f"{value:,.0f}", end + 6, y, "lm")
            y += _ROW
        y += _ROW
    page.save(path)
