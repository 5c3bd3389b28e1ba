"""Norms of what an optimizer trains, by part, without waiting for the device."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def trained_parts(optimizer: Optimizer) -> dict[str, list[Tensor]]:
    """{part: its trained parameters}, in the order of the groups; sharded ones as this rank's DTensors."""
    parts: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            parts.setdefault(name.split(".")[0], []).append(parameter)
    return parts


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """{pattern of `stage.train`: the highest rate of its groups}: with layer-wise decay, that of the top."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        rates[group["part"]] = max(rates.get(group["part"], 0.0), float(group["lr"]))
    return rates


def squared_gradient_norms(parts: Mapping[str, Sequence[Tensor]], device: torch.device) -> Tensor:
    """float64[parts] of the gradients that this rank holds; 0 for a part that has none."""
    return squared_norms(([p.grad for p in members if p.grad is not None] for members in parts.values()), device)


@torch.no_grad()
def squared_norms(groups: Iterable[Sequence[Tensor]], device: torch.device) -> Tensor:
    """float64[groups] sums of squares of this rank's shares; not finite if one element of the group is not."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    sums = []
    for group in groups:
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in group]
        # float32 also for bfloat16 gradients; the squares of large norms need float64
        norms = list(torch._foreach_norm(local, 2, torch.float32)) if local else []
        sums.append(torch.stack(norms).double().square().sum() if norms else zero)
    return torch.stack(sums)
