"""What the embedded world is made of: images of 48 things and of 40 written words, with their names.

The images ship as two files, so no font is needed to draw a scene. They were made by

    python -m vlm.demo.sprites FOLDER --emoji NotoColorEmoji.ttf --latin DejaVuSans-Bold.ttf --chinese wqy-microhei.ttc

with the fonts of Debian's fonts-noto-color-emoji, fonts-dejavu-core and fonts-wqy-microhei.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

ASSETS = Path(__file__).parent / "assets"
SPRITE = 64
"""Pixels per side of one image in `sprites.png`."""
WORD = (160, 40)
"""Width and height in pixels of one word in `words.png`."""
PixelBox = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels of an image."""
INK = (20, 20, 20)
_PER_ROW = 8
_INKED = 40  # of 255: less is a letter's soft edge
_EMOJI_SIZE = 109  # the one size that Noto's bitmaps have


class Noun(NamedTuple):
    name: str
    plural: str
    chinese: str
    emoji: str


NOUNS = tuple(
    Noun(*row.split())
    for row in """
    dog dogs 狗 🐕|cat cats 猫 🐈|horse horses 马 🐎|pig pigs 猪 🐖|elephant elephants 大象 🐘|rabbit rabbits 兔子 🐇
    duck ducks 鸭子 🦆|owl owls 猫头鹰 🦉|fish fish 鱼 🐟|turtle turtles 乌龟 🐢|bee bees 蜜蜂 🐝|snail snails 蜗牛 🐌
    apple apples 苹果 🍎|banana bananas 香蕉 🍌|lemon lemons 柠檬 🍋|grape grapes 葡萄 🍇|cherry cherries 樱桃 🍒
    carrot carrots 胡萝卜 🥕|corn corn 玉米 🌽|mushroom mushrooms 蘑菇 🍄|bread breads 面包 🍞|pizza pizzas 披萨 🍕
    cake cakes 蛋糕 🎂|egg eggs 鸡蛋 🥚|car cars 汽车 🚗|bus buses 公交车 🚌|bike bikes 自行车 🚲|boat boats 帆船 ⛵
    train trains 火车 🚂|plane planes 飞机 🛩|rocket rockets 火箭 🚀|book books 书 📖|key keys 钥匙 🔑
    clock clocks 闹钟 ⏰
    umbrella umbrellas 雨伞 ☂|lamp lamps 灯 💡|guitar guitars 吉他 🎸|camera cameras 相机 📷|ball balls 足球 ⚽
    tree trees 树 🌳|sunflower sunflowers 向日葵 🌻|cactus cactuses 仙人掌 🌵|house houses 房子 🏠|chair chairs 椅子 🪑
    crown crowns 皇冠 👑|hat hats 帽子 🎩|shoe shoes 鞋子 👟|bell bells 铃铛 🔔
    """.replace("\n", "|").split("|")
    if row.strip()
)
ENGLISH_WORDS = (
    "OPEN", "STOP", "EXIT", "SALE", "TAXI", "CAFE", "HOTEL", "BANK", "PARK", "ZOO", "MENU", "BAR",
    "SHOP", "POST", "FIRE", "TOUR", "LIFT", "GATE", "MILK", "TEA", "RADIO", "PIZZA", "MUSIC", "NEWS",
)  # fmt: skip
CHINESE_WORDS = (
    "出口", "入口", "银行", "酒店", "茶", "书店", "医院", "学校",
    "邮局", "公园", "饭馆", "车站", "药店", "停车", "电影", "超市",
)  # fmt: skip
WORDS = ENGLISH_WORDS + CHINESE_WORDS
LETTERS = sorted({letter for word in ENGLISH_WORDS for letter in word})


