"""Screens of the embedded world: buttons, links, fields, menus and icons.

A screen is 3.5 times as large as a scene, with words of the size of the smaller ones in scenes. Shrunk to a fifth, as
CogAgent's 1120 pixels to 224, it still shows where its elements are and no longer what they say: its letters are
four pixels high, less than a third of a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from PIL import Image, ImageDraw

from vlm.demo.scenes import COLORS, GROUNDS, Box, Content, Split
from vlm.demo.sprites import ENGLISH_WORDS, INK, NOUNS, PixelBox, place_word, sprite, write_word

Kind = Literal["button", "link", "textbox", "combobox", "image"]
HTML: dict[Kind, str] = {
    "button": "<button>{}</button>",
    "link": "<a>{}</a>",
    "textbox": '<input name="{}">',
    "combobox": '<select name="{}">',
    "image": '<img alt="{}">',
}
"""An element in HTML, as `vlm.data.ScreenElements` tells it."""
SIZE = 3.5
"""Shorter side of a screen over that of a scene."""
_WEIGHTS: dict[Kind, int] = {"button": 3, "link": 2, "textbox": 2, "combobox": 2, "image": 1}
"""Few icons: their colours tell them apart at any size."""
_SAME = 0.7
"""Share of a screen's elements that are of one kind, as in a form or a menu, so that the kind tells little."""
COLUMNS, ROWS = 3, 4
_CROWDED_ROWS = 8
_ASPECTS = ((1, 1), (1, 1), (5, 4), (4, 5))
_LEAST, _MOST = 5, 9
_EDGE, _LINK, _FIELD = (120, 120, 120), (25, 60, 190), (255, 255, 255)
_CONTENTS = (*ENGLISH_WORDS, *(noun.name for noun in NOUNS))
_SPLITS = 6


@dataclass(frozen=True)
class Element:
    """One element of a screen.

    Attributes:
        cell: number of its place, row by row.
        box: in pixels.
    """

    kind: Kind
    text: str
    cell: int
    box: PixelBox

    @property
    def html(self) -> str:
        return HTML[self.kind].format(self.text)

    @property
    def space(self) -> PixelBox:
        """Where the text is written; a menu has an arrow beside it."""
        x0, y0, x1, y1 = self.box
        rim, arrow = (y1 - y0) // 8, (y1 - y0) // 2 if self.kind == "combobox" else 0
        return x0, y0 + rim, x1 - arrow, y1 - rim

    @property
    def split(self) -> Split:
        """That shows this here: each place holds back a sixth of all texts for validation, another for the test."""
        place = (5 * _CONTENTS.index(self.text) + self.cell) % _SPLITS
        return "val" if place == 1 else "test" if place == 4 else "train"


@dataclass(frozen=True)
class Screen:
    """A screen before it is drawn."""

    width: int
    height: int
    ground: tuple[int, int, int]
    colors: tuple[str, ...]
    elements: tuple[Element, ...]

    @property
    def contents(self) -> list[Content]:
        """The elements: an icon's noun, the others' word, a button's color."""
        found = []
        for element, color in zip(self.elements, self.colors, strict=True):
            box = self._shares(element.box)
            if element.kind == "image":
                found.append(Content(box, noun=element.text))
            else:
                ink = self._shares(place_word(element.text, element.space))
                shade = color if element.kind == "button" else None
                found.append(Content(box, color=shade, word=element.text, ink=ink))
        return found

    def _shares(self, box: PixelBox) -> Box:
        x0, y0, x1, y1 = box
        return x0 / self.width, y0 / self.height, x1 / self.width, y1 / self.height

    def draw(self) -> Image.Image:
        """The screen, RGB."""
        image = Image.new("RGB", (self.width, self.height), self.ground)
        pen = ImageDraw.Draw(image)
        for element, color in zip(self.elements, self.colors, strict=True):
            _DRAW[element.kind](image, pen, element, COLORS[color])
        return image


def make_screen(random: Random, *, split: Split, size: int) -> Screen:
    """Draws a screen by lot: five to nine elements in twelve places, no text and no icon twice.

    Args:
        split: every element of a training screen is of training; one of another split's screen is of that split.
        size: of a scene; the screen is `SIZE` times as large.
    """
    while (screen := _try_screen(random, split, size)) is None:
        pass
    return screen


