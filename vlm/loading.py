"""Opening a finished system: `vlm.load`, and what a command does with it first."""

import sys
from pathlib import Path
from typing import Any

import torch

from vlm.building.instantiate import instantiate, model_of
from vlm.checkpoints.published.open import describe_published, find_weights, is_artefact
from vlm.checkpoints.resume.opened import read_trained
from vlm.errors import UserError


def load(path: str | Path, *, quantized: bool = True) -> Any:
    """Opens a finished system for `generate` and `score`.

    Args:
        path: an artefact, a run folder of a stage (`runs/llava_1_5/2_finetune`) or of a recipe (its last finished
            stage), a checkpoint (`runs/llava_1_5/2_finetune@200`, `@last`, `@best`, or its path), or a published system
            (official or Hugging Face folder, or hub id).
        quantized: keep in 4 bits what was so in training (QLoRA); False: the base weights as they are published.

    Returns:
        The system, in eval mode, on the CPU.

    Raises:
        UserError: there is none of these in `path`, it lacks tensors, or the frozen weights it was trained with have
            changed.
    """
    weights = find_weights(path)
    if not is_artefact(weights):
        module = instantiate(describe_published(weights).model)
        module.weights = weights
        module.configure_model()
        return module
    artefact = read_trained(weights)
    module = instantiate(model_of(artefact))
    module.weights = str(artefact.folder)
    module.quantized = quantized
    module.configure_model()
    return module


def open_system(weights: str, *, device: str | None = None, dtype: str | None = None) -> Any:
    """A finished system, ready to answer.

    Args:
        weights: what `--weights` takes.
        device: cuda where there is one, by default.
        dtype: name of a type of torch, for the weights; None leaves them as they are.

    Raises:
        UserError: what `vlm.load` raises, or no such device.
    """
    module = load(weights)
    if module.weights != weights:
        print(f"weights: {module.weights}", file=sys.stderr)
    if dtype is not None:
        for parameter in module.parameters():  # not the buffers: rotary tables lose positions when they are rounded
            if parameter.is_floating_point():  # not what is packed
                parameter.data = parameter.data.to(getattr(torch, dtype))
    try:
        return module.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}; leave it out") from error
