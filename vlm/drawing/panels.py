"""Pictures of what a system sees, is trained on, and says."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from vlm.batch import IGNORE, Batch, TokenSequence
from vlm.codec import Codec
from vlm.drawing.boxes import draw_boxes
from vlm.drawing.fonts import font_for, printable, spelled, typeset
from vlm.geometry import Box
from vlm.levels import levels_again
from vlm.sample import Message, TextPart
from vlm.vision.patches import joined

WIDTH = 760  # TensorBoard shows images at half of it until they are clicked
_MARGIN, _GAP, _PICTURE, _TEXT, _SMALL = 20, 18, 288, 20, 15
_INK, _FAINT, _LINE, _PAPER = "#1f2328", "#6e7781", "#d0d7de", "#ffffff"
_TRAINED, TRAINED_PAPER = "#0b5d2a", "#c9f2d3"
_MARK, _MARK_PAPER = "#1b4b91", "#dbe9fd"
_TARGET, _PREDICTION = "#1a7f37", "#d4570a"
_MAX_PICTURES, _MAX_PIECES, _MAX_LINES = 3, 500, 14
_LINE_HEIGHT = 1.4


@dataclass(frozen=True)
class Piece:
    """Text of one token, or of a few that only make a character together.

    Attributes:
        is_mark: a note of ours, such as how many tokens an image takes.
        ids: of the tokens.
    """

    text: str
    trained: bool = False
    is_mark: bool = False
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One sample.

    Attributes:
        title: over everything.
        pictures: as the system sees them.
        prompt: what it is asked.
        target: what it should say.
        prediction: what it says; None: it does not speak.
        pieces: the tokens it is trained on.
        find_boxes: in one of the texts; in shares of the first image.
    """

    title: str
    pictures: Sequence[Image.Image]
    prompt: str
    target: str
    prediction: str | None = None
    pieces: Sequence[Piece] = field(default_factory=tuple)
    find_boxes: Callable[[str], Sequence[Box]] = lambda text: ()

    def markdown(self) -> str:
        texts = {"Prompt": self.prompt, "Target": self.target, "Prediction": self.prediction}
        shown = [f"**{name}**\n\n{_quoted(text)}" for name, text in texts.items() if text is not None]
        return "\n\n".join([f"*{self.title}*", *shown])


def as_text(messages: Iterable[Message]) -> str:
    """A conversation as the system reads it (`Codec.written`); every image is `<image>`."""
    texts = [
        (message.role, "".join(part.text if isinstance(part, TextPart) else "<image>" for part in message.content))
        for message in messages
    ]
    return texts[0][1] if len(texts) == 1 else "\n".join(f"{role}: {text}" for role, text in texts)


def views_as_seen(batch: Batch, codec: Codec) -> dict[str, list[tuple[int, Image.Image]]]:
    """Every view of a pack as an image with the number of the one it shows, by stream; patches put together again."""
    found = {}
    for stream, views in batch.views.items():
        assert views.table is not None
        levels = levels_again(views.pixels, views.table).cpu()
        seen: Iterable[tuple[int, Tensor]] = zip(views.image_of_view.tolist(), levels, strict=True)
        if codec.joins_views:
            pictures = levels.split([columns * rows for columns, rows in views.grid])
            seen = ((at, joined(own, columns=views.grid[at][0])) for at, own in enumerate(pictures))
        found[stream] = [(owner, Image.fromarray(view.permute(1, 2, 0).numpy())) for owner, view in seen]
    return found