def make_crowded_screen(random: Random, *, size: int) -> Screen:
    """A screen with an element wherever one fits, of training: many words to learn to read from one image."""
    width, height = _draw_sides(random, size)
    elements = []
    for row in range(_CROWDED_ROWS):
        for column in range(COLUMNS):
            kind, cell = _draw_kind(random), row * ROWS // _CROWDED_ROWS * COLUMNS + column
            box = _place(random, kind, column, row, (width, height), size=size, rows=_CROWDED_ROWS)
            fitting = [one for text in _pool(kind) if (one := Element(kind, text, cell, box)).split == "train"]
            elements.append(random.choice(fitting))
    return Screen(width, height, random.choice(GROUNDS), _draw_colors(random, elements), tuple(elements))


def _try_screen(random: Random, split: Split, size: int) -> Screen | None:
    """None where all texts of the split that may stand at a place stand elsewhere."""
    width, height = _draw_sides(random, size)
    cells = sorted(random.sample(range(COLUMNS * ROWS), random.randint(_LEAST, _MOST)))
    new = None if split == "train" else random.choice(cells)
    main = _draw_kind(random)
    elements: list[Element] = []
    used: set[str] = set()
    for cell in cells:
        kind = main if random.random() < _SAME else _draw_kind(random)
        wanted = split if cell == new else "train"
        box = _place(random, kind, cell % COLUMNS, cell // COLUMNS, (width, height), size=size)
        found = [Element(kind, text, cell, box) for text in _pool(kind) if text not in used]
        fitting = [one for one in found if one.split == wanted]
        if not fitting:
            return None
        element = random.choice(fitting)
        used.add(element.text)
        elements.append(element)
    colors = _draw_colors(random, elements)
    return Screen(width, height, random.choice(GROUNDS), colors, tuple(elements))


def _draw_sides(random: Random, size: int) -> tuple[int, int]:
    across, down = random.choice(_ASPECTS)
    unit = SIZE * size / min(across, down)
    return round(unit * across), round(unit * down)


def _draw_colors(random: Random, elements: Sequence[Element]) -> tuple[str, ...]:
    return tuple(random.choice(list(COLORS)) for _ in elements)


def _pool(kind: Kind) -> tuple[str, ...]:
    """The texts that an element may have."""
    return ENGLISH_WORDS if kind != "image" else tuple(noun.name for noun in NOUNS)


def _draw_kind(random: Random) -> Kind:
    [kind] = random.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
    return kind


def _place(
    random: Random, kind: Kind, column: int, row: int, whole: tuple[int, int], *, size: int, rows: int = ROWS
) -> PixelBox:
    """Somewhere around the middle of a cell of a screen of width and height `whole`."""
    cell_width, cell_height = whole[0] / COLUMNS, whole[1] / rows
    wide, high = (0.34, 0.34) if kind == "image" else (random.uniform(0.85, 1.0), random.uniform(0.3, 0.34))
    wide, high = min(wide * size, 0.84 * cell_width), high * size
    left = (column + 0.5 + random.uniform(-0.08, 0.08)) * cell_width - wide / 2
    top = (row + 0.5 + random.uniform(-0.1, 0.1)) * cell_height - high / 2
    return round(left), round(top), round(left + wide), round(top + high)


def _button(image: Image.Image, pen: ImageDraw.ImageDraw, element: Element, color: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = element.box
    pen.rounded_rectangle((x0, y0, x1 - 1, y1 - 1), radius=(y1 - y0) // 5, fill=color, outline=_EDGE)
    write_word(image, element.text, element.space)


def _link(image: Image.Image, pen: ImageDraw.ImageDraw, element: Element, color: tuple[int, int, int]) -> None:
    x0, _, x1, y1 = element.box
    write_word(image, element.text, element.space, ink=_LINK)
    pen.line((x0, y1 - 1, x1 - 1, y1 - 1), fill=_LINK)


def _textbox(image: Image.Image, pen: ImageDraw.ImageDraw, element: Element, color: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = element.box
    pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=_FIELD, outline=_EDGE)
    write_word(image, element.text, element.space)
    pen.line((x0 + 2, y0 + 4, x0 + 2, y1 - 5), fill=INK)  # a cursor


def _combobox(image: Image.Image, pen: ImageDraw.ImageDraw, element: Element, color: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = element.box
    arrow = (y1 - y0) // 2
    pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=_FIELD, outline=_EDGE)
    write_word(image, element.text, element.space)
    middle = (y0 + y1) // 2
    pen.polygon(((x1 - arrow, middle - 3), (x1 - 4, middle - 3), (x1 - 2 - arrow // 2, middle + 5)), fill=INK)


def _image(image: Image.Image, pen: ImageDraw.ImageDraw, element: Element, color: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = element.box
    [noun] = [noun for noun in NOUNS if noun.name == element.text]
    icon = sprite(noun).resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS)
    image.paste(icon, (x0, y0), icon)


_DRAW = {"button": _button, "link": _link, "textbox": _textbox, "combobox": _combobox, "image": _image}
