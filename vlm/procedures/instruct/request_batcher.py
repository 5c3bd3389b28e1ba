"""Requests of several threads, answered by one run of a network."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.procedures.instruct.models import Reply
from vlm.procedures.instruct.task_specs import Sampling

_GATHERING = 0.05
"""Seconds for threads that have just been answered to come back: little beside the run of a network."""


@dataclass
class Request:
    """One prompt, in whatever form the network takes it, and what becomes of it."""

    prompt: Any
    seed: int
    sampling: Sampling
    reply: Reply | None = None
    error: BaseException | None = None


class RequestBatcher:
    """Of the threads that wait, one answers for all: whoever comes to the network next takes everybody along.

    Args:
        answer: replies to requests that are alike in their sampling.
        parallel: threads that ask; a batch is never larger.
    """

    def __init__(self, answer: Callable[[Sequence[Request]], list[Reply]], *, parallel: int) -> None:
        self._answer = answer
        self._parallel = parallel
        self._waiting: list[Request] = []
        self._changing, self._running = threading.Lock(), threading.Lock()

    def ask(self, prompt: Any, *, seed: int, sampling: Sampling) -> Reply:
        """Raises what `answer` raises, in every thread whose request was part of it."""
        request = Request(prompt, seed, sampling)
        with self._changing:
            self._waiting.append(request)
        with self._running:
            if request.reply is None and request.error is None:
                self._run(request)
        if request.error is not None:
            raise request.error
        assert request.reply is not None
        return request.reply

    def _run(self, request: Request) -> None:
        end = time.monotonic() + _GATHERING
        while len(self._waiting) < self._parallel and time.monotonic() < end:
            time.sleep(_GATHERING / 10)
        with self._changing:
            batch = [other for other in self._waiting if other.sampling == request.sampling]
            self._waiting = [other for other in self._waiting if other.sampling != request.sampling]
        try:
            for other, reply in zip(batch, self._answer(batch), strict=True):
                other.reply = reply
        except BaseException as error:
            for other in batch:
                other.error = error
