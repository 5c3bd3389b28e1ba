"""`vlm demo-data --format large_pages`: pages that are large, with signs that are small beside them.

What a sign says can be read where the page is cut into tiles, and not where the whole of it is one small view.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw

from vlm.demo import tasks
from vlm.demo.scenes import COLORS, GROUNDS, SPLITS, Split, split_of
from vlm.demo.sprites import ENGLISH_WORDS, write_word

TASK = "page"
_SHAPES = ((4, 4), (4, 3), (3, 4))
_PLACES = ("top left", "top right", "bottom left", "bottom right")
_SHARES = {"train": 1.0, "val": 0.02, "test": 0.06}
Board = tuple[str, str, int]
"""A word, the colour of its board, and the quarter of the page that it is in, row by row."""


def write_large_pages(folder: Path, num: int, size: int, seed: int) -> None:
    """Writes `train.json`, `val.json` and `test.json` in LLaVA's form, and the pages.

    A page is three or four times `size` along each side and has a sign in each quarter, about as wide as `size`. What
    validation and test ask about is a word on a colour at a place that no training page shows (`split_of`).

    Args:
        num: training pages; there are a fiftieth as many for validation and three for the test, and at least two.
    """
    for split in SPLITS:
        records: list[dict[str, Any]] = []
        for index in range(max(2, round(num * _SHARES[split]))):
            name = f"{split}_{index:05d}"
            random = Random(f"large page {seed} {name}")
            boards = list(_boards(random, split))
            _draw(boards, random, size).save(folder / "images" / f"{name}.png")
            records.append(_record(name, boards, random, split))
        text = ",\n".join(json.dumps(record) for record in records)
        (folder / f"{split}.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")


def _boards(random: Random, split: Split) -> Iterator[Board]:
    """One for each quarter; the first one that is not of training is what is asked about."""
    new = None if split == "train" else random.randrange(len(_PLACES))
    left = random.sample(list(COLORS), len(COLORS))
    for place in range(len(_PLACES)):
        wanted = split if place == new else "train"
        while True:
            word, color = random.choice(ENGLISH_WORDS), random.choice(left)
            if split_of(word, color, place) == wanted:
                break
        left.remove(color)  # so that a colour names a sign
        yield word, color, place


def _draw(boards: list[Board], random: Random, size: int) -> Image.Image:
    across, down = random.choice(_SHAPES)
    page = Image.new("RGB", (across * size, down * size), random.choice(GROUNDS))
    pen = ImageDraw.Draw(page)
    for word, color, place in boards:
        width, height = round(random.uniform(0.9, 1.1) * size), round(random.uniform(0.33, 0.4) * size)
        row, column = divmod(place, 2)
        left = column * page.width // 2 + random.randint(4, page.width // 2 - width - 4)
        top = row * page.height // 2 + random.randint(4, page.height // 2 - height - 4)
        pen.rectangle((left, top, left + width - 1, top + height - 1), fill=COLORS[color])
        write_word(page, word, (left, top, left + width, top + height), height=0.7)
    return page


def _record(name: str, boards: list[Board], random: Random, split: Split) -> dict[str, Any]:
    asked = [board for board in boards if split_of(*board) == split]
    random.shuffle(asked)
    (question, answer), *others = [
        (_question(board, random), board[0]) for board in (asked if split == "train" else asked[:1])
    ]
    turns = tasks.conversation([(f"<image>\n{question}", answer), *others])
    record: dict[str, Any] = {"id": name, "image": f"{name}.png", "conversations": turns}
    return record if split == "train" else record | {"task": TASK, "answers": [{"text": answer, "weight": 1.0}]}


def _question(board: Board, random: Random) -> str:
    _, color, place = board
    sign = f"the sign at the {_PLACES[place]}" if random.random() < 0.5 else f"the {color} sign"
    return f"What does {sign} say?\n{tasks.SHORT['en']}"
