"""How long each part of a step takes, without waiting for the device."""

import time
from collections import Counter, deque
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vlm.planning.regions import BETWEEN, HEAD, LOSS, networks_of

OPTIMIZER = "optimizer"


class Spans:
    """A line of marks: from each one on, something else runs.

    On CUDA a mark is an event in the stream, read when the device has passed it; elsewhere it is the time.

    Attributes:
        seconds: {region: of the device since the last restart}.
        units: {region: elements of what its networks were given so far}; the work of a region grows with them.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.seconds: Counter[str] = Counter()
        self.units: Counter[str] = Counter()
        self._on_gpu = device.type == "cuda"
        self._marks: deque[tuple[str | None, Any]] = deque()
        self._spare: list[torch.cuda.Event] = []
        self._running: list[str] = []
        self._is_forward = False
        self._hooks = [
            hook
            for name, network in networks_of(module)
            for hook in (
                network.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True),
                network.register_forward_hook(partial(self._leave, name), always_call=True),
            )
        ]

    def begin_pack(self) -> None:
        self._is_forward = True
        self._running = []
        self._mark(BETWEEN)

    def begin_backward(self) -> None:
        """What is recomputed calls networks again: from here on only gradients say what runs."""
        self._is_forward = False
        self._mark(LOSS)

    def end_backward(self) -> None:
        self._mark(BETWEEN)

    def begin_optimizer(self) -> None:
        self._mark(OPTIMIZER)

    def end_pack(self) -> None:
        """What follows belongs to no region."""
        self._is_forward = False
        self._mark(None)

    def collect(self) -> Mapping[str, float]:
        """`seconds`, with all that the device has finished by now."""
        while len(self._marks) > 1 and (not self._on_gpu or self._marks[1][1].query()):
            region, start = self._marks.popleft()
            end = self._marks[0][1]
            if region is not None:
                self.seconds[region] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
            if self._on_gpu:
                self._spare.append(start)
        return self.seconds

    def restart(self) -> None:
        """Forgets the seconds so far, those too that the device has not passed yet."""
        self.seconds.clear()
        if self._on_gpu:
            self._spare += [event for _, event in self._marks]
        self._marks.clear()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _mark(self, region: str | None) -> None:
        if not self._on_gpu:
            self._marks.append((region, time.perf_counter()))
            return
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((region, event))

    def _enter(self, name: str, network: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._is_forward:
            return
        self._running.append(name)
        if self._running[-2:] == [name, name]:  # inside of its own part
            return
        given = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)
        self.units[name] += given.numel() if given is not None else 0
        self._mark(name)

    def _leave(self, name: str, network: nn.Module, args: Any, output: Any) -> None:
        if not self._is_forward or not self._running:
            return
        self._running.pop()
        outer = self._running[-1] if self._running else LOSS if name == HEAD else BETWEEN
        if outer == name:
            return
        self._mark(outer)
        made = next((t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad), None)
        if made is not None:  # its gradient is there when the way back through this network begins
            made.register_hook(partial(self._begin_backward_of, name))

    def _begin_backward_of(self, name: str, gradient: Tensor) -> None:
        self._mark(name)
