"""Pretrains the demo's Fuyu: its decoder on text, then decoder and projection together on pictures.

How the released model was trained is not published. It has seen text and pictures, and so has this one before a recipe
fine-tunes it. Of pictures it has learned to say what is where, as a caption or as a drawing in words; of questions it
knows those about text.
"""

import io
from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from torch import nn

from vlm.codec import step_counts
from vlm.demo import tasks
from vlm.demo.scenes import make_scene
from vlm.sample import ImageFile, ImagePart, Message, Sample, TextPart

_CHINESE_SHARE = 0.3
_CAPTION_SHARE = 0.5
_CELLS = (2, 3, 4, 5)
_DRAW = {"en": "Draw the image in {} rows of words.", "zh": "用{}行文字画出这张图片。"}


def picture_sample(index: int) -> Sample:
    """Picture number `index` with its caption, or with a drawing of it in words."""
    random = Random(f"fuyu {index}")
    language: tasks.Language = "zh" if random.random() < _CHINESE_SHARE else "en"
    scene = make_scene(random, split="train", size=96)
    if random.random() < _CAPTION_SHARE:
        request, answer = random.choice(tasks.CAPTION_REQUESTS[language]), tasks.caption(scene, language)
    else:
        cells = random.choice(_CELLS)
        request, answer = _DRAW[language].format(cells), tasks.as_grid(scene, language, cells=cells)
    file = io.BytesIO()
    scene.draw().save(file, "PNG")
    messages = (Message("user", (ImagePart(), TextPart(request))), Message("assistant", (TextPart(answer),)))
    return Sample(str(index), messages, (ImageFile(f"{index}.png", data=file.getvalue()),))


def train_on_pictures(module: Any, *, steps: int, batch: int = 16, rate: float = 1e-3) -> Iterator[str]:
    """Trains a built Fuyu in place, one cycle of the learning rate.

    Yields:
        A line of progress every hundred steps.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    module.train()
    mean = 0.0
    for step in range(steps):
        items = [module.codec.encode(picture_sample(number)) for number in range(step * batch, (step + 1) * batch)]
        counts = step_counts(items)
        loss = module.losses(module.codec.collate(items, counts=counts))["lm"] / counts["lm"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean += loss.item() / 100
        if step % 100 == 99:
            yield f"pictures {step + 1}: loss {mean:.3f}"
            mean = 0.0
    module.eval()
