"""What `FSDP2Strategy` and `MixedPrecisionFSDP` can be told: precision, groups of ranks, reductions, host memory.

What training is held against is one process in float32; losses and gradients are `tests.training.test_fsdp.train`'s.
"""

import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.sharding_table import fake_ranks
from callbacks import FSDP2Strategy, MixedPrecisionFSDP
from tests.support.ranks import run_ranks
from tests.support.samples import samples
from tests.support.systems import SYSTEMS, make
from tests.training.test_fsdp import MIXED, run_saved, same, train
from vlm.building.build import assemble
from vlm.planning.machine import Machine, Sharing, find_gpu
from vlm.planning.memory import memory_of

LONG = tuple((*step, *step) for step in MIXED[:2])
"""Two packs a step for each of four ranks."""


class Collectives(TorchDispatchMode):
    """Counts what is sent between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.seen[func.name().removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


def _counted(*args: Any, **options: Any) -> dict[str, Any]:
    with Collectives() as collectives:
        found = train(*args, **options)
    return found | {"reductions": collectives.seen["_reduce_scatter_base_"], "sent": collectives.seen}


def far(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    """(of losses, of the gradients of the first step as one vector): relative distance."""
    losses = max(abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    pairs = [(ours["gradients"][0][name].float(), tensor) for name, tensor in theirs["gradients"][0].items()]
    gap, length = (
        sum(t.square().sum() for t in tensors) for tensors in zip(*[(a - b, b) for a, b in pairs], strict=True)
    )
    return losses, (gap / length).sqrt().item()


# -- on two ranks


SHORT = MIXED[:2]


def _modes(folder: Path) -> dict[str, dict[str, Any]]:
    each = FSDP2Strategy(reduce_gradients="micro_batch")
    return {
        "step": _counted(folder, "tied", "32-true", SHORT),
        "micro_batch": _counted(folder, "tied", "32-true", SHORT, strategy=each),
        "offload": train(folder, "tied", MixedPrecisionFSDP("32-true", cpu_offload=True), SHORT),
        "bf16-mixed": train(folder, "tied", "bf16-mixed", SHORT),
        "bf16-true": train(folder, "tied", "bf16-true", SHORT),
    }


def test_words_of_sharding(tmp_path: Path) -> None:
    samples(tmp_path)  # before the ranks would write the same files
    one = train(tmp_path, "tied", None, SHORT)
    for found in run_ranks(_modes, 2, tmp_path):
        step, each, offload = (found[name] for name in ("step", "micro_batch", "offload"))
        trained_units = 3  # two blocks, and the root with connector, norm and the tied vocabulary
        assert step["reductions"] == trained_units * len(SHORT)
        assert each["reductions"] == 2 * step["reductions"]
        for theirs, ours in zip(one["gradients"], each["gradients"], strict=True):
            same(ours, theirs, atol=5e-6)
        for name, tensor in step["weights"].items():
            assert torch.equal(tensor, offload["weights"][name])

        mixed, true = found["bf16-mixed"], found["bf16-true"]
        for kind, dtype in ((mixed, torch.float32), (true, torch.bfloat16)):
            assert {kind["dtypes"][name] for name in kind["trained"]} == kind["moments"] == {dtype}
            assert {g.dtype for gradients in kind["gradients"] for g in gradients.values()} == {dtype}
            assert kind["dtypes"]["vision.trunk.blocks.0.attn.qkv.weight"] == torch.bfloat16  # frozen
            assert kind["dtypes"]["vision.trunk.blocks.0.norm1.weight"] == torch.float32
        assert true["losses"][0] == mixed["losses"][0]  # the same rounded weights
        for kind in (mixed, true):
            losses, gradients = far(kind, one)
            assert 0 < losses < 5e-4  # 5e-6 and 4e-5 seen
            assert gradients < 0.02  # 0.004 seen
        changes = {name: (t - one["weights"][name]).abs().max().item() for name, t in mixed["weights"].items()}
        assert max(changes.values()) < 0.05


# -- as one of eight ranks


class Alive(TorchDispatchMode):
    """Bytes of the tensors that are made, at their most; pages of a file that is read in place are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out.to_local() if isinstance(out, DTensor) else out
        is_new = not any(returned.alias_info for returned in func._schema.returns)
        if is_new and isinstance(made, Tensor) and made.device.type == "cpu":
            storage = made.untyped_storage()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, storage.nbytes())
        return out

    def _forget(self, size: int) -> None:
        self.now -= size


