"""A finished system whose adapter became part of its weights, held against what was trained."""

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm.codec import Codec
from vlm.errors import UserError
from vlm.evaluation.inference import as_pack, evaluating
from vlm.language import PeftAdapter
from vlm.language.adapters import replace_adapters
from vlm.loading import load
from vlm.sample import ImageFile, ImagePart, Message, Part, Sample, TextPart

MERGED = 1e-4
"""Largest difference of a logit, in shares of the largest logit, that merging may make in float32: `W x + B A x` and
`(W + B A) x` are rounded elsewhere, some 1e-6 a layer. A wrong scale, a lost layer or a wrong name is far above it."""
ROUNDED = 32.0
"""The same of writing in a narrower type, in steps of that type (`torch.finfo.eps`): it may cost precision, and must
not overflow or lose a layer."""


def load_merged(path: str | Path, *, dtype: torch.dtype | None = None) -> tuple[Any, list[str]]:
    """Opens a finished system with plain weights that compute what it computes with its adapter, and notes about it.

    The weights that were kept in 4 bits in training are merged as they were published.

    Args:
        dtype: that it will be written in; its weights are rounded to it already. None: as they are.

    Raises:
        UserError: the merged network computes something else.
    """
    module = load(path, quantized=False)
    adapters = [operation for operation in module.surgery if isinstance(operation, PeftAdapter)]
    if not adapters:
        return module, []
    notes = []
    before = probe_logits(module)
    if any(adapter.quantize for adapter in adapters):
        four_bits = probe_logits(load(path))
        away = (four_bits - before).square().mean().sqrt() / before.std()
        notes.append(
            "merged into the published weights, not into those in 4 bits that it was trained over: logits are "
            f"{away:.2g} of their spread away from the ones in training"
        )
    replace_adapters(module, merge=True)
    module.surgery = [operation for operation in module.surgery if not isinstance(operation, PeftAdapter)]
    largest = before.abs().max()
    share = _difference(probe_logits(module), before) / largest
    if not share <= MERGED:
        raise UserError(
            f"{path}: the merged weights do not compute what the adapter does: a logit differs by {share:.2g} of the "
            f"largest, and {MERGED:g} is allowed; export the adapter alone (--write adapter)"
        )
    notes.insert(0, f"adapter merged: no logit of a probe differs by more than {share:.1g} of the largest")
    if dtype is not None:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
        share, allowed = _difference(probe_logits(module), before) / largest, ROUNDED * torch.finfo(dtype).eps
        if not share <= allowed:
            raise UserError(
                f"{path}: in {str(dtype).removeprefix('torch.')} the merged weights compute something else: a logit "
                f"differs by {share:.2g} of the largest, and {allowed:.2g} is allowed; write another --dtype"
            )
        notes.append(f"written in {str(dtype).removeprefix('torch.')}: no logit differs by more than {share:.1g}")
    return module, notes


def load_without_adapter(path: str | Path) -> Any:
    """Opens a finished system and takes its adapter away: what a peft folder is laid over."""
    module = load(path, quantized=False)
    replace_adapters(module, merge=False)
    module.surgery = [operation for operation in module.surgery if not isinstance(operation, PeftAdapter)]
    return module


def probe_logits(module: Any) -> Tensor:
    """float32[L, vocabulary]: what a system says to samples that are always the same, one with an image."""
    with evaluating(module):
        return module.probe(as_pack(module, probes(module.codec), generate=False)).float()


def probes(codec: Codec) -> list[Sample]:
    """The samples, as a system can take them."""
    slope = torch.linspace(0, 255, 96).expand(64, 96)
    pixels = torch.stack([slope, slope.flip(1), slope.T[:64, :64].repeat(1, 2)[:, :96]], -1).to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(file, "PNG")
    said = codec.answers[0] if codec.answers else "Two colours that turn into each other, from left to right."
    answer, images = Message("assistant", (TextPart(said),)), (ImageFile("probe", data=file.getvalue()),)
    asked: tuple[Part, ...] = (*[ImagePart()] * codec.min_images, TextPart("\nWhat does the image show?"))
    shown = Sample("probe", (Message("user", asked), answer), images * codec.min_images, source="")
    text = Sample("text", (Message("user", (TextPart("Name two colours."),)), answer), (), source="")
    return [shown] if codec.needs_image else [shown, text]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    worst = (ours - theirs).abs().max()
    return worst.item() if worst.isfinite() else float("inf")
