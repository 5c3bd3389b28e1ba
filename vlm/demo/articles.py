"""Illustrated articles about the embedded world, and what their author is taught (InternLM-XComposer)."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from vlm.demo import tasks
from vlm.demo.scenes import Scene
from vlm.demo.write import scenes
from vlm.procedures.compose import requests
from vlm.procedures.compose.requests import Request
from vlm.sample import ImageFile

TITLES = "titles.txt"
_OPENING, _ENDING = "Some cards:", "That was all."
_NUM_TITLES = 4
Named = tuple[str, Scene]


def write_articles(folder: Path, num: int, size: int, seed: int) -> None:
    """Writes `composition.json`, `titles.txt` with titles that none of its articles has, and the images.

    An article tells of two scenes, a line each, between lines that tell nothing. It becomes one record for each thing
    that its author is asked: the text, the lines that want an image, a caption for each, which of four images it is.
    """
    found: list[Named] = list(scenes("train", num=num, size=size, seed=seed))
    for name, scene in found:
        scene.draw().save(folder / "images" / f"{name}.png")
    records: list[dict[str, Any]] = []
    for at in range(0, len(found) - 1, 2):
        records += _records(found[at : at + 2], found, Random(f"article {seed} {at}"))
    (folder / "composition.json").write_text(json.dumps(records, ensure_ascii=False) + "\n", encoding="utf-8")
    titles = [_title(found[at : at + 2]) for at in range(1, min(len(found) - 1, 2 * _NUM_TITLES), 2)]
    (folder / TITLES).write_text("\n".join(titles) + "\n", encoding="utf-8")


def _records(pair: Sequence[Named], found: Sequence[Named], random: Random) -> list[dict[str, Any]]:
    captions = [_caption(scene) for _, scene in pair]
    sections = [_OPENING, *(f"Here is {caption}." for caption in captions), _ENDING]
    told = list(enumerate(captions, 1))
    title, name = _title(pair), "_".join(name for name, _ in pair)
    written = [
        (requests.ask_article(title), "\n".join(sections)),
        (requests.ask_places(sections), ", ".join(f"<Seg{place}>" for place, _ in told)),
    ]
    chosen: list[tuple[int, ImageFile]] = []
    for place, caption in told:
        written.append((requests.ask_caption(sections, place, told[: place - 1]), f'{caption}"'))
        # nothing else may be what the caption tells of
        others = [other for other, scene in found if caption not in tasks.caption(scene, "en")]
        offered = [*random.sample(others, requests.NUM_CANDIDATES - 1), pair[place - 1][0]]
        random.shuffle(offered)
        right = offered.index(pair[place - 1][0])
        written.append(
            (requests.ask_choice(sections, place, chosen, [_file(other) for other in offered]), "ABCD"[right])
        )
        chosen.append((place, _file(pair[place - 1][0])))
    return [_record(f"{name}_{at}", request, answer) for at, (request, answer) in enumerate(written)]


def _record(identity: str, request: Request, answer: str) -> dict[str, Any]:
    """A request in LLaVA's form; what an answer begins with is part of it."""
    images = [part.name for part in request.parts if isinstance(part, ImageFile)]
    asked = "".join("<image>" if isinstance(part, ImageFile) else part for part in request.parts).strip()
    turns = tasks.conversation([(asked, f"{request.begun.strip()}{answer}")])
    record: dict[str, Any] = {"id": identity, "conversations": turns}
    return record | ({"image": images} if images else {})


def _file(name: str) -> ImageFile:
    return ImageFile(name=f"{name}.png")


def _caption(scene: Scene) -> str:
    return tasks.caption(scene, "en").split(", ")[0]


def _title(pair: Sequence[Named]) -> str:
    return " and ".join(scene.things[0].noun.name for _, scene in pair)
