"""`vlm demo-data --format science_qa`: multiple-choice questions about the embedded world, in ScienceQA's layout."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from vlm.checkpoints.files.atomic import atomic_directory
from vlm.demo import tasks
from vlm.demo.scenes import SPLITS, Split, make_scene
from vlm.demo.tasks import Turn
from vlm.errors import UserError

FACTS = "demo_data.json"
_VERSION = 3
_TEXT_ONLY_SHARE = 0.4
_LECTURES = {
    "vqa": "A picture shows things on cards.",
    "color": "The color of a card is the color around the thing on it.",
    "position": "A picture has a top and a bottom, a left and a right.",
    "count": "To count things, look at every card.",
    "text": "",
}


def write_science_qa(
    folder: str | Path, *, num_train: int = 2000, num_val: int = 64, num_test: int = 192, size: int = 96, seed: int = 0
) -> bool:
    """Writes questions with options, a lecture and an explanation; two in five have no image.

    The layout is that of `vlm.data.ScienceQA`. Questions of validation and test are about things on a colour at a
    place where no training image has them. The files are the same to the last byte for the same arguments and the
    same Pillow.

    Args:
        folder: appears when everything in it is written.
        num_train: training questions, likewise `num_val` and `num_test`.
        size: mean length of a picture's shorter side in pixels.
        seed: of everything drawn by lot.

    Returns:
        Whether anything was written: False if the folder holds just this data.

    Raises:
        UserError: the folder holds something else, or a number makes no sense.
    """
    folder = Path(folder)
    numbers: dict[Split, int] = dict(zip(SPLITS, (num_train, num_val, num_test), strict=True))
    facts = {"format": "science_qa", "version": _VERSION, "seed": seed, "size": size, "num": numbers}
    for name, value, least in (*((f"num_{split}", num, 1) for split, num in numbers.items()), ("size", size, 16)):
        if value < least:
            raise UserError(f"demo-data: {name} is {value}; it must be at least {least}")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if _facts_of(folder) == facts:
            return False
        raise UserError(f"{folder}: is not empty and does not hold this data; choose or empty another folder")
    pool = _text_pool(seed)
    with atomic_directory(folder) as temporary:
        problems: dict[str, dict[str, Any]] = {}
        splits: dict[str, list[str]] = {}
        for split, num in numbers.items():
            splits[split] = [str(len(problems) + number + 1) for number in range(num)]
            for pid in splits[split]:
                random = Random(f"science {seed} {split} {pid}")
                if random.random() < _TEXT_ONLY_SHARE:
                    [turn] = tasks.dialogue(random, "en")[:1]
                    problems[pid] = _problem(turn, pool[_kind(turn)], random, split=split)
                else:
                    target = temporary / "images" / split / pid
                    target.mkdir(parents=True)
                    problems[pid] = _about_picture(target / "image.png", random, split=split, size=size)
        for name, content in {"problems.json": problems, "pid_splits.json": splits, FACTS: facts}.items():
            (temporary / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return True


def _about_picture(file: Path, random: Random, *, split: Split, size: int) -> dict[str, Any]:
    found: list[Turn] = []
    while not found:  # a scene may have nothing but signs
        scene = make_scene(random, split=split, size=size)
        asked = [turn for turn in tasks.questions(scene, "en", random) if _LECTURES.get(turn.task)]
        found = [turn for turn in asked if turn.new or split == "train"]
    task = random.choice(sorted({turn.task for turn in found}))
    turn = random.choice([turn for turn in found if turn.task == task])
    scene.draw().save(file)
    solution = f"The picture shows {tasks.caption(scene, 'en')}."
    return _problem(turn, tasks.OPTIONS[task], random, split=split, solution=solution) | {"image": file.name}


def _problem(turn: Turn, pool: Iterable[str], random: Random, *, split: Split, solution: str = "") -> dict[str, Any]:
    choices = tasks.choices(turn.answer, pool, random)
    return {
        "question": turn.question.removesuffix(f"\n{tasks.SHORT['en']}"),
        "choices": choices,
        "answer": choices.index(turn.answer),
        "hint": "",
        "image": None,
        "lecture": _LECTURES[turn.task],
        "solution": f"{solution} So it is {turn.answer}.".strip(),
        "split": split,
    }


def _kind(turn: Turn) -> str:
    """Questions of one kind have answers of one kind: a number, "a color", or what the first words ask for."""
    if turn.answer.isdigit():
        return "number"
    return "class" if turn.answer.startswith("a ") else " ".join(turn.question.split()[:4])


def _text_pool(seed: int) -> dict[str, set[str]]:
    pool: dict[str, set[str]] = {}
    random = Random(f"science text {seed}")
    for _ in range(2000):
        for turn in tasks.dialogue(random, "en"):
            pool.setdefault(_kind(turn), set()).add(turn.answer)
    return pool


def _facts_of(folder: Path) -> Any:
    try:
        return json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def main(arguments: list[str]) -> int:
    """`vlm demo-data FOLDER --format science_qa`."""
    parser = argparse.ArgumentParser(
        prog="vlm demo-data --format science_qa", description="Writes embedded questions in ScienceQA's layout."
    )
    parser.add_argument("folder", help="where to; it must be new, empty, or hold just this data")
    parser.add_argument("--num_train", type=int, default=2000, help="training questions (default %(default)s)")
    parser.add_argument("--num_val", type=int, default=64, help="validation questions (default %(default)s)")
    parser.add_argument("--num_test", type=int, default=192, help="test questions (default %(default)s)")
    parser.add_argument("--size", type=int, default=96, help="mean shorter side in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    folder = Path(options.pop("folder"))
    written = write_science_qa(folder, **options)
    numbers = ", ".join(f"{options[f'num_{split}']} {split}" for split in SPLITS)
    print(f"{folder}: questions: {numbers}" if written else f"{folder}: is there already")
    return 0
