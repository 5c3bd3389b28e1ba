"""Samples like those of an instruction mix: a picture, a question, an answer with a long tail."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random

from PIL import Image

from vlm.sample import Sample, parse_sample

WORDS = ("a", "ball", "behind", "the", "green", "box", "is", "small", "and", "of", "red", "wood", "on", "its", "left")


def samples_of(folder: Path, *, picture: tuple[int, int], limit: int) -> Iterator[Sample]:
    """Samples without end; answers of 20 words and more, most below 100.

    Args:
        folder: where the picture is written that they all have.
        picture: its width and height.
        limit: tokens of a pack, which the text of no sample comes near.
    """
    random = Random(0)
    Image.effect_noise(picture, 64).convert("RGB").save(folder / "picture.jpg")
    for number in count():
        words = min(20 + int(random.lognormvariate(4, 0.8)), limit // 8)
        answer = " ".join(random.choices(WORDS, k=words))
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is there?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        record = {"id": str(number), "images": ["picture.jpg"], "messages": messages}
        yield parse_sample(record, image_root=folder)
