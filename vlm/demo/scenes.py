"""Pictures of things on coloured cards and of signs with a word, and which of them belong to which split."""

from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple, get_args

from PIL import Image, ImageDraw

from vlm.demo.sprites import NOUNS, WORDS, Noun, PixelBox, place_word, sprite, write_word

COLORS = {
    "red": (225, 60, 55),
    "orange": (250, 155, 40),
    "yellow": (245, 225, 90),
    "green": (70, 170, 80),
    "blue": (60, 105, 225),
    "purple": (150, 75, 185),
}
GROUNDS = ((255, 255, 255), (232, 232, 232), (244, 236, 224), (214, 228, 236))
ASPECTS = ((1, 1), (1, 1), (5, 4), (4, 5), (4, 3), (3, 4))
SCALES = (0.75, 1.0, 1.25)
_SUPERSAMPLING = 2
_WORD_HEIGHT = 0.66  # of its sign's
_SIGN_SHARE = 0.35

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 as shares of the picture's width and height."""


class Content(NamedTuple):
    """What a tower can learn about a part of a picture: its box, and as far as they are there noun, color and word.

    Attributes:
        ink: where the word is, from its first letter to its last one.
    """

    box: Box
    noun: str | None = None
    color: str | None = None
    word: str | None = None
    ink: Box | None = None


def split_of(content: str, color: str, place: int) -> Split:
    """The split whose images alone show this thing or word on this colour at this place.

    At every place each thing and each word is held back on one colour for validation and on one for the test: all
    names, colours and places are known from training, and any two of them together, but not all three.

    Args:
        place: number of the quarter for a thing, row by row; of the half for a sign.
    """
    index = 5 * _CONTENTS.index(content) + 2 * place
    held_back = {(index + 1) % len(COLORS): "val", (index + 4) % len(COLORS): "test"}
    return held_back.get(list(COLORS).index(color), "train")  # type: ignore[return-value]


_CONTENTS = [noun.name for noun in NOUNS] + list(WORDS)


@dataclass(frozen=True)
class Thing:
    """A noun's image on a card."""

    noun: Noun
    color: str
    row: int
    column: int
    box: Box

    @property
    def place(self) -> str:
        return f"{('top', 'bottom')[self.row]} {('left', 'right')[self.column]}"

    @property
    def split(self) -> Split:
        """That shows this thing on this colour here."""
        return split_of(self.noun.name, self.color, 2 * self.row + self.column)


@dataclass(frozen=True)
class Sign:
    """A board with a word, as wide as the image."""

    word: str
    color: str
    row: int
    box: Box

    @property
    def split(self) -> Split:
        """That shows this word on this colour here."""
        return split_of(self.word, self.color, self.row)


@dataclass(frozen=True)
class Scene:
    """An image before it is drawn.

    Attributes:
        width: in pixels.
        height: in pixels.
        ground: RGB.
        things: row by row, from the left.
    """

    width: int
    height: int
    ground: tuple[int, int, int]
    things: tuple[Thing, ...]
    sign: Sign | None = None

    @property
    def contents(self) -> list[Content]:
        """The cards and the sign."""
        found = [Content(thing.box, noun=thing.noun.name, color=thing.color) for thing in self.things]
        if self.sign is not None:
            x0, y0, x1, y1 = place_word(self.sign.word, self._pixels(self.sign.box), height=_WORD_HEIGHT)
            width, height = self.width * _SUPERSAMPLING, self.height * _SUPERSAMPLING
            ink = (x0 / width, y0 / height, x1 / width, y1 / height)
            found.append(Content(self.sign.box, color=self.sign.color, word=self.sign.word, ink=ink))
        return found

    def draw(self) -> Image.Image:
        """The image, RGB."""
        factor = _SUPERSAMPLING
        image = Image.new("RGB", (self.width * factor, self.height * factor), self.ground)
        pen = ImageDraw.Draw(image)
        for thing in self.things:
            x0, y0, x1, y1 = self._pixels(thing.box)
            pen.rounded_rectangle((x0, y0, x1 - 1, y1 - 1), radius=(x1 - x0) // 8, fill=COLORS[thing.color])
            side = round(0.84 * (x1 - x0))
            picture = sprite(thing.noun).resize((side, side), Image.Resampling.LANCZOS)
            image.paste(picture, ((x0 + x1 - side) // 2, (y0 + y1 - side) // 2), picture)
        if self.sign is not None:
            x0, y0, x1, y1 = self._pixels(self.sign.box)
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=COLORS[self.sign.color])
            write_word(image, self.sign.word, (x0, y0, x1, y1), height=_WORD_HEIGHT)
        return image.reduce(factor)

    def _pixels(self, box: Box) -> PixelBox:
        width, height = self.width * _SUPERSAMPLING, self.height * _SUPERSAMPLING
        x0, y0, x1, y1 = box
        return round(x0 * width), round(y0 * height), round(x1 * width), round(y1 * height)


def make_scene(random: Random, *, split: Split, size: int) -> Scene:
    """Draws one scene by lot.

    A third of the scenes have a sign and one or two things, the others one to four things, rather more than fewer,
    often the same noun several times so that there is something to count.

    Args:
        split: a training scene shows training compositions alone (`split_of`); a scene of another split shows one
            thing of that split, and its sign is of that split too.
        size: mean length of the shorter side in pixels.
    """
    across, down = random.choice(ASPECTS)
    unit = size * random.choice(SCALES) / min(across, down)
    width, height = round(unit * across), round(unit * down)
    sign_row = random.randrange(2) if random.random() < _SIGN_SHARE else None
    cells = [(row, column) for row in range(2) if row != sign_row for column in range(2)]
    [num] = random.choices(range(1, len(cells) + 1), range(1, len(cells) + 1))
    cells = sorted(random.sample(cells, num))
    subject = random.choice(NOUNS)
    copies = random.randint(1, num) if random.random() < 0.6 else 1
    others = random.sample([noun for noun in NOUNS if noun is not subject], num - copies)
    nouns = [subject] * copies + others
    random.shuffle(nouns)
    new = None if split == "train" else random.randrange(len(nouns))
    things = []
    for index, (noun, (row, column)) in enumerate(zip(nouns, cells, strict=True)):
        color = _color(random, noun.name, 2 * row + column, split if index == new else "train")
        things.append(Thing(noun, color, row, column, _card(random, row, column, width, height)))
    sign = None
    if sign_row is not None:
        word = random.choice(WORDS)
        sign = Sign(word, _color(random, word, sign_row, split), sign_row, _board(random, sign_row, width, height))
    return Scene(width, height, random.choice(GROUNDS), tuple(things), sign)


def _color(random: Random, content: str, place: int, split: Split) -> str:
    return random.choice([color for color in COLORS if split_of(content, color, place) == split])


def _card(random: Random, row: int, column: int, width: int, height: int) -> Box:
    side = random.uniform(0.36, 0.44) * min(width, height)
    share_x, share_y = side / width, side / height
    x = column / 2 + random.uniform(0.02, 0.5 - share_x - 0.02)
    y = row / 2 + random.uniform(0.02, 0.5 - share_y - 0.02)
    return _rounded((x, y, x + share_x, y + share_y))


def _board(random: Random, row: int, width: int, height: int) -> Box:
    share = 0.32 * min(width, height) / height
    y = row / 2 + random.uniform(0.04, 0.5 - share - 0.04)
    return _rounded((0.05, y, 0.95, y + share))


def _rounded(box: Box) -> Box:
    x0, y0, x1, y1 = (round(value, 3) for value in box)
    return x0, y0, x1, y1