@functools.cache
def _cells(file: str, width: int, height: int, num: int) -> tuple[Image.Image, ...]:
    with Image.open(ASSETS / file) as atlas:
        atlas.load()
    corners = ((index % _PER_ROW * width, index // _PER_ROW * height) for index in range(num))
    return tuple(atlas.crop((x, y, x + width, y + height)) for x, y in corners)


def sprite(noun: Noun) -> Image.Image:
    """The thing on a transparent ground, RGBA, `SPRITE` pixels wide and high."""
    return _cells("sprites.png", SPRITE, SPRITE, len(NOUNS))[NOUNS.index(noun)]


@functools.cache
def word_mask(word: str) -> Image.Image:
    """Where the ink of a word of `WORDS` is: 8-bit coverage, cut to the ink."""
    cell = _cells("words.png", *WORD, len(WORDS))[WORDS.index(word)]
    return cell.crop(cell.getbbox())


def place_word(word: str, space: PixelBox, *, height: float = 0.8) -> PixelBox:
    """The box of the ink of a word in the middle of a space, of whose height it takes at most this share."""
    x0, y0, x1, y1 = space
    mask = word_mask(word)
    scale = min(0.9 * (x1 - x0) / mask.width, height * (y1 - y0) / mask.height)
    wide, high = max(1, round(mask.width * scale)), max(1, round(mask.height * scale))
    left, top = (x0 + x1 - wide) // 2, (y0 + y1 - high) // 2
    return left, top, left + wide, top + high


def write_word(
    image: Image.Image, word: str, space: PixelBox, *, ink: tuple[int, int, int] = INK, height: float = 0.8
) -> PixelBox:
    """Draws a word where `place_word` has it; returns the box of its ink."""
    left, top, right, bottom = place = place_word(word, space, height=height)
    image.paste(ink, (left, top), word_mask(word).resize((right - left, bottom - top), Image.Resampling.LANCZOS))
    return place


@functools.cache
def letter_spans(word: str) -> tuple[tuple[str, float, float], ...]:
    """Each letter of an English word, and where it begins and ends, as shares of the ink's width.

    Letters lie between columns without ink; where two touch, what they share is cut in half.
    """
    mask = word_mask(word)
    columns = [max(mask.crop((x, 0, x + 1, mask.height)).tobytes()) >= _INKED for x in range(mask.width)]
    edges = [x for x in range(mask.width + 1) if ([False, *columns][x]) != ([*columns, False][x])]
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    while len(spans) < len(word):
        start, end = widest = max(spans, key=lambda span: span[1] - span[0])
        place = spans.index(widest)
        spans[place : place + 1] = [(start, (start + end) // 2), ((start + end) // 2, end)]
    return tuple(
        (letter, start / mask.width, end / mask.width) for letter, (start, end) in zip(word, spans, strict=True)
    )


def _draw_sprites(emoji: Path) -> Image.Image:
    font = ImageFont.truetype(str(emoji), _EMOJI_SIZE)
    atlas = Image.new("RGBA", (_PER_ROW * SPRITE, -(-len(NOUNS) // _PER_ROW) * SPRITE))
    for index, noun in enumerate(NOUNS):
        glyph = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(glyph).text((0, 0), noun.emoji, font=font, embedded_color=True)
        ink = glyph.crop(glyph.getbbox())
        side = max(ink.size)
        square = Image.new("RGBA", (side, side))
        square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
        cell = square.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)
        atlas.paste(cell, (index % _PER_ROW * SPRITE, index // _PER_ROW * SPRITE))
    return atlas


def _draw_words(latin: Path, chinese: Path) -> Image.Image:
    width, height = WORD
    atlas = Image.new("L", (_PER_ROW * width, -(-len(WORDS) // _PER_ROW) * height))
    for index, word in enumerate(WORDS):
        font = ImageFont.truetype(str(latin if word.isascii() else chinese), 34)
        middle = (index % _PER_ROW * width + width // 2, index // _PER_ROW * height + height // 2)
        ImageDraw.Draw(atlas).text(middle, word, fill=255, font=font, anchor="mm")
    return atlas


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlm.demo.sprites")
    parser.add_argument("folder", type=Path)
    for name in ("emoji", "latin", "chinese"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FONT")
    options = parser.parse_args(arguments)
    _draw_sprites(options.emoji).save(options.folder / "sprites.png", optimize=True)
    _draw_words(options.latin, options.chinese).save(options.folder / "words.png", optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
