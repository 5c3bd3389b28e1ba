"""Sums over the ranks for people to read, and values of all of them."""

from typing import Any

from torch import Tensor, distributed


def over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, itself on one; every rank has to call it, and the host waits for nobody.

    Lightning's own reduction has a barrier before it, at which the host waits for the device.
    """
    if not _in_group():
        return values
    summed = values.detach().clone()
    distributed.all_reduce(summed)
    return summed


def exchange(value: Any) -> list[Any]:
    """A value of every rank, in their order."""
    if not _in_group():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _in_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()
