"""Blocks that torch compiles: the same tensors under the same names, the same numbers, for rows of any length.

`eager` is torch's own backend that runs what was traced as it stands: 0 seen between it and uncompiled blocks, in every
system. Made into kernels on a CPU (`inductor`), gradients lay 1.4e-6 of a tensor's largest value apart in float32
(CogVLM and BLIP-2 over T5: towers, a Q-Former, experts, encoder and decoder); that takes minutes and is no test.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from callbacks import CompiledBlocks
from tests.support.samples import samples
from tests.support.systems import LLAMA, RATE, build, make
from tests.support.training import Recorder, packs, trainer
from vlm.building.blocks import stacked_blocks
from vlm.building.compiled import compile_blocks
from vlm.codec import step_counts
from vlm.errors import UserError
from vlm.language import CausalLM

STEPS = (((0, 3), (2, 1)), ((5,), (4,)))


def fit(folder: Path, *callbacks: Any) -> tuple[Any, Recorder]:
    language = CausalLM(config=LLAMA, checkpointing=True)
    module, recorder = make("llava_1_5", {"connector": RATE, "language": RATE}, language=language), Recorder()
    run = trainer(folder, max_epochs=1, accumulate_grad_batches=2, callbacks=[recorder, *callbacks])
    run.fit(module, packs(module, folder, STEPS))
    return module, recorder


@pytest.mark.slow
def test_a_run_with_recomputed_blocks(tmp_path: Path) -> None:
    plain, expected = fit(tmp_path)
    torch._dynamo.reset()
    counters.clear()
    module, found = fit(tmp_path, CompiledBlocks(backend="eager"))
    # before attention (after the first norm), behind it, the rest; not more for other lengths and the second block
    assert counters["stats"]["unique_graphs"] <= 6
    assert list(module.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in module.modules()] == [type(m) for m in plain.modules()]
    for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-7)
    asked = samples(tmp_path)[:2]
    graphs = counters["stats"]["unique_graphs"]
    assert module.generate(asked, max_new_tokens=3) == plain.generate(asked, max_new_tokens=3)
    assert counters["stats"]["unique_graphs"] == graphs


def gradients(module: Any, batch: Any) -> dict[str, Tensor]:
    module.zero_grad()
    torch.manual_seed(0)
    sum(module.losses(batch).values()).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_towers_and_experts(tmp_path: Path) -> None:
    module: Any = build("cogvlm")
    items = [module.codec.encode(sample) for sample in samples(tmp_path, 4)]
    batches = [module.codec.collate(items[some], counts=step_counts(items)) for some in (slice(0, 2), slice(1, 4))]
    expected = [gradients(module, batch) for batch in batches]
    torch._dynamo.reset()
    parts = [part for part, network in module.named_children() if any(True for _ in stacked_blocks(network))]
    assert all(compile_blocks(module, parts=parts, backend="eager").values())
    for batch, theirs in zip(batches, expected, strict=True):
        found = gradients(module, batch)
        for name, gradient in theirs.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_part_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="'connector' has no blocks; these parts do: vision, language"):
        compile_blocks(build("llava_1_5"), parts=["connector"], backend="eager")
