"""`vlm demo-data`: the embedded data in LLaVA's public form, ready for the ordinary readers."""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from vlm.checkpoints.files.atomic import atomic_directory
from vlm.demo import tasks
from vlm.demo.scenes import SPLITS, Scene, Split, make_scene
from vlm.demo.tasks import Language, Turn
from vlm.errors import UserError

FACTS = "demo_data.json"
"""File that says what the folder was made from. A folder with the same facts is not written again."""
_VERSION = 4
_TEXT_ONLY_SHARE = 0.1
_CHINESE_SHARE = 0.3
_CAPTION_SHARE = 0.3
_TURNS = 4

Record = dict[str, Any]


def write_demo_data(
    folder: str | Path, *, num_train: int = 8000, num_val: int = 32, num_test: int = 96, size: int = 96, seed: int = 0
) -> bool:
    """Writes images of things on cards and of signs, with captions, questions and talk about them.

    ::

        train_captions.json   a caption per training image
        train_instruct.json   up to four questions per training image, each of another task, now and then its
                              caption, the image before the first question or behind it; one record in eleven has no
                              image
        val_instruct.json     per validation image one record of each task that it allows, `task` and `answers` named
        test_instruct.json    the same of the test images
        images/*.png          what the records name, so `image_root` is this folder
        pictures/*            larger images of test scenes as a person has them: JPEG, WebP, PNG with a palette

    Three records in ten are in Chinese. Every image of validation and test shows a thing on a colour at a place
    where no training image has it (`scenes.split_of`), and that is what is asked about. The files are the same to
    the last byte for the same arguments and the same Pillow.

    Args:
        folder: appears when everything in it is written.
        num_train: training images.
        num_val: validation images.
        num_test: test images.
        size: mean length of a picture's shorter side in pixels.
        seed: of everything drawn by lot.

    Returns:
        Whether anything was written: False if the folder holds just this data.

    Raises:
        UserError: the folder holds something else, or a number makes no sense.
    """
    folder = Path(folder)
    numbers = dict(zip(SPLITS, (num_train, num_val, num_test), strict=True))
    facts = {"version": _VERSION, "seed": seed, "size": size} | {f"num_{name}": num for name, num in numbers.items()}
    for name, least in (*((f"num_{split}", 1) for split in SPLITS), ("size", 16)):
        if facts[name] < least:
            raise UserError(f"demo-data: {name} is {facts[name]}; it must be at least {least}")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if _facts_of(folder) == facts:
            return False
        raise UserError(f"{folder}: is not empty and does not hold this data; choose or empty another folder")
    with atomic_directory(folder) as temporary:
        (temporary / "images").mkdir()
        drawn = {split: dict(scenes(split, num=num, size=size, seed=seed)) for split, num in numbers.items()}
        for pictures in drawn.values():
            for name, scene in pictures.items():
                scene.draw().save(temporary / "images" / f"{name}.png")
        _write_pictures(temporary / "pictures", size=4 * size, seed=seed)
        for name, records in {
            "train_captions.json": captions(drawn["train"], seed=seed),
            "train_instruct.json": instructions(drawn["train"], seed=seed),
            "val_instruct.json": short_questions(drawn["val"], seed=seed),
            "test_instruct.json": short_questions(drawn["test"], seed=seed),
        }.items():
            text = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
            (temporary / name).write_text(f"[\n{text}\n]\n", encoding="utf-8")
        (temporary / FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return True


def scenes(split: Split, *, num: int, size: int, seed: int) -> Iterator[tuple[str, Scene]]:
    """(name, scene); each scene depends on the seed and its own number alone."""
    for index in range(num):
        yield f"{split}_{index:05d}", make_scene(Random(f"scene {seed} {split} {index}"), split=split, size=size)


def captions(scenes: dict[str, Scene], *, seed: int) -> Iterator[Record]:
    """One caption per image; the request stands before the image or behind it, as in LLaVA's own files."""
    for name, scene in scenes.items():
        random = Random(f"caption {seed} {name}")
        language = draw_language(random)
        request = random.choice(tasks.CAPTION_REQUESTS[language])
        human = f"{request}\n<image>" if random.random() < 0.5 else f"<image>\n{request}"
        yield _record(name, name, [(human, tasks.caption(scene, language))])


def instructions(scenes: dict[str, Scene], *, seed: int) -> Iterator[Record]:
    """Several tasks about every image, with dialogues without an image among them."""
    for number, (name, scene) in enumerate(scenes.items()):
        random = Random(f"instruction {seed} {name}")
        caption, *others = all_tasks(scene, draw_language(random), random)
        chosen = random.sample(others, min(_TURNS, len(others)))
        if random.random() < _CAPTION_SHARE:
            chosen.append(caption)  # last, or the other answers could be read off it
        behind = Random(f"place {seed} {name}").random() < 0.5
        yield _record(name, name, _with_image([(turn.question, turn.answer) for turn in chosen], behind=behind))
        if random.random() < _TEXT_ONLY_SHARE:
            turns = tasks.dialogue(random, draw_language(random))
            yield _record(f"text_{number:05d}", None, [(turn.question, turn.answer) for turn in turns])


def short_questions(scenes: dict[str, Scene], *, seed: int) -> Iterator[Record]:
    """One question of every task that an image allows, about what training does not show.

    Every number is the answer to as many counts as any other, as far as the images have it.
    """
    counts: Counter[str] = Counter()
    quota = max(1, len(scenes) // 6)
    for name, scene in scenes.items():
        random = Random(f"question {seed} {name}")
        language = draw_language(random)
        for turn in all_tasks(scene, language, random, new=True):
            if turn.task == "count":
                counts[turn.answer] += 1
                if counts[turn.answer] > quota:
                    continue
            record = _record(f"{name}_{turn.task}_{language}", name, _with_image([(turn.question, turn.answer)]))
            yield record | _asked(turn)
        turn = tasks.dialogue(random, language)[0]
        yield _record(f"{name}_text_{language}", None, [(turn.question, turn.answer)]) | _asked(turn)


def all_tasks(scene: Scene, language: Language, random: Random, *, new: bool = False) -> Iterator[Turn]:
    """One turn of each task that a scene allows; with `new`, about what is new in it alone."""
    asked = tasks.questions(scene, language, random)
    if new:
        asked = [turn for turn in asked if turn.new]
    yield Turn("caption", random.choice(tasks.CAPTION_REQUESTS[language]), tasks.caption(scene, language))
    for task in tasks.TASKS:
        if (turn := tasks.choose(asked, random, task=task)) is not None:
            yield turn


def main(arguments: list[str]) -> int:
    """`vlm demo-data FOLDER`."""
    parser = argparse.ArgumentParser(prog="vlm demo-data", description="Writes the embedded data in LLaVA's form.")
    parser.add_argument("folder", help="where to; it must be new, empty, or hold just this data")
    parser.add_argument("--num_train", type=int, default=8000, help="training pictures (default %(default)s)")
    parser.add_argument("--num_val", type=int, default=32, help="validation pictures (default %(default)s)")
    parser.add_argument("--num_test", type=int, default=96, help="test pictures (default %(default)s)")
    parser.add_argument("--size", type=int, default=96, help="mean shorter side in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    folder = Path(options.pop("folder"))
    if write_demo_data(folder, **options):
        numbers = ", ".join(f"{options[f'num_{split}']} {split}" for split in SPLITS)
        print(f"{folder}: pictures: {numbers}")
    else:
        print(f"{folder}: is there already")
    return 0


def _write_pictures(folder: Path, *, size: int, seed: int) -> None:
    folder.mkdir()
    for index, (_, scene) in enumerate(scenes("test", num=6, size=size, seed=seed + 1)):
        suffix, form = (("jpg", "RGB"), ("webp", "RGB"), ("png", "P"))[index % 3]
        scene.draw().convert(form).save(folder / f"picture_{index + 1}.{suffix}", quality=90)


def draw_language(random: Random) -> Language:
    """Chinese for three records in ten."""
    return "zh" if random.random() < _CHINESE_SHARE else "en"


def _with_image(turns: list[tuple[str, str]], *, behind: bool = False) -> list[tuple[str, str]]:
    (question, answer), *others = turns
    return [(f"{question}\n<image>" if behind else f"<image>\n{question}", answer), *others]


def _record(name: str, picture: str | None, turns: list[tuple[str, str]]) -> Record:
    image = {} if picture is None else {"image": f"{picture}.png"}
    return {"id": name} | image | {"conversations": tasks.conversation(turns)}


def _asked(turn: Turn) -> Record:
    return {"task": turn.task, "answers": [{"text": turn.answer, "weight": 1.0}]}


def _facts_of(folder: Path) -> Any:
    try:
        return json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
