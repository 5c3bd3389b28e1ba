"""Screens of the embedded world: buttons, links, fields, menus and icons, found, told, and used for a task.

A screen is 3.5 times as large as a scene, with words of the size of the smaller ones in scenes. Shrunk to a fifth, as
CogAgent's 1120 pixels to 224, it still shows where its elements are and no longer what they say: its letters are
four pixels high, less than a third of a patch.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from PIL import Image, ImageDraw

from vlm.demo.pages import PixelBox, write_word
from vlm.demo.scenes import COLORS, GROUNDS, Split
from vlm.demo.sprites import ENGLISH_WORDS, NOUNS, sprite

Kind = Literal["button", "link", "textbox", "combobox", "image"]
HTML: dict[Kind, str] = {
    "button": "<button>{}</button>",
    "link": "<a>{}</a>",
    "textbox": '<input name="{}">',
    "combobox": '<select name="{}">',
    "image": '<img alt="{}">',
}
"""An element in HTML, as `vlm.data.ScreenElements` tells it."""
REQUEST = 'What steps do I need to take to "{}"?(with grounding)'
"""The first of CogAgent's published requests for an operation with its box."""
GROUND = "Provide the bounding box coordinate of the region this sentence describes."
REFER = "Provide a short description for this region."
SIZE = 3.5
"""Shorter side of a screen over that of a scene."""
_TASKS: dict[Kind, tuple[str, str]] = {
    "button": ("click {0}", "CLICK"),
    "link": ("open {0}", "CLICK"),
    "textbox": ("type {1} into {0}", "TYPE: {1}"),
    "combobox": ("choose {1} in {0}", "SELECT: {1}"),
    "image": ("click the {0}", "CLICK"),
}
"""What is asked about an element, and its operation in the words of Mind2Web."""
_WEIGHTS: dict[Kind, int] = {"button": 3, "link": 2, "textbox": 2, "combobox": 2, "image": 1}
"""Few icons: their colours tell them apart at any size."""
_SAME = 0.7
"""Share of a screen's elements that are of one kind, as in a form or a menu, so that the kind tells little."""
COLUMNS, ROWS = 3, 4
_ASPECTS = ((1, 1), (1, 1), (5, 4), (4, 5))
_LEAST, _MOST = 5, 9
_INK, _EDGE, _LINK, _FIELD = (20, 20, 20), (120, 120, 120), (25, 60, 190), (255, 255, 255)
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


def _try_screen(random: Random, split: Split, size: int) -> Screen | None:
    """None where all texts of the split that may stand at a place stand elsewhere."""
    across, down = random.choice(_ASPECTS)
    unit = SIZE * size / min(across, down)
    width, height = round(unit * across), round(unit * down)
    cells = sorted(random.sample(range(COLUMNS * ROWS), random.randint(_LEAST, _MOST)))
    new = None if split == "train" else random.choice(cells)
    main = _draw_kind(random)
    elements: list[Element] = []
    used: set[str] = set()
    for cell in cells:
        kind = main if random.random() < _SAME else _draw_kind(random)
        wanted = split if cell == new else "train"
        pool = ENGLISH_WORDS if kind != "image" else tuple(noun.name for noun in NOUNS)
        box = _place(random, kind, cell, width, height, size)
        found = [Element(kind, text, cell, box) for text in pool if text not in used]
        fitting = [one for one in found if one.split == wanted]
        if not fitting:
            return None
        element = random.choice(fitting)
        used.add(element.text)
        elements.append(element)
    colors = tuple(random.choice(list(COLORS)) for _ in elements)
    return Screen(width, height, random.choice(GROUNDS), colors, tuple(elements))


def _draw_kind(random: Random) -> Kind:
    [kind] = random.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
    return kind