def pieces_of(
    sequence: TokenSequence, decode: Callable[..., str], *, max_pieces: int | None = _MAX_PIECES
) -> list[Piece]:
    """The tokens of a sequence as they are trained: what position i predicts is shown as token i + 1.

    Args:
        decode: ids as text; `skip_special=False` keeps special tokens.
        max_pieces: how many are shown before the rest is counted; None: all.
    """
    ids, targets = sequence.ids.tolist(), sequence.targets.tolist()
    slots = {int(position) for positions in sequence.slots.values() for position in positions}
    labels = [IGNORE, *targets]
    tokens = [label if label != IGNORE else token for token, label in zip([*ids, None], labels, strict=True)]
    pieces: list[Piece] = []
    position = 0
    before: list[int] = []
    while position < len(tokens) and (max_pieces is None or len(pieces) < max_pieces):
        if tokens[position] is None:  # behind the last token, and not trained
            break
        if position in slots:
            end = position
            while end in slots:
                end += 1
            pieces.append(Piece(f"{end - position} image tokens", is_mark=True))
            position, before = end, []
            continue
        # a character outside of the vocabulary takes several tokens, none of which is text by itself
        end = position + 1
        while True:
            text = decode(before + tokens[position:end], skip_special=False)
            if not text.endswith("\ufffd") or end - position >= 4 or end >= len(ids) or end in slots:
                break
            end += 1
        known = decode(before, skip_special=False) if before else ""
        trained = any(label != IGNORE for label in labels[position:end])
        pieces.append(Piece(text.removeprefix(known), trained, ids=tuple(tokens[position:end])))
        position, before = end, tokens[position:end]
    if position < len(ids):
        pieces.append(Piece(f"{len(ids) - position} more", is_mark=True))
    return pieces