def test_a_rank_holds_one_tensor_beside_its_shards(tmp_path: Path) -> None:
    """Read from files or drawn; what it holds is what the plan says."""
    whole = make("llava_1_5")
    whole.configure_model()
    part, description = SYSTEMS["llava_1_5"].base_weights(whole, tmp_path)
    module, planned = (make("llava_1_5", **{part: description}) for _ in range(2))
    with fake_ranks(8) as mesh:
        module._device_mesh, module.shard = mesh, MixedPrecisionFSDP("32-true").shard
        with Alive() as alive:
            module.configure_model()
        shards = sum(p.to_local().untyped_storage().nbytes() for p in module.parameters() if isinstance(p, DTensor))
    assert module.load_report is not None
    assert module.load_report.loaded
    assert module.load_report.new
    largest = max(p.nbytes for p in whole.parameters())
    print(f"shards {shards:,}, at most {alive.most:,}, largest tensor {largest:,}")
    assert alive.most < shards + 1.3 * largest
    with torch.device("meta"):
        assemble(planned)
    nothing: Any = SimpleNamespace(alive={})
    memory = memory_of(planned, nothing, Machine(find_gpu("80"), 8, "fsdp2", Sharing("32-true")))
    assert memory.fixed["weights"] == pytest.approx(shards, rel=0.05)


# -- on four ranks

KINDS = {
    "spliced": "llava_1_5",
    "visual expert": "cogvlm",
    "partial LoRA": "xcomposer2",
    "LoRA": "lora",
    "encoder-decoder": "blip2_t5",
}
"""Those with in-batch losses have tests of their own (`test_in_batch.py`, `tests/systems/test_blip2_qformer.py`)."""


def _both_precisions(folder: Path, case: str) -> tuple[dict, dict]:
    return train(folder, case, "32-true", SHORT), train(folder, case, "bf16-mixed", SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_four_ranks_equal_one_process(kind: str, tmp_path: Path) -> None:
    samples(tmp_path)
    one = train(tmp_path, KINDS[kind], None, SHORT)
    for exact, rounded in run_ranks(_both_precisions, 4, tmp_path, KINDS[kind]):
        assert exact["losses"] == pytest.approx(one["losses"], rel=1e-6)
        for theirs, ours in zip(one["gradients"], exact["gradients"], strict=True):
            same(ours, theirs, atol=5e-6)
        losses, gradients = far(rounded, one)
        assert losses < 1e-3  # 7e-6 to 2e-4 seen
        assert gradients < 0.03  # 0.004 to 0.010 seen


def _hybrid(folder: Path) -> dict[str, Any]:
    def pairs() -> FSDP2Strategy:
        return FSDP2Strategy(ranks_per_shard_group=2)

    found = _counted(folder, "llava_1_5", "32-true", LONG, strategy=pairs())
    each = FSDP2Strategy(ranks_per_shard_group=2, reduce_gradients="micro_batch")
    found["each"] = _counted(folder, "llava_1_5", "32-true", LONG, strategy=each)
    found["saved"] = run_saved(folder, folder / "hybrid", "tied", "32-true", strategy=pairs())
    middle = folder / "hybrid" / "step=2.ckpt"
    found["resumed"] = run_saved(folder, folder / "again", "tied", "32-true", resume=middle, strategy=pairs())
    return found


@pytest.mark.slow
def test_groups_of_ranks_take_the_same_steps(tmp_path: Path) -> None:
    """Two copies of two ranks each: steps, reductions, and a checkpoint that others go on from."""
    samples(tmp_path)
    one = train(tmp_path, "llava_1_5", None, LONG)
    ranks = run_ranks(_hybrid, 4, tmp_path)
    for found in ranks:
        for ours in (found, found["each"]):
            assert ours["losses"] == pytest.approx(one["losses"], rel=1e-6)
            for kind in ("gradients", "clipped"):
                for theirs, gradients in zip(one[kind], ours[kind], strict=True):
                    same(gradients, theirs, atol=5e-6)
            same(ours["weights"], one["weights"], atol=1e-5)
            # float32 sums over whole tensors or over their halves: 2e-5 seen; a copy too many would be 0.4
            assert ours["norm"] == pytest.approx(one["norm"], rel=1e-4)
        assert found["each"]["reductions"] == 2 * found["reductions"]
        assert found["each"]["sent"]["allreduce_"] == found["sent"]["allreduce_"]  # between the copies: once a step
        assert all(torch.equal(found["saved"][name], found["resumed"][name]) for name in found["saved"])
    middle = tmp_path / "hybrid" / "step=2.ckpt"
    shards = [f"rank-0000{rank}-of-00002.safetensors" for rank in range(2)]
    assert sorted(path.name for path in middle.iterdir()) == [*shards, "state.pt"]
    for ours in run_ranks(run_saved, 2, tmp_path, tmp_path / "two", "tied", "32-true", resume=middle):
        same(ours, ranks[0]["saved"], atol=1e-6)
