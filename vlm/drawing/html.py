"""HTML pages that are one file: no script, no font and no image comes from elsewhere."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from vlm.checkpoints.files.atomic import atomic_file
from vlm.drawing.boxes import draw_boxes
from vlm.geometry import Box

_STYLE = """
:root { --ink: #1f2328; --faint: #656d76; --line: #d8dee4; --soft: #f6f8fa; --accent: #2f6feb;
  --good: #1a7f37; --good-paper: #d4f5dc; --bad: #b42318; --bad-paper: #fdecea;
  --mark: #1b4b91; --mark-paper: #dbe9fd; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 24px 64px; max-width: 1160px; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", Arial, sans-serif; }
h1 { margin: 0 0 2px; font-size: 26px; letter-spacing: -.01em; }
h2 { margin: 40px 0 12px; padding-bottom: 6px; font-size: 19px; border-bottom: 1px solid var(--line); }
h3 { margin: 22px 0 8px; font-size: 15px; }
p { margin: 4px 0 10px; }
.faint { color: var(--faint); } .small { font-size: 13px; } .nowrap { white-space: nowrap; }
.chip { display: inline-block; padding: 1px 9px; border-radius: 10px; font-size: 13px; background: var(--soft);
  border: 1px solid var(--line); }
.chip.good { color: var(--good); background: var(--good-paper); border-color: transparent; }
.chip.bad { color: var(--bad); background: var(--bad-paper); border-color: transparent; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(135px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; background: var(--soft); }
.tile b { display: block; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--faint); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px 6px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 3px 10px; align-items: center;
  font-size: 13px; font-variant-numeric: tabular-nums; }
.bars .from { text-align: right; color: var(--faint); }
.bars i { display: block; height: 14px; min-width: 2px; border-radius: 3px; background: #8db4f2; }
.card { margin: 12px 0; padding: 14px 16px; border: 1px solid var(--line); border-radius: 8px; break-inside: avoid; }
.cards { display: grid; align-items: start; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 12px; }
.cards .card { margin: 0; min-width: 0; }
.head { display: flex; flex-wrap: wrap; gap: 4px 10px; align-items: baseline; margin-bottom: 8px; }
.head b { overflow-wrap: anywhere; }
.reason { color: var(--bad); overflow-wrap: anywhere; }
.pictures { display: flex; flex-wrap: wrap; gap: 10px; margin: 8px 0; }
figure { margin: 0; } figure img { display: block; border: 1px solid var(--line); border-radius: 4px; max-width: 100%; }
figcaption { color: var(--faint); font-size: 12px; margin-top: 2px; }
.broken { display: flex; width: 150px; height: 110px; padding: 10px; align-items: center; justify-content: center;
  text-align: center; font-size: 12px; color: var(--bad); background: var(--bad-paper); border-radius: 4px;
  overflow-wrap: anywhere; overflow: hidden; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 14px; background: var(--soft); padding: 8px 10px;
  border-radius: 6px; margin: 8px 0 0; max-height: 14em; overflow: auto; }
.tokens { font: 14px/1.9 ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, "Noto Sans Mono CJK SC",
  monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
.tokens span { border-radius: 3px; padding: 2px 0; color: var(--faint); box-shadow: inset -1px 0 0 #d0d7de; }
.tokens .trained { color: #0b5d2a; background: #c9f2d3; box-shadow: inset -1px 0 0 #9adcac; }
.tokens .mark { color: var(--mark); background: var(--mark-paper); padding: 2px 7px; margin: 0 1px; box-shadow: none;
  border-radius: 9px; font-size: 12px; }
.look { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0 18px; }
.look.beside { grid-template-columns: max-content minmax(0, 1fr); align-items: start; }
.look .tokens { margin-top: 4px; }
@media (max-width: 760px) { .look.beside { grid-template-columns: minmax(0, 1fr); } }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; font-size: 13px; color: var(--faint); }
.legend .tokens { line-height: 1.4; font-size: 13px; }
"""
_JPEG_QUALITY = 82


def escape(text: object) -> str:
    return html.escape(str(text))


def write_page(path: Path, *, title: str, body: Iterable[str]) -> None:
    """A complete page; characters that UTF-8 has not are replaced."""
    parts = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n",
        *body,
        "</body>\n</html>\n",
    )
    with atomic_file(path) as file:
        for part in parts:
            file.write(part.encode("utf-8", "replace"))


def chip(text: str, *, kind: str = "") -> str:
    return f'<span class="chip {kind}">{escape(text)}</span>'


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """(value, what it is)."""
    made = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in values)
    return f'<div class="tiles">{"".join(made)}</div>\n'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def row(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = "\n".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table>{row(head, "th")}\n{lines}</table></div>\n'


def bars(values: Sequence[tuple[str, int]]) -> str:
    """(label, count) as horizontal bars."""
    most = max((count for _, count in values), default=1) or 1
    made = (
        f'<span class="from">{escape(label)}</span><i style="width:{100 * count / most:.2f}%"></i>'
        f"<span>{count:,}</span>"
        for label, count in values
    )
    return f'<div class="bars">{"".join(made)}</div>\n'


def figure(image: Image.Image, caption: str, *, side: int, boxes: Sequence[tuple[str, Box]] = ()) -> str:
    """An image of at most `side` pixels, inside the page.

    Args:
        boxes: (label, box in shares of the image) to draw.
    """
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    shown = image.convert("RGB")
    if scale < 1:
        shown = shown.resize(size, Image.Resampling.LANCZOS)
    elif scale >= 2 or boxes:  # small images as they are: pixel by pixel
        shown = shown.resize(size, Image.Resampling.NEAREST)
    draw_boxes(ImageDraw.Draw(shown), boxes, scale=(shown.width, shown.height))
    file = io.BytesIO()
    shown.save(file, "JPEG", quality=_JPEG_QUALITY)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" width="{shown.width}" height="{shown.height}" '
        f'alt="{escape(caption)}"><figcaption style="max-width:{max(shown.width, 90)}px">{escape(caption)}</figcaption>'
        "</figure>"
    )


def broken(text: str) -> str:
    """The place of an image that cannot be shown."""
    return f'<figure><div class="broken">{escape(text)}</div></figure>'