def draw(panel: Panel) -> Image.Image:
    """The panel as an RGB image, `WIDTH` pixels wide and as high as it takes."""
    left = _Column(_MARGIN, _PICTURE)
    texts = {_MARK: panel.prompt, _TARGET: panel.target, _PREDICTION: panel.prediction or ""}
    boxes = {color: panel.find_boxes(text) for color, text in texts.items()}
    for index, picture in enumerate(panel.pictures[:_MAX_PICTURES]):
        left.add_picture(picture, boxes if index == 0 else {})  # boxes come without saying of which image
    if len(panel.pictures) > _MAX_PICTURES:
        left.add_text(f"and {len(panel.pictures) - _MAX_PICTURES} more pictures", size=_SMALL, color=_FAINT)
    start = _MARGIN + _PICTURE + _GAP + 8 if panel.pictures else _MARGIN
    right = _Column(start, WIDTH - _MARGIN - start)
    right.add_block("PROMPT", panel.prompt, color=_MARK)
    right.add_block("TARGET", panel.target, color=_TARGET)
    if panel.prediction is not None:
        right.add_block("PREDICTION", panel.prediction, color=_PREDICTION)
    head = _Column(_MARGIN, WIDTH - 2 * _MARGIN)
    head.add_text(panel.title, size=_SMALL, color=_FAINT)
    foot = _Column(_MARGIN, WIDTH - 2 * _MARGIN)
    if panel.pieces:
        foot.add_pieces(panel.pieces)
    top = _MARGIN // 2 + head.height + 8
    middle = max(left.height, right.height)
    height = int(top + middle + foot.height + _MARGIN // 2)
    image = Image.new("RGB", (WIDTH, height), _PAPER)
    canvas = ImageDraw.Draw(image)
    for column, y in ((head, _MARGIN // 2), (left, top), (right, top), (foot, top + middle)):
        for paint in column.items:
            paint(image, canvas, y)
    return image


class _Column:
    """Things to paint below each other, laid out before the height of the whole is known."""

    def __init__(self, left: int, width: int) -> None:
        self.left, self.width = left, width
        self.height = 0.0
        self.items: list[Callable[[Image.Image, ImageDraw.ImageDraw, float], Any]] = []

    def add_text(self, text: str, *, size: int, color: str, indent: int = 0, max_lines: int = _MAX_LINES) -> None:
        lines, font = typeset(text, size=size, width=self.width - indent, max_lines=max_lines)
        for line in lines:
            self.items.append(_line(line, self.left + indent, self.height, font=font, color=color))
            self.height += size * _LINE_HEIGHT

    def add_block(self, heading: str, text: str, *, color: str) -> None:
        """A text with a heading and a bar at its left."""
        start = self.height
        self.add_text(heading, size=_SMALL, color=color, indent=16)
        self.add_text(text if text.strip() else "(nothing)", size=_TEXT, color=_INK, indent=16)
        end = self.height
        self.items.append(
            lambda _, canvas, top: canvas.rounded_rectangle(
                (self.left, top + start, self.left + 4, top + end - 2), radius=2, fill=color
            )
        )
        self.height += _GAP

    def add_picture(self, picture: Image.Image, boxes: Mapping[str, Sequence[Box]]) -> None:
        """An image with boxes by their colour."""
        scale = min(self.width / picture.width, self.width / picture.height)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        method = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
        shown = picture.convert("RGB").resize(size, method)
        canvas = ImageDraw.Draw(shown)
        for color, places in boxes.items():
            draw_boxes(canvas, (("", place) for place in places), scale=size, color=color)
        at = self.height

        def paint(image: Image.Image, canvas: ImageDraw.ImageDraw, top: float) -> None:
            x, y = self.left, int(top + at)
            image.paste(shown, (x, y))
            canvas.rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline=_LINE)

        self.items.append(paint)
        self.height += size[1] + _GAP

    def add_pieces(self, pieces: Sequence[Piece]) -> None:
        """Tokens in a row, the trained ones in green."""
        self.items.append(lambda _, c, top: c.line((self.left, top, self.left + self.width, top), fill=_LINE))
        self.height += 12
        self.add_text("TOKENS  (green: trained)", size=_SMALL, color=_FAINT)
        self.height += 4
        size = _TEXT - 2
        font, lacking = font_for(printable("".join(piece.text for piece in pieces)), size=size)
        x, line = 0.0, size * 1.6
        for piece in pieces:
            text = spelled(printable(piece.text.replace("\t", "\\t").replace("\n", "\\n")), lacking)
            pad = 6 if piece.is_mark else 0
            for part in _cut(text, font, self.width - 2 * pad):
                if x + font.getlength(part.rstrip()) + 2 * pad > self.width:
                    x, self.height = 0.0, self.height + line
                if x == 0 and not piece.trained:
                    part = part.lstrip(" ")
                width = font.getlength(part) + 2 * pad
                self.items.append(_token(part, piece, self.left + x, self.height, width, pad=pad, font=font))
                x += width + 1
            if piece.text.endswith("\n"):
                x, self.height = 0.0, self.height + line
        self.height += line + 4


def _line(text: str, x: float, at: float, *, font: Any, color: str) -> Callable[..., None]:
    return lambda _, canvas, top: canvas.text((x, top + at), text, font=font, fill=color)


def _token(text: str, piece: Piece, x: float, at: float, width: float, *, pad: int, font: Any) -> Callable[..., None]:
    ink, paper = (_MARK, _MARK_PAPER) if piece.is_mark else (_TRAINED, TRAINED_PAPER)

    def paint(_: Image.Image, canvas: ImageDraw.ImageDraw, top: float) -> None:
        if piece.trained or piece.is_mark:
            canvas.rounded_rectangle((x, top + at, x + width, top + at + (_TEXT - 2) * 1.35), radius=3, fill=paper)
        color = ink if piece.trained or piece.is_mark else _FAINT
        canvas.text((x + pad, top + at), text, font=font, fill=color)

    return paint


def _cut(text: str, font: Any, width: float) -> Iterator[str]:
    """The text in parts that fit."""
    while text and font.getlength(text.rstrip()) > width:
        end = len(text)
        while end > 1 and font.getlength(text[:end]) > width:
            end -= 1 + (end > 64) * (end // 4)
        yield text[:end]
        text = text[end:]
    if text:
        yield text


def _quoted(text: str) -> str:
    """As a quotation, which wraps, and in which every character stands for itself."""
    lines = (re.sub(r"[^\w\s]|_|^\s|(?<=\s)\s", lambda found: f"&#{ord(found[0])};", line) for line in text.split("\n"))
    return "\n".join(f"> {line}  " for line in lines)
