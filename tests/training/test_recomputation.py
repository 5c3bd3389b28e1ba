"""Recomputation: wherever a gradient passes a block, frozen or trained, and nowhere else. Dropout is on where training
has it: the second run of a block draws what the first one drew."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import lightning as L
import pytest
import torch
from torch import Tensor, distributed

from tests.support.blip2 import T5
from tests.support.ranks import run_ranks
from tests.support.samples import samples
from tests.support.systems import LLAMA, RATE, TOWER, make
from tests.support.training import Recorder, packs, trainer
from vlm.codec import step_counts
from vlm.errors import UserError
from vlm.language import CausalLM, Seq2SeqLM
from vlm.building.blocks import stacked_blocks
from vlm.stages import Trained
from vlm.vision import TimmTower

LANGUAGE = [f"language.model.layers.{i}" for i in range(2)]
VISION = [f"vision.trunk.blocks.{i}" for i in range(2)]
TRAINED = {
    "a connector below a frozen language model": (["connector"], LANGUAGE),
    "everything": (["vision", "connector", "language"], VISION + LANGUAGE),
    "positions below a frozen tower": (["vision.trunk.pos_embed"], VISION + LANGUAGE),
    "the vocabulary above everything": (["language.lm_head"], []),
}
STEPS = (((0, 3), (2, 1)), ((5,), (4,)))


def built(train: Mapping[str, Trained], *, recomputing: bool) -> Any:
    """Not configured yet; a third of its attention is dropped where it trains."""
    options = TOWER | {"attn_drop_rate": 0.3}
    return make(
        "llava_1_5",
        train,
        vision=TimmTower("vit_large_patch14_clip_quickgelu_336", layer=-2, options=options, checkpointing=recomputing),
        language=CausalLM(config=LLAMA | {"attention_dropout": 0.3}, checkpointing=recomputing),
    )


def count_runs(module: Any) -> Counter[str]:
    """How often each block has run, from now on."""
    runs: Counter[str] = Counter()
    for path, block in stacked_blocks(module):
        # inside of the block: its own hooks stand around both runs
        next(block.children()).register_forward_pre_hook(lambda *_, path=path: runs.update([path]))
    return runs


class _Kept:
    """A tensor that a backward pass needs, as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def step(module: Any, folder: Path) -> tuple[dict[str, Tensor], int]:
    """Gradients of one step, and how many bytes beside logits the forward pass kept for them."""
    items = [module.codec.encode(sample) for sample in samples(folder)]
    batch = module.codec.collate(items, counts=step_counts(items))
    kept: WeakSet[_Kept] = WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        kept.add(saved := _Kept(tensor))
        return saved

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = sum(module.losses(batch).values())
    storages = {saved.tensor.untyped_storage().data_ptr(): saved.tensor for saved in kept}
    for parameter in module.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    sizes = (t.untyped_storage().nbytes() for t in storages.values() if t.shape[-1:] != (LLAMA["vocab_size"],))
    loss.backward()
    return {n: p.grad for n, p in module.named_parameters() if p.requires_grad}, sum(sizes)


@pytest.mark.parametrize(
    ("recompute", "again"),
    [
        ({"*": False}, []),
        ({"vision": 3, "language": 2}, [VISION[0], LANGUAGE[0]]),
        ({"*": False, "lang*": True}, LANGUAGE),
    ],
)
def test_a_stage_says_which_blocks_run_again(recompute: dict, again: list[str], tmp_path: Path) -> None:
    module = built(dict.fromkeys(["vision", "connector", "language"], RATE), recomputing=True)
    module.stage = replace(module.stage, recompute=recompute)
    module.configure_model()
    runs = count_runs(module)
    step(module, tmp_path)
    assert runs == {path: 1 + (path in again) for path in VISION + LANGUAGE}


