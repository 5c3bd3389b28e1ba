"""Pools of samples that tests train and ask systems on."""

from pathlib import Path

import torch
from PIL import Image

from vlm.sample import ImageFile, ImagePart, Message, Sample, TextPart


def picture(folder: Path, name: str, size: tuple[int, int], seed: int) -> ImageFile:
    """A file with a random picture."""
    path = folder / f"{name}.png"
    if not path.exists():
        noise = torch.randint(0, 256, (5, 7, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).resize(size).save(path)
    return ImageFile(name=path.name, path=path)


def samples(folder: Path, count: int = 6) -> list[Sample]:
    """Conversations of different lengths: one picture, no picture, two pictures, two turns, a long answer."""
    made = []
    for i in range(count):
        images = [picture(folder, f"{i}_{k}", (40 + 9 * i, 30 + 5 * k), 10 * i + k) for k in range((1, 0, 2)[i % 3])]
        messages = [
            Message("user", (*(ImagePart() for _ in images), TextPart(f"\nWhat is {i}?"))),
            Message("assistant", (TextPart("A small red ball. " * (1 + 5 * (i % 4 == 3)) + str(i)),)),
        ]
        if i % 2:
            messages += [
                Message("user", (TextPart("And where?"),)),
                Message("assistant", (TextPart("On the left of the blue box."),)),
            ]
        made.append(Sample(id=str(i), messages=tuple(messages), images=tuple(images), source="test"))
    return made


def pairs(folder: Path, count: int = 24) -> list[Sample]:
    """Pictures with captions of different lengths."""
    return [
        Sample(
            id=str(i),
            messages=(
                Message("user", (ImagePart(),)),
                Message("assistant", (TextPart("a red ball and " * (1 + i % 3) + f"a card with {i}"),)),
            ),
            images=(picture(folder, f"pair{i}", (40 + i, 30), 9 * i),),
            source="pairs",
        )
        for i in range(count)
    ]


def questions(folder: Path) -> list[Sample]:
    """Prompts of very different length, with pictures and without."""

    def ask(name: str, text: str, pictures: int) -> Sample:
        images = tuple(picture(folder, f"{name}_{k}", (40, 30), k) for k in range(pictures))
        message = Message("user", (*(ImagePart() for _ in images), TextPart(text)))
        return Sample(id=name, messages=(message, Message("assistant", (TextPart("Yes."),))), images=images)

    return [
        ask("two", "What? " * 100, 2),
        ask("none", "Who?", 0),
        ask("one", "And this?", 1),
        ask("far", "No. " * 9, 0),
    ]
