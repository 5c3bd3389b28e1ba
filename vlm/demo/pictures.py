"""Pretrains the demo's systems on images, where a recipe begins with a system and not with its parts.

How Fuyu-8B was trained is not published; Qwen-VL's first stage takes 1.5 billion pairs, more than four minutes can
hold. So both have seen images before a recipe trains them: what is where in them, as a caption or as a drawing in
words, and no question about them.
"""

import io
from collections.abc import Iterator
from random import Random
from typing import Any

import torch

from vlm.codec import step_counts
from vlm.demo import tasks
from vlm.demo.one_cycle import OneCycle
from vlm.demo.scenes import make_scene
from vlm.sample import ImageFile, ImagePart, Message, Sample, TextPart

_CHINESE_SHARE = 0.3
_CELLS = (2, 3, 4, 5)
_DRAW = {"en": "Draw the image in {} rows of words.", "zh": "用{}行文字画出这张图片。"}


def picture_sample(index: int, *, drawing_share: float = 0.0) -> Sample:
    """Picture number `index` with its caption, or, in this share, with a drawing of it in words."""
    random = Random(f"picture {index}")
    language: tasks.Language = "zh" if random.random() < _CHINESE_SHARE else "en"
    scene = make_scene(random, split="train", size=96)
    if random.random() < drawing_share:
        cells = random.choice(_CELLS)
        request, answer = _DRAW[language].format(cells), tasks.as_grid(scene, language, cells=cells)
    else:
        request, answer = random.choice(tasks.CAPTION_REQUESTS[language]), tasks.caption(scene, language)
    file = io.BytesIO()
    scene.draw().save(file, "PNG")
    messages = (Message("user", (ImagePart(), TextPart(request))), Message("assistant", (TextPart(answer),)))
    return Sample(str(index), messages, (ImageFile(f"{index}.png", data=file.getvalue()),))


def train_on_pictures(module: Any, *, steps: int, drawing_share: float = 0.0, batch: int = 16) -> Iterator[str]:
    """Trains what the stage of a built system trains, in place and for one cycle of its learning rates.

    Yields:
        A line of progress every hundred steps.
    """
    module.stage.set_trainable(module)
    groups = module.stage.optimizer_groups(module)
    cycle = OneCycle(torch.optim.AdamW(groups, betas=module.stage.optimizer.betas), steps=steps)
    mean = 0.0
    for step in range(steps):
        numbers = range(step * batch, (step + 1) * batch)
        items = [module.codec.encode(picture_sample(number, drawing_share=drawing_share)) for number in numbers]
        counts = step_counts(items)
        loss = module.losses(module.codec.collate(items, counts=counts))["lm"] / counts["lm"]
        cycle.step(loss)
        mean += loss.item() / 100
        if step % 100 == 99:
            yield f"pictures {step + 1}: loss {mean:.3f}"
            mean = 0.0
    module.eval()
