"""Text on pictures: a font that has its characters, lines that fit."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ImageFont

FONTS = (
    "DejaVuSans.ttf",
    "Arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "simsun.ttc",
    str(Path(__file__).with_name("MicroHeiSubset.ttf")),
)
"""Files in which Linux, macOS and Windows have many scripts; tried where Pillow's own font lacks a character.

The last comes with the project, for machines without any: 12,783 common characters of Chinese, Japanese and
Korean, and Latin.
"""
_NO_CHARACTER = "\uffff"


class Text(NamedTuple):
    """Lines ready to be drawn, all in one font."""

    lines: list[str]
    font: Any


def typeset(text: str, *, size: int, width: int, max_lines: int) -> Text:
    """A text in lines of at most `width` pixels.

    The font is the first that has all of its characters, else the one that lacks the fewest; a character that it lacks
    is written as its code (`\\u732b`). Of more than `max_lines` lines the rest is cut, and the last one says so.
    """
    text = printable(text)
    font, lacking = font_for(text, size=size)
    lines = list(islice(wrap(spelled(text, lacking), width=width, font=font), max_lines + 1))
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], "... (cut)"]
    return Text(lines, font)


def printable(text: str) -> str:
    """Without control characters, tabs as blanks."""
    return "".join(c for c in text.expandtabs(4) if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf"))


def font_for(text: str, *, size: int) -> tuple[Any, frozenset[str]]:
    """The first font that has all characters of a text, else the one that lacks the fewest, and those it lacks."""
    wanted = frozenset(text) - frozenset(" \n")
    best, lacking = None, wanted
    for font in (font for name in (None, *FONTS) if (font := _font(name, size)) is not None):
        missing = frozenset(c for c in wanted if _lacks(font, c))
        if best is None or len(missing) < len(lacking):
            best, lacking = font, missing
        if not lacking:
            break
    return best, lacking


def spelled(text: str, lacking: frozenset[str]) -> str:
    """The text with the characters that a font lacks as their codes."""
    return "".join(c.encode("unicode_escape").decode() if c in lacking else c for c in text)


def wrap(text: str, *, width: int, font: Any) -> Iterator[str]:
    """Lines that are at most `width` pixels long; a word that is longer is cut, as are texts without blanks."""
    for paragraph in text.splitlines():
        current = ""
        for word in re.findall(r"\S+\s*|\s+", paragraph):
            if font.getlength((current + word).rstrip()) <= width:
                current += word
                continue
            # a word without blanks may be a whole Chinese sentence: it goes on in the line, if it has to be cut anyway
            if current and font.getlength(word.rstrip()) <= width:
                yield current.rstrip()
                current = ""
            *full, current = _cut(current, word, width=width, font=font)
            yield from full
        yield current.rstrip()


def _cut(line: str, word: str, *, width: int, font: Any) -> Sequence[str]:
    lines = []
    for character in word:
        if line and font.getlength((line + character).rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += character
    return [*lines, line]


@cache
def _font(name: str | None, size: int) -> Any:
    """A font of the system by its file name, or Pillow's own; None where there is no such file."""
    if name is None:
        return ImageFont.load_default(size=size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@cache
def _lacks(font: Any, character: str) -> bool:
    """Whether a font draws a character as the sign for a missing one: Pillow does not show a font's table."""
    mask, missing = font.getmask(character), font.getmask(_NO_CHARACTER)
    return mask.size == missing.size and bytes(mask) == bytes(missing)
