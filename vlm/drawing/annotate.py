"""An image with a question and its answer under it, and the boxes that the answer speaks of."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from vlm.drawing.boxes import draw_boxes
from vlm.drawing.fonts import typeset
from vlm.geometry import Box

_MIN_WIDTH, _MIN_SIDE, _MAX_SIDE, _MARGIN, _GAP = 360, 320, 1024, 12, 8
_SIZE, _LINE, _MAX_LINES = 16, 22, 200
_PAPER, _INK, _FAINT = "#ffffff", "#1f2328", "#6e7781"


def annotate(images: Sequence[Image.Image], *, prompt: str, answer: str, boxes: Sequence[Box] = ()) -> Image.Image:
    """The images side by side, boxes drawn into the first, question and answer under them.

    Args:
        images: at least one; each is brought to between 320 and 1,024 pixels on its longer side.
        boxes: in pixels of the first image.
    """
    shown = [_resized(image) for image in images]
    scale = max(shown[0].size) / max(images[0].size)
    numbered = [(str(at + 1) if len(boxes) > 1 else "", box) for at, box in enumerate(boxes)]
    draw_boxes(ImageDraw.Draw(shown[0]), numbered, scale=(scale, scale))
    row = sum(image.width for image in shown) + _GAP * (len(shown) - 1)
    width = max(_MIN_WIDTH, row)
    inner = width - 2 * _MARGIN
    texts = [
        (typeset(text, size=_SIZE, width=inner, max_lines=_MAX_LINES), color)
        for text, color in ((prompt, _FAINT), (answer or "(no answer)", _INK))
    ]
    top = max(image.height for image in shown) + _MARGIN
    height = top + sum(_LINE * len(text.lines) + _GAP for text, _ in texts) + _MARGIN - _GAP
    page = Image.new("RGB", (width, height), _PAPER)
    left = (width - row) // 2
    for image in shown:
        page.paste(image, (left, 0))
        left += image.width + _GAP
    pen = ImageDraw.Draw(page)
    for text, color in texts:
        for line in text.lines:
            pen.text((_MARGIN, top), line, fill=color, font=text.font)
            top += _LINE
        top += _GAP
    return page


def _resized(image: Image.Image) -> Image.Image:
    side = max(image.size)
    scale = min(max(side, _MIN_SIDE), _MAX_SIDE) / side
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC if scale < 4 else Image.Resampling.NEAREST)
