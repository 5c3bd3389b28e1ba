"""The texts that the demo's tokenizers and language models learn from: what is said about training scenes."""

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from vlm.demo import tasks
from vlm.demo.scenes import Scene, make_scene
from vlm.demo.tasks import dialogue
from vlm.demo.write import all_tasks, captions, draw_language, scenes
from vlm.prompts.llava import TEMPLATES
from vlm.sample import Message, TextPart

_NUM_SCENES = 2000
_TAUGHT = (
    *("plain", "v0", "llava_v0", "v0_mmtag", "v1", "vicuna_v1", "llava_v1", "v1_mmtag"),
    *("llama_2", "llava_llama_2", "mistral_instruct", "mpt", "chatml_direct"),
)
"""Templates the tokenizer is trained on. A new one stays out: another tokenizer would need new weights everywhere."""
CUT = "\t"  # a place that no piece may reach across

PROMPTS = (
    *("a photo of", "a picture of", "Question: {} Short answer:", "Question: {} Answer:"),
    *("Write a short description for the image.", "Describe the image in detail.", "Answer the question."),
)
"""Fixed texts that the systems around BLIP put before an answer."""
_CELLS = (2, 3, 4)
_CHINESE_SHARE = 0.15
_LINES_SHARE = 0.15


def training_texts() -> Iterator[str]:
    """Every line the tokenizer is trained on. No validation scene among them."""
    train = dict(scenes("train", num=_NUM_SCENES, size=96, seed=0))
    captioned = (turn["value"] for record in captions(train, seed=0) for turn in record["conversations"])
    asked = (text for name, scene in train.items() for text in _conversation(name, scene))
    for text in (*captioned, *asked):
        # No piece of two Chinese characters, or whole phrases ("on the left is a green") would become one
        parts = re.sub(r"(?=[\u4e00-\u9fff])|(?<=[\u4e00-\u9fff])", CUT, text.replace("<image>", "").strip())
        yield from parts.splitlines()
    exchange = [Message("user", (TextPart("?"),)), Message("assistant", (TextPart("."),))]
    for template in map(TEMPLATES.__getitem__, _TAUGHT):
        text = "".join(getattr(span, "text", "") for span in template.render(exchange))
        # as often as a frequent question, so that the fixed texts around every sample become few tokens
        yield from 50 * [line for line in text.splitlines() if line.strip()]


def _conversation(name: str, scene: Scene) -> Iterator[str]:
    """Some of what is asked and answered about a scene, and now and then small talk."""
    random = Random(f"instruction 0 {name}")
    caption, *others = all_tasks(scene, draw_language(random), random)
    turns = random.sample(others, min(4, len(others)))
    if random.random() < 0.3:
        turns.append(caption)
    if random.random() < 0.1:
        turns += dialogue(random, draw_language(random))
    for turn in turns:
        yield turn.question
        yield turn.answer


def plain_texts() -> Iterator[str]:
    """Lines for the tokenizers of the parts around BLIP, whose texts have no marks of a conversation."""
    for name, scene in scenes("train", num=_NUM_SCENES, size=96, seed=0):
        for language in tasks.LANGUAGES:
            yield tasks.caption(scene, language)
        for text in _conversation(name, scene):
            yield from text.splitlines()
    for character in string.printable.strip():
        yield " ".join((character, character * 2, f"a{character}", f"{character}a"))
    yield from 50 * PROMPTS


@dataclass(frozen=True)
class Lesson:
    """A scene told in words, its caption, and some of what is asked about it."""

    told: str
    caption: str
    asked: tuple[tuple[str, str], ...]


def lesson(random: Random) -> Lesson:
    """One of a new training scene, mostly in English."""
    language: tasks.Language = "zh" if random.random() < _CHINESE_SHARE else "en"
    scene = make_scene(random, split="train", size=96)
    is_lines = random.random() < _LINES_SHARE
    if is_lines:
        told = tasks.as_lines(scene, language, random)
    else:
        told = tasks.as_grid(scene, language, cells=random.choice(_CELLS))
    found = [turn for turn in tasks.questions(scene, language, random) if turn.task not in ("refer", "ground")]
    found = random.sample(found, min(4, len(found)))
    asked = tuple((turn.question.removesuffix(f"\n{tasks.SHORT[language]}"), turn.answer) for turn in found)
    return Lesson(told, tasks.caption(scene, language), asked)
