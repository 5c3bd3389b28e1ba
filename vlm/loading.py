"""Opening a finished system: `vlm.load`, and what a command does with it first."""

import sys
from pathlib import Path
from typing import Any

import torch

from vlm.building.instantiate import instantiate, model_of
from vlm.building.precision import AUTOCAST
from vlm.checkpoints.published.open import describe_published, find_weights, is_artefact
from vlm.checkpoints.resume.opened import read_trained
from vlm.errors import UserError


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantized: bool = True,
    as_trained: bool = False,
) -> Any:
    """Opens a finished system for `generate`, `score` and `embed`; or to be trained on, by a trainer's `fit`.

    Args:
        path: an artefact, a run folder of a stage (`runs/llava_1_5/2_finetune`) or of a recipe (its last finished
            stage), a checkpoint (`runs/llava_1_5/2_finetune@200`, `@last`, `@best`, or its path), or a published system
            (official or Hugging Face folder, or hub id).
        device: such as `cuda`; None: the CPU.
        dtype: a type of torch or its name, for the weights; None: as they are.
        quantized: keep in 4 bits what was so in training (QLoRA); False: the base weights as they are published.
        as_trained: compute in bfloat16 or float16 what the training's autocast did; False: everything in float32.

    Returns:
        The system, in eval mode.

    Raises:
        UserError: there is none of these in `path`, it lacks tensors, or the frozen weights it was trained with have
            changed; no such device or type.
    """
    kind, weights = _dtype(dtype), find_weights(path)
    precision = None
    if is_artefact(weights):
        artefact = read_trained(weights)
        precision = artefact.meta.get("precision")
        model, weights = model_of(artefact), str(artefact.folder)
    else:
        model = describe_published(weights).model
    module = instantiate(model)
    module.weights = weights
    module.quantized = quantized
    module.computes_in = AUTOCAST.get(str(precision)) if as_trained else None
    module.configure_model()
    if kind is not None:
        for parameter in module.parameters():  # not the buffers: rotary tables lose positions when they are rounded
            if parameter.is_floating_point():  # not what is packed
                parameter.data = parameter.data.to(kind)
    try:
        return module if device is None else module.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device}: {str(error).splitlines()[0]}; leave it out") from error


def _dtype(given: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, given, given) if isinstance(given, str) else given
    if found is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise UserError(f"dtype {given}: use float32, bfloat16 or float16")


def open_system(weights: str, *, device: str | None = None, dtype: str | None = None) -> Any:
    """A finished system, ready to answer.

    Args:
        weights: what `--weights` takes.
        device: cuda where there is one, by default.
        dtype: name of a type of torch, for the weights; None leaves them as they are, and computes on CUDA as the
            training did, where attention in float32 is slow.

    Raises:
        UserError: what `vlm.load` raises, or no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    module = load(weights, device=device, dtype=dtype, as_trained=dtype is None and device.startswith("cuda"))
    if module.weights != weights:
        print(f"weights: {module.weights}", file=sys.stderr)
    return module
