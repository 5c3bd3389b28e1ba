"""How many samples of each source an epoch has, and in which order the sources take turns: pure functions.

A source is seen in shuffled walks. The walk of an epoch goes on where that of the epoch before it stopped, and starts
anew, in another order, when it has visited all samples: no sample comes a second time before all others of its source
came once, also when an epoch shows only a part of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from vlm.data.sampling.order import Blocks
from vlm.data.sampling.turns import apportion, order_kinds, shuffled_walk
from vlm.errors import UserError
from vlm.seeding import seed_from


@dataclass(frozen=True)
class Mixture:
    """The sources of an epoch.

    Either shares (`weights`, `factors`, `epoch_size`) or exact numbers (`epoch_samples` or `repeats`).
    """

    weights: Mapping[str, float] | Literal["size", "sqrt_size"] = "size"
    """Per source name, a number proportional to its share; or a rule: `size` (every sample alike) or `sqrt_size`
    (InstructBLIP: the share of a data set grows with the square root of its size)."""

    factors: Mapping[str, float] | None = None
    """By name, what to multiply the share of a source by after a rule; 1 where nothing is said (InstructBLIP lowers
    A-OKVQA and raises OKVQA by hand)."""

    epoch_size: int | None = None
    """Samples of an epoch; by default as many as all sources have."""

    epoch_samples: Mapping[str, int] | None = None
    """By name, how many samples of each source an epoch has: the column of thousands in InternLM-XComposer2's list of
    data, in samples."""

    repeats: Mapping[str, float] | None = None
    """By name, how often an epoch shows each source: 0.5 is every other sample, 2 is all of them twice. The column of
    ratios in the same list."""

    order: Literal["random", "spread", "ranks"] = "random"
    """`random`: every draw picks its source by chance, so that shares hold on average; exact numbers are shuffled.
    `spread`: each source evenly over the epoch (VILA), in exact numbers. `ranks`: the very samples of VILA's sampler
    on the devices of its own run, whatever there are here."""

    ranks: int | None = None
    """With `order: ranks`, the devices of the published run: each has a part of every source to itself, and what fills
    no batch of all of them is never shown."""

    def __post_init__(self) -> None:
        if isinstance(self.weights, Mapping):
            _check_numbers("weights", self.weights)
            if self.factors is not None:
                raise UserError("data.mixture.factors go with a rule; multiply them into data.mixture.weights")
        elif self.weights not in ("size", "sqrt_size"):
            raise UserError(
                f"data.mixture.weights must be size, sqrt_size or a number per source, found {self.weights!r}"
            )
        if self.order not in ("random", "spread", "ranks"):
            raise UserError(f"data.mixture.order must be random, spread or ranks, found {self.order!r}")
        if (self.order == "ranks") != (self.ranks is not None) or (self.ranks is not None and self.ranks < 1):
            raise UserError(f"data.mixture.ranks: a number of devices goes with order: ranks, found {self.ranks!r}")
        if self.epoch_size is not None and self.epoch_size < 1:
            raise UserError(f"data.mixture.epoch_size must be at least 1, found {self.epoch_size}")
        if self.factors is not None:
            _check_numbers("factors", self.factors, some=False)
        exact = [name for name in ("epoch_samples", "repeats") if getattr(self, name) is not None]
        for name in exact:
            _check_numbers(name, getattr(self, name))
        if exact and (len(exact) > 1 or self.epoch_size is not None or self.factors or self.weights != "size"):
            raise UserError(
                f"data.mixture.{exact[0]} says how many samples an epoch has; remove "
                "the other numbers (weights, factors, epoch_size, epoch_samples, repeats)"
            )
        if self.order == "ranks" and (exact or self.epoch_size is not None or self.factors or self.weights != "size"):
            raise UserError(
                "data.mixture.order: ranks takes each source as it is; remove the other numbers (weights, factors, "
                "epoch_size, epoch_samples, repeats)"
            )

    @property
    def by_chance(self) -> bool:
        """Whether every draw picks its source by chance."""
        return self.epoch_samples is None and self.repeats is None and self.order == "random"

    def check(self, names: Sequence[str]) -> None:
        """Raises `UserError` when the sources are not those that the mixture speaks of."""
        check_names("data.mixture", {}, names)
        for key in ("weights", "epoch_samples", "repeats", "factors"):
            value = getattr(self, key)
            if isinstance(value, Mapping):
                check_names(f"data.mixture.{key}", value, names, every=key != "factors")

    def shares(self, sizes: Mapping[str, int]) -> list[float]:
        """Per source, the share of an epoch that comes from it.

        Args:
            sizes: number of samples by name of source.
        """
        values: list[float]
        counts = self._given(sizes)
        if counts is not None:
            values = [float(count) for count in counts]
        elif isinstance(self.weights, Mapping):
            values = [float(self.weights[name]) for name in sizes]
        else:
            values = [math.sqrt(size) if self.weights == "sqrt_size" else float(size) for size in sizes.values()]
            factors = self.factors or {}
            values = [value * factors.get(name, 1.0) for name, value in zip(sizes, values, strict=True)]
        if not sum(values) > 0:
            raise UserError("data.mixture leaves no sample; give a source that is not empty a number above 0")
        for name, value in zip(sizes, values, strict=True):
            if value and not sizes[name]:
                raise UserError(f"source {name!r} is empty but data.mixture wants samples of it; set its number to 0")
        return [value / sum(values) for value in values]

    def counts(self, sizes: Mapping[str, int]) -> list[int] | None:
        """Samples of each source in an epoch; None where chance decides."""
        shares = self.shares(sizes)
        counts = self._given(sizes)
        if counts is None and self.order == "spread":
            counts = apportion(shares, self.num_draws(sizes))
        return counts

    def num_draws(self, sizes: Mapping[str, int]) -> int:
        """Samples of an epoch."""
        counts = self._given(sizes)
        if counts is not None:
            return sum(counts)
        return self.epoch_size if self.epoch_size is not None else sum(sizes.values())

    def _given(self, sizes: Mapping[str, int]) -> list[int] | None:
        if self.epoch_samples is not None:
            return [int(self.epoch_samples[name]) for name in sizes]
        if self.repeats is not None:
            return [round(self.repeats[name] * size) for name, size in sizes.items()]
        return None

    def picks(
        self, sizes: Mapping[str, int], *, seed: int, epoch: int, turns: "DrawGroups | None" = None
    ) -> np.ndarray:
        """int64[num_draws], the source of each draw of the epoch.

        Args:
            turns: draws that chance takes together; by default each alone.
        """
        counts = self.counts(sizes)
        if counts is not None:
            return order_kinds(counts, spread_out=self.order == "spread", seed=seed_from(seed, epoch, 2))
        return sample_sources(
            self.shares(sizes),
            self.num_draws(sizes),
            turns=turns or DrawGroups(range(len(sizes)), [1] * len(sizes)),
            seed=seed_from(seed, epoch, 1),
        )

    def turn_sizes(self, sizes: Mapping[str, int], turns: "DrawGroups", *, seed: int, epoch: int) -> list[int]:
        """How many draws of the epoch each turn has, where chance picks the sources."""
        num_draws = self.num_draws(sizes)
        found = turns.turns(self.shares(sizes), num_draws, seed=seed_from(seed, epoch, 1))
        return turns.sizes(found, num_draws).tolist()

    def draws(
        self,
        sizes: Mapping[str, int],
        *,
        seed: int,
        epoch: int,
        turns: "DrawGroups | None" = None,
        blocks: Mapping[str, Blocks | None] = MappingProxyType({}),
    ) -> tuple[np.ndarray, np.ndarray]:
        """The epoch in order, as (sample, visit).

        Args:
            blocks: of sources whose samples are fetched in blocks.

        Returns:
            int64[num_draws] index of each draw's sample, counted over all sources, and int64[num_draws] how often the
            walk over its source has started anew since the beginning of the epoch.
        """
        picks = self.picks(sizes, seed=seed, epoch=epoch, turns=turns)
        counts = self.counts(sizes)
        if counts is not None:
            starts = [count * epoch for count in counts]
        else:  # chance decided how far the walks came, and decides the same again
            starts = [0] * len(sizes)
            for earlier in range(epoch):
                found = np.bincount(
                    self.picks(sizes, seed=seed, epoch=earlier, turns=turns), minlength=len(sizes)
                ).tolist()
                starts = [start + count for start, count in zip(starts, found, strict=True)]
        samples, visits = np.empty(len(picks), dtype=np.int64), np.empty(len(picks), dtype=np.int64)
        first = 0
        for which, (name, size) in enumerate(sizes.items()):
            places = np.flatnonzero(picks == which)
            walk = {"start": starts[which], "count": len(places), "seed": seed_from(seed, which)}
            samples[places], visits[places] = shuffled_walk(size, blocks=blocks.get(name), **walk)
            samples[places] += first
            first += size
        return samples, visits


@dataclass(frozen=True)
class DrawGroups:
    """Draws that are taken together: so many in a row come from one group of sources."""

    groups: Sequence[int]
    """Of each source, counted from 0."""

    lengths: Sequence[int]
    """Of each group, how many draws it has in a row."""

    in_turn: bool = False
    """Groups follow each other in their order; else chance picks each, so that the shares of their *samples* hold: a
    group with long turns has fewer of them."""

    def turns(self, shares: Sequence[float], num_draws: int, *, seed: int) -> np.ndarray:
        """int64[turns], the group of each turn of the epoch; the last one may be cut short."""
        most = -(-num_draws // min(self.lengths))
        lengths = np.asarray(self.lengths)
        if self.in_turn:
            found = np.arange(most) % len(lengths)
        else:
            parts = np.bincount(self.groups, weights=shares, minlength=len(lengths)) / lengths
            found = _choose(parts, _random(seed).random_sample(most))
        return found[: np.searchsorted(lengths[found].cumsum(), num_draws) + 1]

    def sizes(self, turns: np.ndarray, num_draws: int) -> np.ndarray:
        """int64[turns], draws of each turn; they sum to `num_draws`."""
        ends = np.asarray(self.lengths)[turns].cumsum().clip(max=num_draws)
        return np.diff(ends, prepend=0)


def sample_sources(shares: Sequence[float], num_draws: int, *, turns: DrawGroups, seed: int) -> np.ndarray:
    """int64[num_draws], sources by chance: of each turn the group, then of each draw a source of that group."""
    groups, parts = np.asarray(turns.groups), np.asarray(shares)
    chosen = turns.turns(shares, num_draws, seed=seed)
    chosen = np.repeat(chosen, turns.sizes(chosen, num_draws))
    uniform = _random(seed_from(seed, "source")).random_sample(num_draws)
    picks = np.empty(num_draws, dtype=np.int64)
    for group in np.unique(chosen):
        members, places = np.flatnonzero(groups == group), np.flatnonzero(chosen == group)
        picks[places] = members[_choose(parts[members], uniform[places])]
    return picks


def _random(seed: int) -> np.random.RandomState:
    return np.random.RandomState([seed >> 32, seed & 0xFFFFFFFF])


def _choose(parts: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    bounds = np.cumsum(parts) / parts.sum()
    bounds[np.flatnonzero(parts)[-1] :] = 1.0  # the sum of rounded shares may be a little less
    return np.searchsorted(bounds, uniform, side="right")


def check_names(key: str, given: Mapping[str, object], names: Sequence[str], *, every: bool = False) -> None:
    """Raises `UserError` unless `given` speaks of sources that are there, and of each of them with `every`."""
    if len(set(names)) < len(names):
        raise UserError(f"{key} needs sources with different names, found {list(names)}; set their 'name'")
    if set(given) - set(names) or (every and set(given) != set(names)):
        remedy = "name each once" if every else "take a name from there"
        raise UserError(f"{key} names {sorted(given)}, the sources are {sorted(names)}; {remedy}")


def _check_numbers(key: str, values: Mapping[str, float], *, some: bool = True) -> None:
    numbers = list(values.values())
    if not all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in numbers):
        raise UserError(f"data.mixture.{key} must be numbers that are not negative, found {dict(values)}")
    if key == "epoch_samples" and not all(float(number).is_integer() for number in numbers):
        raise UserError(f"data.mixture.{key} must be whole numbers of samples, found {dict(values)}")
    if some and not sum(numbers) > 0:
        raise UserError(f"data.mixture.{key}: one number must be above 0, found {dict(values)}")
