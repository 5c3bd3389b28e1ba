"""Which part of a system an operator belongs to, while the system runs forward and backward."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from vlm.planning.operators import is_forward_attention

Pass = Literal["forward", "again", "backward"]
"""`again`: the forward pass of what is recomputed, within the backward pass."""

HEAD, LOSS, BETWEEN = "head", "loss", "row"
"""Regions that are no part: the vocabulary projection, what follows it, and what lies between the parts."""


def pass_of(func: Any) -> Pass:
    """The pass that an operator runs in."""
    if torch._C._current_autograd_node() is None:  # type: ignore[attr-defined]
        return "forward"
    # what runs again does so with gradients enabled, but for the inside of the kernel
    return "again" if torch.is_grad_enabled() or is_forward_attention(func) else "backward"


def networks_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(region, network whose call belongs to it): the parts, what they consist of (systems call the encoder and the
    decoder of an encoder-decoder one by one), and the vocabulary projection."""
    models = [part for part in module.children() if isinstance(part, PreTrainedModel)]
    heads = [head for model in models if (head := model.get_output_embeddings()) is not None]
    assert len(heads) <= 1, "which of several vocabulary projections is meant?"
    seen = {id(head) for head in heads}
    for name, part in module.named_children():
        for network in (part, *part.children()):
            # lists are never called, and their blocks may be compiled with all of their hooks
            if not isinstance(network, nn.ModuleList) and id(network) not in seen:
                seen.add(id(network))
                yield name, network
    yield from ((HEAD, head) for head in heads)


class Regions:
    """Tells which part an operator belongs to: by the part that is running, and in the backward pass by when the
    forward pass made the node of the graph that is running."""

    def __init__(self, module: nn.Module) -> None:
        self.networks = list(networks_of(module))
        self.running: list[str] = []
        self.starts: list[tuple[int, str]] = []  # ascending: from this node on, a region
        self.background = BETWEEN

    def __enter__(self) -> "Regions":
        self._hooks = [
            hook
            for name, network in self.networks
            for hook in (
                network.register_forward_pre_hook(lambda *_, name=name: self._enter(name)),
                network.register_forward_hook(lambda *_, name=name: self._leave(name), always_call=True),
            )
        ]
        self._mark()
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def now(self) -> str:
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        if node is None:
            return self._present()
        number = node._sequence_nr()
        return next((region for start, region in reversed(self.starts) if start <= number), BETWEEN)

    def _present(self) -> str:
        return self.running[-1] if self.running else self.background

    def _enter(self, name: str) -> None:
        self.running.append(name)
        self._mark()

    def _leave(self, name: str) -> None:
        assert self.running.pop() == name
        if name == HEAD:
            self.background = LOSS
        self._mark()

    def _mark(self) -> None:
        if torch._C._current_autograd_node() is None:  # type: ignore[attr-defined]
            self.starts.append((torch.autograd._get_sequence_nr(), self._present()))  # type: ignore[attr-defined]
