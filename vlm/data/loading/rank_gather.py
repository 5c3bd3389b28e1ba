"""What the ranks tell each other about the samples of a step: how long they are, what is in them, and what is bad."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed

_T = TypeVar("_T")
_WAIT = timedelta(hours=1)  # for a rank that reads its images slowly


class Gather:
    """Takes this rank's value, gives those of all ranks; every rank calls it, in the same order.

    The ranks talk on a thread: the training goes on meanwhile.

    Args:
        talk: this rank's value -> those of all ranks, in the order of the ranks.
        trade: a message to each rank, in their order -> that of each to this one. Empty ones cost next to nothing.
    """

    def __init__(self, talk: Callable[[Any], list[Any]], trade: Callable[[list[bytes]], list[bytes]]) -> None:
        self._talk = talk
        self.trade = trade
        self._waiting: queue.SimpleQueue[tuple[Any, Callable[[list[Any]], Any], Future]] = queue.SimpleQueue()
        # a daemon: where another rank has died, nothing else ends what waits for its answer
        threading.Thread(target=self._run, name="gather", daemon=True).start()

    @classmethod
    def alone(cls) -> "Gather":
        """Of a rank that is the only one."""
        return cls(lambda value: [value], lambda messages: messages)

    def __call__(self, value: Any) -> list[Any]:
        return self.submit(value, lambda everywhere: everywhere).result()

    def submit(self, value: Any, then: Callable[[list[Any]], _T]) -> "Future[_T]":
        """What `then` makes of the values of all ranks, on the thread, once they are there; it may `trade` there."""
        found: Future[_T] = Future()
        self._waiting.put((value, then, found))
        return found

    def _run(self) -> None:
        while True:
            value, then, found = self._waiting.get()
            try:
                found.set_result(then(self._talk(value)))
            except BaseException as error:
                found.set_exception(error)


_over: tuple[Any, Gather] | None = None


def gather_over_ranks() -> Gather | None:
    """How to ask all ranks of this process group, through the CPU: asking must not wait for what the device does.

    All ranks call it together. None where there is one. Everyone who asks shares one group, and so one order.
    """
    global _over
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None
    whole = distributed.group.WORLD
    if _over is None or _over[0] is not whole:
        group = distributed.new_group(backend="gloo", timeout=_WAIT)

        def talk(value: Any) -> list[Any]:
            everywhere: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(everywhere, value, group=group)
            return everywhere

        def trade(messages: list[bytes]) -> list[bytes]:
            sizes = torch.tensor([len(message) for message in messages])
            coming = torch.empty_like(sizes)
            distributed.all_to_all_single(coming, sizes, group=group)
            sent = torch.from_numpy(np.frombuffer(bytearray().join(messages), dtype=np.uint8))
            found = torch.empty(int(coming.sum()), dtype=torch.uint8)
            distributed.all_to_all_single(found, sent, coming.tolist(), sizes.tolist(), group=group)
            return [part.numpy().tobytes() for part in found.split(coming.tolist())]

        _over = whole, Gather(talk, trade)
    return _over[1]
