"""How a step is shared by devices and micro-batches, and what the heaviest pack of it costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlm import functional
from vlm.codec import Encoded, step_counts
from vlm.data import VisionLanguageData
from vlm.planning.depth import along, at_full_depth, summed
from vlm.planning.samples import Samples, per_step
from vlm.planning.step import PackCost, cost_of_pack

MOST_IMAGES = 8
"""Of a pack that is run through the network; larger ones follow from two that are."""
_PARTS = 3
"""Of the logits of a pack that stands for one with more than are there at once; another one has twice as many."""
_NO_LIMIT = 2**62


@dataclass(frozen=True)
class Packing:
    """How a step is shared.

    Attributes:
        samples: of a pack, on average.
        tokens: of the heaviest pack.
        accumulate: micro-batches of a step on each device.
    """

    samples: float
    tokens: int
    accumulate: int


def packing_of(data: VisionLanguageData, samples: Samples, *, devices: int, accumulate: int) -> Packing:
    """As the data module would deal the step (`vlm.data.sampling.sharing`), estimated where tokens decide.

    Args:
        accumulate: what the trainer is given.
    """
    size, mean = per_step(data, samples), sum(samples.tokens) / len(samples.items)
    if data.batch.packs is not None:
        accumulate = max(1, data.batch.packs // devices)
    elif data.micro_batch_size is not None:
        accumulate = math.ceil(size / (data.micro_batch_size * devices))
    elif data.max_tokens is not None and accumulate == 1:
        accumulate = math.ceil(size * mean / (data.max_tokens * devices))
    each = size / (devices * accumulate)
    # packs are balanced by tokens: one is heavier than the average only by what a single sample has more
    heaviest = max(math.ceil(each * mean), max(*samples.tokens, samples.longest))
    if data.max_tokens is not None:
        heaviest = min(max(heaviest, 1), data.max_tokens)
    return Packing(each, heaviest, accumulate)


@dataclass(frozen=True)
class Precision:
    """What computes in which dtype.

    Attributes:
        autocast: see `vlm.planning.step.cost_of_pack`; likewise `weights`.
    """

    autocast: torch.dtype | None = None
    weights: torch.dtype | None = None


class PackCosts:
    """Costs of packs of a built system, by their number of tokens.

    A pack's cost grows in proportion to its samples beside what it costs at all, so two packs say what others cost:
    that of all samples and that of half of them, or of a half and a quarter where these are enough, and so on. A pack
    with more logits than are there at once costs otherwise: three packs say it, whose logits are in smaller parts.
    """

    def __init__(self, module: Any, samples: Samples, precision: Precision) -> None:
        self.module = module
        self.precision = precision
        self.items = _spread(samples.items)
        self.mean = sum(samples.tokens) / len(samples.items)
        self._known: dict[tuple[int, int], tuple[int, PackCost]] = {}

    def of(self, tokens: int) -> PackCost:
        """Of a pack of about so many tokens."""
        count = len(self.items)
        while count > 3 and self._tokens(count // 2) >= tokens:
            count //= 2
        small = max(1, count // 2)
        whole = _extended(self._run(small), self._run(count), tokens)
        if whole.logits <= functional.MOST_LOGITS:
            return whole
        return self._in_parts(small, count, tokens) or whole

    def per_sample(self, tokens: int) -> Mapping[tuple[str, str], float]:
        """Floating-point operations of an average sample in a pack of so many tokens, {(region, pass): number}."""
        count = len(self.items)
        ran, cost = self._run(count, parts=_PARTS if self.of(tokens).logits > functional.MOST_LOGITS else 1)
        share = self.mean / ran  # those that were run are a little longer or shorter than all
        return {key: number * share for key, number in cost.flops.items()}

    def _in_parts(self, small: int, count: int, tokens: int) -> PackCost | None:
        """On the plane through three packs, by their tokens and by the logits that are there at once.

        None: the network makes all of them at once.
        """
        c, (tokens_b, b) = self._run(count, parts=2 * _PARTS)[1], self._run(count, parts=_PARTS)
        if b.at_once == c.at_once:
            return None
        tokens_a, a = self._run(small, parts=_PARTS) if small < count else (0, PackCost({}, {}, {}))
        longer = (tokens - tokens_a) / (tokens_b - tokens_a)
        missing = functional.MOST_LOGITS - a.at_once - longer * (c.at_once - a.at_once)
        wider = missing / (b.at_once - c.at_once)
        return summed((1 - longer, a), (longer - wider, c), (wider, b))

    def _tokens(self, count: int) -> int:
        return sum(item.num_tokens for item in self.items[:count])

    def _run(self, count: int, *, parts: int = 1) -> tuple[int, PackCost]:
        """Tokens and cost of a pack of so many samples, with its logits in so many parts."""
        if (count, parts) not in self._known:
            most = _NO_LIMIT if parts == 1 else math.ceil(self._run(count)[1].logits / parts)
            items = self.items[:count]
            batch = self.module.codec.collate(items, counts=step_counts(items))
            cost = at_full_depth(
                self.module,
                lambda: cost_of_pack(
                    self.module,
                    batch,
                    autocast=self.precision.autocast,
                    weights=self.precision.weights,
                    most_logits=most,
                ),
            )
            self._known[count, parts] = self._tokens(count), cost
        return self._known[count, parts]


def _spread(items: Sequence[Encoded]) -> list[Encoded]:
    """As many as can be run, evenly spread."""
    images = max(1, sum(len(item.sample.images) for item in items))
    count = min(len(items), max(2, MOST_IMAGES * len(items) // images))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _extended(small: tuple[int, PackCost], large: tuple[int, PackCost], tokens: int) -> PackCost:
    """The cost of a pack of so many tokens on the line through two others; through 0 where they are one."""
    (n, a), (m, b) = small, large
    if n == m:
        n, a = 0, PackCost({}, {}, {})
    return along(a, b, (tokens - n) / (m - n))
