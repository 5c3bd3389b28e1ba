"""An optimizer's moments by parameter name: what a stage hands to one that continues its schedule.

Names, because the next stage may train more or fewer parameters, in other groups and on another number of devices.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vlm.checkpoints.artefact import Artefact
from vlm.checkpoints.files.identity import hash_tensor
from vlm.checkpoints.files.parts import assign
from vlm.errors import UserError

WEIGHT = "weight"
"""State name of the value that training goes on with, where the artefact itself holds its moving average."""


def moments(optimizer: torch.optim.Optimizer, *, with_weights: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(`parameter name/state name`, tensor as it is, sharded or not).

    Args:
        with_weights: the parameters as well, as a state named `WEIGHT`.
    """
    for name, parameter in named_parameters(optimizer):
        own: dict[str, Tensor] = {WEIGHT: parameter} if with_weights else {}
        for key, value in (optimizer.state[parameter] | own).items():
            yield f"{name}/{key}", value


def restore_moments(optimizer: torch.optim.Optimizer, artefact: Artefact) -> None:
    """Gives every parameter that the artefact's stage trained as well its moments; the others start with none.

    Raises:
        UserError: the artefact holds no moments, or others than were written.
    """
    files = artefact.moments
    known: dict[str, list[str]] = {}
    for entry in files.keys():  # noqa: SIM118
        name, _, key = entry.rpartition("/")
        known.setdefault(name, []).append(key)
    for name, parameter in named_parameters(optimizer):
        state = {}
        for key in known.get(name, ()):
            if key == WEIGHT:
                continue
            value = files.get(f"{name}/{key}")
            if hash_tensor(value) != artefact.meta["moments"][f"{name}/{key}"]:
                raise UserError(f"{artefact.folder}: {key} of {name} is not what was written; train the stage again")
            if value.shape == parameter.shape:
                state[key] = torch.zeros_like(parameter, requires_grad=False)
                assign(state[key], value)
            elif value.ndim == 0:  # AdamW counts steps per parameter, on the CPU
                state[key] = value
            else:
                raise UserError(
                    f"{artefact.folder}: {key} of {name} has shape {tuple(value.shape)}, the parameter "
                    f"{tuple(parameter.shape)}; a stage that continues another one has the same network"
                )
        if state:
            optimizer.state[parameter] = state


def named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of all that it updates; of a sharded system always this rank's part."""
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)