def _place(random: Random, kind: Kind, cell: int, width: int, height: int, size: int) -> PixelBox:
    cell_width, cell_height = width / COLUMNS, height / ROWS
    wide, high = (0.34, 0.34) if kind == "image" else (random.uniform(0.85, 1.0), random.uniform(0.3, 0.34))
    wide, high = min(wide * size, 0.84 * cell_width), high * size
    left = (cell % COLUMNS + 0.5 + random.uniform(-0.08, 0.08)) * cell_width - wide / 2
    top = (cell // COLUMNS + 0.5 + random.uniform(-0.1, 0.1)) * cell_height - high / 2
    return round(left), round(top), round(left + wide), round(top + high)


def _write(image: Image.Image, word: str, box: PixelBox, ink: tuple[int, int, int] = _INK) -> None:
    x0, y0, x1, y1 = box
    rim = (y1 - y0) // 8
    write_word(image, word, (x0, y0 + rim, x1, y1 - rim), ink=ink)


def _button(image: Image.Image, pen: ImageDraw.ImageDraw, element: Element, color: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = element.box
    pen.rounded_rectangle((x0, y0, x1 - 1, y1 - 1), radius=(y1 - y0) // 5, fill=color, outline=_EDGE)
    _write(image, element.text, element.box)


def _link(image: Image.Image, pen: ImageDraw.ImageDraw, element: Element, color: tuple[int, int, int]) -> None:
    x0, _, x1, y1 = element.box
    _write(image, element.text, element.box, _LINK)
    pen.line((x0, y1 - 1, x1 - 1, y1 - 1), fill=_LINK)


def _textbox(image: Image.Image, pen: ImageDraw.ImageDraw, element: Element, color: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = element.box
    pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=_FIELD, outline=_EDGE)
    _write(image, element.text, element.box)
    pen.line((x0 + 2, y0 + 4, x0 + 2, y1 - 5), fill=_INK)  # a cursor


def _combobox(image: Image.Image, pen: ImageDraw.ImageDraw, element: Element, color: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = element.box
    arrow = (y1 - y0) // 2
    pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=_FIELD, outline=_EDGE)
    _write(image, element.text, (x0, y0, x1 - arrow, y1))
    middle = (y0 + y1) // 2
    pen.polygon(((x1 - arrow, middle - 3), (x1 - 4, middle - 3), (x1 - 2 - arrow // 2, middle + 5)), fill=_INK)


def _image(image: Image.Image, pen: ImageDraw.ImageDraw, element: Element, color: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = element.box
    [noun] = [noun for noun in NOUNS if noun.name == element.text]
    icon = sprite(noun).resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS)
    image.paste(icon, (x0, y0), icon)


_DRAW = {"button": _button, "link": _link, "textbox": _textbox, "combobox": _combobox, "image": _image}


def write_gui(folder: Path, num: int, size: int, seed: int) -> None:
    """`screens.jsonl` in the form of `vlm.data.ScreenElements` and `agent.jsonl` with a task for each of the same
    screens, to train on; `val.jsonl` and `test.jsonl` with one question of each kind per screen, about what no training
    screen shows (`vlm.data.ChatJson`)."""
    splits: tuple[tuple[Split, int], ...] = (("train", num), ("val", max(2, num // 50)), ("test", max(2, num // 25)))
    for split, count in splits:
        found = list(_screens(split, num=count, size=size, seed=seed))
        for name, screen in found:
            screen.draw().save(folder / "images" / f"{name}.png")
        if split == "train":
            _lines(folder / "screens.jsonl", (_elements(name, screen) for name, screen in found))
            _lines(folder / "agent.jsonl", (_task(name, screen, seed) for name, screen in found))
        else:
            _lines(folder / f"{split}.jsonl", (line for item in found for line in _questions(*item, split, seed)))


def _screens(split: Split, *, num: int, size: int, seed: int) -> Iterator[tuple[str, Screen]]:
    for index in range(num):
        yield f"screen_{split}_{index:05d}", make_screen(Random(f"gui {seed} {split} {index}"), split=split, size=size)


def _elements(name: str, screen: Screen) -> dict[str, Any]:
    elements = [{"html": element.html, "box": list(element.box)} for element in screen.elements]
    return {"id": name, "image": f"{name}.png", "elements": elements}


def _task(name: str, screen: Screen, seed: int) -> dict[str, Any]:
    """A screen with one task, to train on."""
    random = Random(f"task {seed} {name}")
    return _asked(name, screen, random.choice(screen.elements), "agent", random)


def _questions(name: str, screen: Screen, split: Split, seed: int) -> Iterator[dict[str, Any]]:
    """One question of each kind about what is new on a screen."""
    [new] = [element for element in screen.elements if element.split == split]
    for task in ("ground", "refer", "agent"):
        yield _asked(name, screen, new, task, Random(f"question {seed} {name}"))


def _asked(name: str, screen: Screen, element: Element, task: str, random: Random) -> dict[str, Any]:
    """A question about an element and its answer, in which a box is a place in the image; `answers` has it as text."""
    sides = 2 * (screen.width, screen.height)
    shares = [round(value / side, 9) for value, side in zip(element.box, sides, strict=True)]
    place: dict[str, Any] = {"type": "box", "box": shares}  # no pixels: a question may be asked about another screen
    if task == "ground":
        asking, answer = [_text(f"\n{GROUND} {element.html}")], [place]
    elif task == "refer":
        asking, answer = [_text(f"\n{REFER} "), place], [_text(element.html)]
    else:
        value = random.choice([word for word in ENGLISH_WORDS if word != element.text])
        wish, operation = (words.format(element.text, value) for words in _TASKS[element.kind])
        asking = [_text(f"\n{REQUEST.format(wish)}")]
        answer = [_text(f"Grounded Operation:[{element.kind}] {element.text} -> {operation} at the box "), place]
    written = "[" + ", ".join(f"{share:.9f}" for share in shares) + "]"
    text = "".join(part.get("text", written) for part in answer)
    return {
        "id": f"{name}_{task}",
        "images": [f"{name}.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, *asking]},
            {"role": "assistant", "content": answer},
        ],
        "task": task,
        "answers": [text],
    }


def _text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def _lines(path: Path, records: Iterator[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
