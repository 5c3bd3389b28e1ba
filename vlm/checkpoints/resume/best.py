"""The checkpoint that a logged value found best.

::

    checkpoints/best/step=400.ckpt   without the optimizer: it is for looking at
                     last            names it
                     score.json      monitor, value and step
"""

import json
import math
from pathlib import Path
from typing import Literal

from vlm.checkpoints.files.atomic import atomic_file
from vlm.errors import UserError

_SCORE = "score.json"
_SMALLER = ("loss", "perplexity", "error")
_LARGER = ("accuracy", "anls", "bleu", "cider", "f1", "iou", "precision", "recall", "score", "vqa")

Mode = Literal["min", "max"]


def mode_of(monitor: str) -> Mode:
    """Whether small or large values are good, by the name.

    Raises:
        UserError: the name does not say.
    """
    name = monitor.lower()
    if any(word in name for word in _SMALLER):
        return "min"
    if any(word in name for word in _LARGER):
        return "max"
    raise UserError(f"checkpoint.monitor: {monitor}: set checkpoint.mode to min or max, the name does not say")


def is_better(value: float, monitor: str, mode: Mode, folder: Path) -> bool:
    """Whether a value beats the best one so far of the same name; NaN beats nothing."""
    try:
        best = json.loads((folder / _SCORE).read_text())
    except (FileNotFoundError, ValueError):
        return not math.isnan(value)
    if best["monitor"] != monitor:
        return not math.isnan(value)
    return value < best["value"] if mode == "min" else value > best["value"]


def write_score(folder: Path, *, monitor: str, value: float, step: int) -> None:
    with atomic_file(folder / _SCORE) as file:
        file.write((json.dumps({"monitor": monitor, "value": value, "step": step}) + "\n").encode())
