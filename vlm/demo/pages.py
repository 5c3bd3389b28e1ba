"""Pages, charts and screens of the embedded world: images whose words and parts are known."""

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from vlm.demo.scenes import COLORS
from vlm.demo.sprites import ENGLISH_WORDS, WORDS, PixelBox, write_word

_PAPER, _EDGE = (255, 255, 255), (120, 120, 120)


@dataclass(frozen=True)
class Placed:
    """A word or part, and where it is in pixels."""

    text: str
    box: PixelBox


def make_page(random: Random, *, size: int) -> tuple[Image.Image, list[Placed]]:
    """A page with two to five different words below each other, and its lines."""
    words = random.sample(WORDS, random.randint(2, 5))
    page = Image.new("RGB", (round(0.8 * size), size), _PAPER)
    height = size // (len(words) + 1)
    lines = []
    for number, word in enumerate(words):
        left = random.randint(2, size // 6)
        top = number * height + random.randint(2, max(2, height // 4))
        lines.append(
            Placed(word, write_word(page, word, (left, top, left + round(0.55 * size), top + height * 2 // 3)))
        )
    return page, lines


def make_chart(random: Random, *, size: int) -> tuple[Image.Image, dict[str, int]]:
    """A chart with two to five bars of different colours and heights, and the height of each in tenths."""
    colors = random.sample(list(COLORS), random.randint(2, 5))
    heights = random.sample(range(2, 10), len(colors))
    chart = Image.new("RGB", (size, size), _PAPER)
    pen = ImageDraw.Draw(chart)
    width = size // (2 * len(colors) + 1)
    pen.line((width // 2, size - 4, size - width // 2, size - 4), fill=_EDGE)
    for number, (color, tenths) in enumerate(zip(colors, heights, strict=True)):
        left = (2 * number + 1) * width
        pen.rectangle((left, size - 5 - tenths * (size - 10) // 10, left + width, size - 5), fill=COLORS[color])
    return chart, dict(zip(colors, heights, strict=True))


def make_screen(random: Random, *, size: int) -> tuple[Image.Image, list[Placed]]:
    """A screen with two to four buttons, each with a word, and their boxes."""
    words = random.sample(ENGLISH_WORDS, random.randint(2, 4))
    screen = Image.new("RGB", (round(1.4 * size), size), (238, 240, 243))
    pen = ImageDraw.Draw(screen)
    height = size // len(words)
    buttons = []
    for number, word in enumerate(words):
        left, top = random.randint(2, screen.width // 2), number * height + random.randint(2, max(2, height // 5))
        box = (left, top, left + round(0.6 * size), top + height * 3 // 5)
        pen.rounded_rectangle(box, radius=height // 8, fill=random.choice(list(COLORS.values())), outline=_EDGE)
        write_word(screen, word, box)
        buttons.append(Placed(word, box))
    return screen, buttons
