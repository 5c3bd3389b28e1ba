"""The embedded world in the annotation files of BLIP's fine-tuning: captions, questions, sentences about two images."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from vlm.demo import tasks
from vlm.demo.scenes import Scene
from vlm.demo.write import scenes

ASKED = ("vqa", "color", "position", "count")
"""Tasks of the questions, one of each about an image that allows it."""
_TEST_SHARE = 10
_HUMAN_SHARE = 4
NOISE = 0.4
"""Share of the web's pairs whose text is another image's."""

Records = list[dict[str, Any]]


def write_blip(folder: Path, num: int, size: int, seed: int) -> None:
    """`{captions,vqa,nlvr}_{train,test}.json`, `{human,web}_train.json`, their images, and `answer_list.json` to choose
    from; one image in eleven is of the test."""
    for split, count in (("train", num), ("test", max(2, num // _TEST_SHARE))):
        found = dict(scenes(split, num=count, size=size, seed=seed))  # type: ignore[arg-type]
        for name, scene in found.items():
            scene.draw().save(folder / "images" / f"{name}.png")
        made = {
            "captions": _captions(found, several=split == "test"),
            "vqa": _questions(found, seed),
            "nlvr": _sentences(found, seed),
        }
        if split == "train":
            made |= _web_and_human(made["captions"], seed)
        for kind, records in made.items():
            text = json.dumps(records, ensure_ascii=False) + "\n"
            (folder / f"{kind}_{split}.json").write_text(text, encoding="utf-8")
        if split == "train":
            answers = sorted({record["answer"][0] for record in made["vqa"]})
            (folder / "answer_list.json").write_text(json.dumps(answers) + "\n", encoding="utf-8")


def _captions(found: Mapping[str, Scene], *, several: bool) -> Records:
    texts = {name: tasks.caption(scene, "en") for name, scene in found.items()}
    return [
        {"image": f"{name}.png", "image_id": name, "caption": [text] if several else text}
        for name, text in texts.items()
    ]


def _web_and_human(captions: Records, seed: int) -> dict[str, Records]:
    """A quarter of the pairs as people write them, the others as the web has them: of some the text is another's.

    `belongs` says which are right, so that what a filter finds is known.
    """
    people = len(captions) // _HUMAN_SHARE
    rest = captions[people:]
    web = []
    for at, record in enumerate(rest):
        random = Random(f"blip web {seed} {record['image_id']}")
        belongs = random.random() >= NOISE
        other = rest[(at + 1 + random.randrange(max(1, len(rest) - 1))) % len(rest)]
        text = record["caption"] if belongs else other["caption"]
        web.append({**record, "caption": text, "belongs": text == record["caption"]})
    return {"human": captions[:people], "web": web}


def _questions(found: Mapping[str, Scene], seed: int) -> Records:
    records: Records = []
    for name, scene in found.items():
        random = Random(f"blip vqa {seed} {name}")
        turns = tasks.questions(scene, "en", random)
        for task in ASKED:
            if (turn := tasks.choose(turns, random, task=task)) is not None:
                question = turn.question.removesuffix(f"\n{tasks.SHORT['en']}")
                records.append(
                    {"question_id": len(records), "question": question, "answer": [turn.answer] * 10,
                     "image": f"{name}.png", "dataset": "vqa"}
                )  # fmt: skip
    return records


def _sentences(found: Mapping[str, Scene], seed: int) -> Records:
    """Each image beside another one, with a sentence that is as often true as false."""
    names = list(found)
    records: Records = []
    for at, name in enumerate(names):
        random = Random(f"blip nlvr {seed} {name}")
        pair = [name, names[(at + 1) % len(names)]]
        shown = [{thing.noun.name for thing in found[one].things} for one in pair]
        is_true, side = random.random() < 0.5, random.randrange(2)
        noun = _pick(random, shown[side] if is_true else shown[1 - side] - shown[side])
        if noun is None:  # the other image has nothing of its own
            noun, is_true = _pick(random, shown[side]), True
        sentence = f"The {('left', 'right')[side]} image shows {_article(noun)} {noun}."
        images = [f"{one}.png" for one in pair]
        records.append({"sentence": sentence, "label": str(is_true), "images": images})
    return records


def _pick(random: Random, words: Sequence[str] | set[str]) -> str | None:
    return random.choice(sorted(words)) if words else None


def _article(noun: str | None) -> str:
    return "an" if noun and noun[0] in "aeiou" else "a"
