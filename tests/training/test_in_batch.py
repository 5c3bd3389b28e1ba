"""Objectives that compare samples: the same step on any devices that can have it, and the official gradients."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from tests.conftest import golden
from tests.support.fake_codec import ByteCodec, ListSource, sample, samples
from tests.support.ranks import run_ranks
from tests.support.training import Recorder, trainer, weights
from vlm.batch import Batch
from vlm.connectors import Linear
from vlm.data import BatchSpec, PretrainingData
from vlm.in_batch import candidates, draw_uniform, gather_detached, own_places
from vlm.module import VisionLanguageModule
from vlm.seeding import seed_from
from vlm.stages import Stage, Trained


class PairCodec(ByteCodec):
    def encode(self, sample: Any, *, seed: int | None = None, generate: bool = False) -> Any:
        item = super().encode(sample, seed=seed, generate=generate)
        item.counts.clear()
        item.counts.update({"itc": 1.0, "itm": 2.0})
        return item

    def collate(self, items: Any, *, counts: Any, packs: int = 1) -> Batch:
        batch = super().collate(items, counts=counts, packs=packs)
        for item, pixels in zip(items, batch.views["image"].pixels, strict=True):
            chance = torch.Generator().manual_seed(seed_from(item.sample.id))
            pixels.copy_(torch.randn(pixels.shape, generator=chance))
        return batch


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(1))

    def initialise_new(self) -> None:
        nn.init.constant_(self.value, 3.0)


class Contrast(VisionLanguageModule):
    """images, bytes -> two linear maps -> contrast, without a gradient into candidates of other packs; matching with a
    hard negative image, with one."""

    system = "contrast"
    in_batch_terms = ("itc", "itm")

    def __init__(self, *, image: Linear = Linear(), text: Linear = Linear(), seed: int = 0) -> None:  # noqa: B008
        super().__init__(image=image, text=text, seed=seed)
        self.codec = PairCodec()
        self.seen: list[tuple[str, ...]] = []

    def build_parts(self) -> dict[str, nn.Module]:
        image, text = self.arguments["image"], self.arguments["text"]
        return {"image": image.build(12, 8), "text": text.build(256, 8), "scale": Scale()}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        self.seen.append(tuple("filler" if info.filler else info.id for info in batch.samples))
        bounds = batch.text.cu_seqlens.tolist()
        counts = torch.stack([ids.bincount(minlength=256) for ids in batch.text.ids.tensor_split(bounds[1:-1])])
        image = F.normalize(self.image(batch.views["image"].pixels.flatten(1)), dim=-1)
        text = F.normalize(self.text(counts.float()), dim=-1)
        if batch.negatives == "pack":  # its draws are those of the pack; one of a whole step are others
            text = F.dropout(text, 0.1, training=torch.is_grad_enabled())
        real, own = candidates(batch.real, batch), own_places(batch)
        itc, similar = torch.zeros(()), torch.zeros(())
        for asked, others in ((image, text), (text, image)):
            similar = (asked @ candidates(others, batch).T * self.scale.value).masked_fill(~real, -1e4)
            itc = itc + torch.where(batch.real, F.cross_entropy(similar, own, reduction="none"), 0.0).sum() / 2
        hard = similar.detach().softmax(1).scatter(1, own[:, None], 0.0).cumsum(1)
        chosen = torch.searchsorted(hard, draw_uniform(batch) * hard[:, -1:]).squeeze(1).clamp(max=len(real) - 1)
        negative = candidates(image, batch, gradient=True)[chosen]
        itm = F.softplus(-(text * image).sum(1)) + F.softplus((text * negative).sum(1))
        return {"itc": itc, "itm": torch.where(batch.real, itm, 0.0).sum()}


def pool() -> ListSource:
    """Pairs of very different length; one of them cannot be read."""
    pairs = [sample(str(i), 1 + 7 * i % 40, image=True) for i in range(35)]
    return ListSource([*pairs, sample("unusable", 5, image=True)])


def fit(folder: Path, batch: BatchSpec, how: str | None = None, given: int = 1, **options: Any) -> dict[str, Any]:
    """Two epochs of the pairs; what the steps were on this rank."""
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    module, recorder = Contrast(), Recorder()
    module.stage = Stage("contrast", {part: Trained(lr=0.05) for part in ("image", "text", "scale")})
    strategy = {"fsdp": "32-true"} if how == "fsdp" else {"strategy": how or "auto"}
    run = trainer(
        folder, world=world, callbacks=[recorder], max_epochs=2, accumulate_grad_batches=given, **(strategy | options)
    )
    run.fit(module, datamodule=PretrainingData([pool()], batch=batch, max_bad_samples=1))
    return {
        "seen": module.seen,
        "losses": recorder.losses,
        "gradients": recorder.gradients,
        "weights": weights(module),
        "accumulate": run.accumulate_grad_batches,
    }


def difference(a: Any, b: Any) -> float:
    """Largest difference of losses, gradients and weights, relative to the largest value where that is above 1."""
    pairs = [
        (torch.tensor(a["losses"]), torch.tensor(b["losses"])),
        *((x[name], y[name]) for x, y in zip(a["gradients"], b["gradients"], strict=True) for name in x),
        *((a["weights"][name], b["weights"][name]) for name in a["weights"]),
    ]
    return max(((x - y).abs().max() / x.abs().max().clamp(min=1.0)).item() for x, y in pairs)


def packs_in_order(ranks: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [pack for together in zip(*(rank["seen"] for rank in ranks), strict=True) for pack in together]


PACKS = BatchSpec(8, negatives="pack", packs=4)
STEP = BatchSpec(8, negatives="step")
BOUND = 2e-6
"""Measured: 4e-7."""


def _both(folder: Path, how: str) -> list[dict[str, Any]]:
    return [fit(folder, batch, how) for batch in (PACKS, STEP)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [fit(tmp_path_factory.mktemp("alone"), batch) for batch in (PACKS, STEP)]


@pytest.mark.parametrize(("world", "how"), [(2, "ddp"), (2, "fsdp"), (4, "ddp")])
def test_a_step_is_the_same_on_any_devices(tmp_path: Path, alone: list[dict[str, Any]], world: int, how: str) -> None:
    """A pack is a published rank: composition, dropout, hard negatives, losses, gradients and weights after 8 steps."""
    ranks = run_ranks(_both, world, tmp_path, how)
    for which, whole in enumerate(alone):
        shared = [rank[which] for rank in ranks]
        assert len(whole["losses"]) == 8  # of 36 samples, the last 4 of an epoch are left out
        assert [rank["accumulate"] for rank in shared] == [4 // world if which == 0 else 1] * world
        if which == 0:
            assert packs_in_order(shared) == whole["seen"]
        else:
            found = packs_in_order(shared)
            assert [sum(found[i : i + world], ()) for i in range(0, len(found), world)] == whole["seen"]
        assert max(difference(whole, rank) for rank in shared) < BOUND
    assert all(len(pack) == 2 for pack in alone[0]["seen"])
    assert sum(pack.count("filler") for pack in alone[0]["seen"]) == 2  # in the place of the bad one, in each epoch


# the official code --------------------------------------------------------------------------------------------------


def _golden_itc(case: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """BLIP-2's contrast of this rank's pairs against those of all ranks, from the recorded outputs of its Q-Former."""
    stored, rank = golden(case), distributed.get_rank()
    names = ("vision_proj.weight", "vision_proj.bias", "text_proj.weight", "text_proj.bias", "temp")
    trained = {name: stored[f"weights/{name}"].clone().requires_grad_() for name in names}
    outputs = {name: stored[f"outputs/rank{rank}/{name}"] for name in ("query_output", "text_output")}
    image = F.linear(outputs["query_output"], trained["vision_proj.weight"], trained["vision_proj.bias"])
    text = F.linear(outputs["text_output"][:, 0], trained["text_proj.weight"], trained["text_proj.bias"])
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    batch = _pack(len(image))
    images, texts = candidates(image, batch), candidates(text, batch)
    i2t = torch.einsum("bqd,nd->bnq", image, texts).amax(-1) / trained["temp"]
    t2i = torch.einsum("bd,nqd->bnq", text, images).amax(-1) / trained["temp"]
    loss = sum(F.cross_entropy(similar, own_places(batch), label_smoothing=0.1) for similar in (i2t, t2i)) / 2
    loss.backward()
    return loss.detach(), torch.stack([i2t, t2i]).detach(), {n: p.grad for n, p in trained.items()}


def _pack(size: int) -> Batch:
    """As a loader makes it for this rank."""
    items = [ByteCodec().encode(pair) for pair in samples(size).samples]
    rank, world = distributed.get_rank(), distributed.get_world_size()
    return replace(ByteCodec().collate(items, counts={}, packs=world), negatives="step", pack=rank)


def test_contrast_over_two_ranks_is_blip_2s() -> None:
    """Similarities, loss and gradients (none into gathered features) of the official code on two real ranks."""
    case = "blip2_stage1_world2__a"
    stored = golden(case)
    for rank, (loss, similar, gradients) in enumerate(run_ranks(_golden_itc, 2, case)):
        expected = {name: stored[f"outputs/rank{rank}/{name}"] for name in ("loss_itc", "sim_i2t", "sim_t2i")}
        torch.testing.assert_close(loss, expected["loss_itc"], atol=1e-5, rtol=0)
        torch.testing.assert_close(similar, torch.stack([expected["sim_i2t"], expected["sim_t2i"]]), atol=1e-5, rtol=0)
        for name, gradient in gradients.items():
            if (official := stored.get(f"outputs/rank{rank}/grad_itc/{name}")) is not None:
                torch.testing.assert_close(gradient, official, atol=1e-6, rtol=1e-4)


def _gathered() -> tuple[Tensor, Tensor, Tensor]:
    rank = distributed.get_rank()
    values = torch.arange(3.0).add(10 * rank).requires_grad_()
    batch = _pack(3)
    everywhere = candidates(values, batch, gradient=True)
    (everywhere * torch.arange(6.0) * (rank + 1)).sum().backward()
    assert not candidates(values, batch).requires_grad
    return everywhere.detach(), gather_detached(torch.tensor([rank == 0, True])), values.grad


def test_gathered_values_and_their_gradients() -> None:
    for rank, (everywhere, flags, gradient) in enumerate(run_ranks(_gathered, 2)):
        assert everywhere.tolist() == [0, 1, 2, 10, 11, 12]
        assert flags.tolist() == [True, True, False, True]
        assert gradient.tolist() == [3 * value for value in range(3 * rank, 3 * rank + 3)]  # the sum of both ranks'


# what cannot be -----------------------------------------------------------------------------------------------------
