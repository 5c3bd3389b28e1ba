"""Figures for notebooks: images beside each other, and curves."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from vlm.drawing.fonts import typeset

_PAPER, _INK, _FAINT, _LINE = "#ffffff", "#1f2328", "#6e7781", "#d0d7de"
_COLORS = ("#1b4b91", "#d4570a", "#1a7f37", "#8250df")
_SIZE, _ROW, _GAP, _MARGIN = 14, 19, 12, 8


def side_by_side(images: Sequence[tuple[str, Image.Image]], *, side: int = 150, columns: int = 6) -> Image.Image:
    """Images in rows with a caption under each.

    Args:
        images: (caption, image); captions may have several lines.
        side: of the longer side of an image in pixels.
        columns: of a row at most.
    """
    assert images
    cells = []
    for caption, image in images:
        scale = side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        method = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
        shown = image.convert("RGB").resize(size, method)
        cells.append((shown, typeset(caption, size=_SIZE, width=side, max_lines=8)))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(image.height + _ROW * len(text.lines) + _GAP for image, text in row) for row in rows]
    width = min(columns, len(cells)) * (side + _GAP) - _GAP + 2 * _MARGIN
    page = Image.new("RGB", (width, sum(heights) + 2 * _MARGIN), _PAPER)
    pen = ImageDraw.Draw(page)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for at, (image, text) in enumerate(row):
            left = _MARGIN + at * (side + _GAP)
            page.paste(image, (left, top))
            pen.rectangle((left - 1, top - 1, left + image.width, top + image.height), outline=_LINE)
            for number, line in enumerate(text.lines):
                pen.text((left, top + image.height + 4 + _ROW * number), line, fill=_INK, font=text.font)
        top += height
    return page


def with_grid(image: Image.Image, *, columns: int, rows: int, side: int = 420) -> Image.Image:
    """An image with lines that cut it into `columns` x `rows` parts."""
    scale = side / max(image.size)
    method = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    shown = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)), method)
    pen = ImageDraw.Draw(shown)
    for at in range(1, columns):
        pen.line((shown.width * at / columns, 0, shown.width * at / columns, shown.height), fill=_COLORS[0], width=2)
    for at in range(1, rows):
        pen.line((0, shown.height * at / rows, shown.width, shown.height * at / rows), fill=_COLORS[0], width=2)
    return shown


def draw_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], *, title: str, width: int = 560, height: int = 240
) -> Image.Image:
    """Lines over optimizer steps, from zero.

    Args:
        curves: {name: (step, value) in order}.
    """
    points = [point for curve in curves.values() for point in curve]
    last, most = max(x for x, _ in points) or 1, max(y for _, y in points) or 1
    page = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(page)
    left, right, top, bottom = 48, width - 16, 34, height - 28

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / last, bottom - (bottom - top) * y / most

    def write(text: str, at: tuple[float, float], *, color: str, anchor: str) -> None:
        pen.text(at, text, fill=color, font=typeset(text, size=_SIZE, width=width, max_lines=1).font, anchor=anchor)

    write(title, (left, 8), color=_INK, anchor="la")
    for share in (0, 0.5, 1):
        y = place(0, most * share)[1]
        pen.line((left, y, right, y), fill=_LINE)
        write(f"{most * share:.2g}", (left - 6, y), color=_FAINT, anchor="rm")
    for x in (0, last):
        write(f"{x:g}", place(x, 0), color=_FAINT, anchor="ra" if x else "la")
    for (name, curve), color in zip(curves.items(), _COLORS, strict=False):
        pen.line([place(*point) for point in curve], fill=color, width=3, joint="curve")
        x, y = place(*curve[-1])
        write(name, (x, max(top, y - 8)), color=color, anchor="rb")
    return page
