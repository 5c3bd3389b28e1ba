"""Screens of the embedded world as files: their elements found and told, their words read, and tasks done on them."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from vlm.demo.gui import Element, Kind, Screen, make_screen
from vlm.demo.scenes import Split
from vlm.demo.sprites import ENGLISH_WORDS

REQUEST = 'What steps do I need to take to "{}"?(with grounding)'
"""The first of CogAgent's published requests for an operation with its box."""
GROUND = "Provide the bounding box coordinate of the region this sentence describes."
REFER = "Provide a short description for this region."
_TASKS: dict[Kind, tuple[str, str]] = {
    "button": ("click {0}", "CLICK"),
    "link": ("open {0}", "CLICK"),
    "textbox": ("type {1} into {0}", "TYPE: {1}"),
    "combobox": ("choose {1} in {0}", "SELECT: {1}"),
    "image": ("click the {0}", "CLICK"),
}
"""What is asked about an element, and its operation in the words of Mind2Web."""


def write_gui(folder: Path, num: int, size: int, seed: int) -> None:
    """Files of screens to train on and of questions.

    To train on, `screens.jsonl` (`vlm.data.ScreenElements`), and of the same screens `text.jsonl` with their words
    (`vlm.data.TextLines`) and `agent.jsonl` with a task for each (`vlm.data.ChatJson`). `val.jsonl` and `test.jsonl`
    have one question of each kind per screen, about what no training screen shows.
    """
    splits: tuple[tuple[Split, int], ...] = (("train", num), ("val", max(2, num // 50)), ("test", max(2, num // 25)))
    for split, count in splits:
        found = list(_screens(split, num=count, size=size, seed=seed))
        for name, screen in found:
            screen.draw().save(folder / "images" / f"{name}.png")
        if split == "train":
            _lines(folder / "screens.jsonl", (_elements(name, screen) for name, screen in found))
            _lines(folder / "text.jsonl", (_words(name, screen) for name, screen in found if _is_read(screen)))
            _lines(folder / "agent.jsonl", (_task(name, screen, seed) for name, screen in found))
        else:
            _lines(folder / f"{split}.jsonl", (line for item in found for line in _questions(*item, split, seed)))


def _screens(split: Split, *, num: int, size: int, seed: int) -> Iterator[tuple[str, Screen]]:
    for index in range(num):
        yield f"screen_{split}_{index:05d}", make_screen(Random(f"gui {seed} {split} {index}"), split=split, size=size)


def _elements(name: str, screen: Screen) -> dict[str, Any]:
    elements = [{"html": element.html, "box": list(element.box)} for element in screen.elements]
    return {"id": name, "image": f"{name}.png", "elements": elements}


def _is_read(screen: Screen) -> bool:
    return any(element.kind != "image" for element in screen.elements)


def _words(name: str, screen: Screen) -> dict[str, Any]:
    """What a screen says, from the top left to the bottom right."""
    lines = []
    for element in screen.elements:
        if element.kind != "image":
            x0, y0, x1, y1 = element.box
            lines.append({"text": element.text, "quad": [x0, y0, x1, y0, x1, y1, x0, y1]})
    return {"id": name, "image": f"{name}.png", "lines": lines}


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
