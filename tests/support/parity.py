"""Comparison of a system that splices pictures into a decoder with a class of transformers that computes the same."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.samples import samples
from vlm.batch import Views
from vlm.codec import step_counts
from vlm.stages import Stage, Trained

IMAGE_ID = 32000
ToOurs = Callable[[Iterable[tuple[str, Tensor]]], dict[str, Tensor]]


def one_view(views: Views, images: Sequence[int]) -> dict[str, Tensor]:
    return {"pixel_values": views.pixels[list(images)]}


def assert_same_scores(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    """Log-probabilities or logits by two modules that hold the same weights.

    Their states are bit-equal; what they compute is not everywhere, because which kernels run depends on the processor
    and, even without gradients, on whether a weight could take one: 4.8e-7 seen.
    """
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=5e-6, rtol=1e-5)


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    """Bit for bit."""
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []


def check_logits_loss_and_gradients(
    module: Any,
    reference: nn.Module,
    folder: Path,
    *,
    parts: Sequence[str],
    published: Mapping[str, Tensor],
    to_ours: ToOurs,
    inputs: Callable[[Views, Sequence[int]], dict[str, Tensor]] = one_view,
) -> Views:
    """Gives `module` the weights of `reference` and compares both on a pack, sample by sample for the reference.

    Args:
        parts: that are trained, so that all gradients are compared.
        published: tensors of the reference under the names that `to_ours` knows.
        inputs: keywords for some of the pack's pictures.

    Returns:
        The pictures of the pack.
    """
    module.stage = Stage("all", {part: Trained(lr=1.0) for part in parts})
    module.configure_model()
    weights = to_ours(published.items())
    for name, parameter in module.named_parameters():
        parameter.data.copy_(weights.pop(name))
    assert not weights
    module.eval()

    items = [module.codec.encode(sample) for sample in samples(folder)]
    batch = module.codec.collate(items, counts=step_counts(items))
    ours = module.label_logits(batch)
    loss = module.losses(batch)["lm"] / batch.counts["lm"]
    loss.backward()

    row, views = batch.text, batch.views["image"]
    theirs, total = [], torch.zeros(())
    for owner, (start, end) in enumerate(itertools.pairwise(row.cu_seqlens.tolist())):
        ids = row.ids[start:end].clone()
        slots = row.slots["image"]
        ids[slots[(slots >= start) & (slots < end)] - start] = IMAGE_ID
        images = (views.sample_of_image == owner).nonzero().squeeze(1).tolist()
        mine = (row.label_positions >= start) & (row.label_positions < end)
        pictures = inputs(views, images) if images else {}
        logits = reference(input_ids=ids[None], use_cache=False, **pictures).logits[
            0, row.label_positions[mine] - start
        ]
        theirs.append(logits[:, :IMAGE_ID])
        total = total + nn.functional.cross_entropy(theirs[-1], row.targets[mine], reduction="sum")
    # float32 noise between eager CLIP attention and timm's fused one, and between fused and separate q, k, v:
    # 2e-6 seen on logits of size 1
    torch.testing.assert_close(ours, torch.cat(theirs), atol=2e-5, rtol=1e-4)
    expected = total / batch.counts["lm"]
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    expected.backward()
    gradients = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in reference.named_parameters()}
    expected_gradients = to_ours((name, gradients.get(name, tensor)) for name, tensor in published.items())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            expected_gradients[name],
            atol=2e-6,
            rtol=2e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    return views
