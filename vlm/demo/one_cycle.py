"""How everything that the demo needs pretrained is trained: AdamW and one cycle of its learning rates."""

import torch
from torch import Tensor, nn


class OneCycle:
    """Steps of AdamW on a cycle of `steps` of them, the gradients' norm clipped to 1.

    Args:
        optimizer: its groups have the highest rates of the cycle.
        steps: of the cycle.
    """

    def __init__(self, optimizer: torch.optim.AdamW, *, steps: int) -> None:
        rates = [group["lr"] for group in optimizer.param_groups]
        self.optimizer = optimizer
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
        self.trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step(self, loss: Tensor) -> None:
        """The next step, down the gradient of a loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.schedule.step()