@pytest.mark.parametrize(
    ("recompute", "message"),
    [({"tower": True}, "'tower' fits no part with blocks; these are language, vision"), ({"*": -1}, "found -1")],
)
def test_what_recomputes_nothing_is_named(recompute: dict, message: str) -> None:
    module = built({"connector": RATE}, recomputing=False)
    module.stage = replace(module.stage, recompute=recompute)
    with pytest.raises(UserError, match=message):
        module.configure_model()


@pytest.mark.parametrize("trained", TRAINED)
def test_blocks_run_again_where_a_gradient_passes(trained: str, tmp_path: Path) -> None:
    parts, again = TRAINED[trained]
    train = dict.fromkeys(parts, RATE)
    plain, module = (built(train, recomputing=recomputing) for recomputing in (False, True))
    for one in (plain, module):
        one.configure_model()
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [type(m) for m in module.modules()] == [type(m) for m in plain.modules()]
    expected, kept_before = step(plain.double(), tmp_path)
    runs = count_runs(module)
    found, kept = step(module.double(), tmp_path)
    assert runs == {path: 1 + (path in again) for path in VISION + LANGUAGE}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)
    assert kept < 0.25 * kept_before if again else kept == kept_before  # 0.05 to 0.17 seen
    runs.clear()
    module.score(samples(tmp_path))
    assert set(runs.values()) == {1}


def test_an_encoder_decoder_runs_its_blocks_again(tmp_path: Path) -> None:
    """Those of FlanT5's encoder for the queries, those of its decoder as well; dropout is the same both times."""
    train = dict.fromkeys(("connector", "language.decoder"), RATE)
    blocks = [f"language.{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)]
    found, runs = [], []
    for recomputing in (False, True):
        language = Seq2SeqLM(config=T5 | {"dropout_rate": 0.3}, checkpointing=recomputing)
        module = make("blip2_t5", train, language=language)
        module.configure_model()
        counted: Counter[str] = Counter()
        for path in blocks:
            attention: Any = module.get_submodule(f"{path}.layer.0")
            attention.register_forward_pre_hook(lambda *_, path=path, counted=counted: counted.update([path]))
        found.append(step(module.double(), tmp_path))
        runs.append(counted)
    assert runs == [dict.fromkeys(blocks, 1), dict.fromkeys(blocks, 2)]
    (expected, kept_before), (gradients, kept) = found
    assert any(gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-12)
    assert kept < 0.7 * kept_before


class _Counted(L.Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.runs = count_runs(pl_module)


def _fit(folder: Path, *, recomputing: bool, fsdp: str | None = None, **options: Any) -> tuple[Counter[str], list]:
    ranks = distributed.is_initialized()
    world, rank = (distributed.get_world_size(), distributed.get_rank()) if ranks else (1, 0)
    recorder, counted = Recorder(), _Counted()
    module = built({"connector": RATE}, recomputing=recomputing)  # of what is trained nothing drops: ranks draw alike
    options |= {"accumulate_grad_batches": 2 // world, "callbacks": [recorder, counted]}
    run = trainer(folder, world=world, fsdp=fsdp, max_epochs=1, **options)
    run.fit(module, packs(module, folder, STEPS, world=world, rank=rank))
    return counted.runs, recorder.gradients


def _strategies(folder: Path) -> list:
    return [_fit(folder, recomputing=True, strategy="ddp"), _fit(folder, recomputing=True, fsdp="32-true")]


def test_sharded_and_data_parallel(tmp_path: Path) -> None:
    samples(tmp_path)  # before the ranks would write the same files
    _, expected = _fit(tmp_path, recomputing=False)
    assert any(gradient.any() for gradient in expected[0].values())
    for runs, gradients in (result for rank in run_ranks(_strategies, 2, tmp_path) for result in rank):
        assert runs == dict.fromkeys(VISION, 2) | dict.fromkeys(LANGUAGE, 4)  # of two steps
        for theirs, ours in zip(expected, gradients, strict=True):
            for name, gradient in theirs.items():
                torch.testing.assert_close(ours[name], gradient, rtol=0, atol=5e-6)
