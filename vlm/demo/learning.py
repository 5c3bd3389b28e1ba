"""How the demo's language models learn: batches of texts of much the same length, and the loop over them."""

from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlm.demo.one_cycle import OneCycle

_CHUNK = 16  # batches whose items are sorted by length together
T = TypeVar("T")


def by_length(
    make: Callable[[int], T], length: Callable[[T], int], *, first: int, steps: int, batch: int
) -> Iterator[list[T]]:
    """`steps` batches of the items that `make` makes of numbers from `first * batch` on, in no order."""
    for start in range(first, first + steps, _CHUNK):
        num = min(_CHUNK, first + steps - start)
        items = [make(index) for index in range(start * batch, (start + num) * batch)]
        items.sort(key=length)
        for at in Random(start).sample(range(num), num):
            yield items[at * batch : (at + 1) * batch]


def learn(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], *, steps: int, rate: float, first: int = 0
) -> Iterator[str]:
    """Trains a model of transformers in place, one cycle of the learning rate long.

    Args:
        batches: what the model takes, its labels among them.
        steps: number of batches.
        first: number of steps trained before.

    Yields:
        A line of progress every hundred steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    cycle = OneCycle(optimizer, steps=steps)
    model.train()
    mean = 0.0
    for step, batch in enumerate(batches):
        loss = model(**batch).loss
        cycle.step(loss)
        mean += loss.item() / 100
        if step % 100 == 99:
            yield f"{first + step + 1}: loss {mean:.3f}"
            mean = 0.0
    model.eval()
