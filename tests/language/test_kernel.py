"""The packed attention as a GPU run takes it, through a stand-in for the kernel (`tests.support.varlen`), on the CPU.

`tests/language/test_gpu.py` asks the real one the same.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.systems import SYSTEMS, build
from tests.support.varlen import CASES, PRECISIONS, SIGNATURES, StandIn, attend, gradients, inputs
from vlm.codec import step_counts
from vlm.language.cross_attention import ContextAttention
from vlm.language.attention import PACKED


@pytest.fixture(params=SIGNATURES)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch, request.param)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_computes_what_attention_per_sequence_does(case: str, kernel: StandIn) -> None:
    given = inputs(CASES[case])
    found = attend(given, CASES[case])
    assert kernel.calls == (case != "no keys at all")
    for ours, exact in zip(found, attend(given, CASES[case], exact=True), strict=True):
        assert (ours - exact).norm() <= 0.01 * exact.norm()  # 0.005 seen
    assert kernel.calls == (case != "no keys at all")  # float32 goes another way


@pytest.mark.parametrize("case", CASES)
def test_a_cpu_attends_in_float32(case: str) -> None:
    given, dtype = inputs(CASES[case]), CASES[case].get("dtype", torch.bfloat16)
    found, exact = attend(given, CASES[case]), attend(given, CASES[case], exact=True)
    assert torch.equal(found[0], exact[0].to(dtype).float())
    for ours, theirs in zip(found[1:], exact[1:], strict=True):
        assert (ours - theirs).norm() <= 0.005 * theirs.norm()


REFUSED: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "a head of 12": {"head_dim": 12},
    "a head of 264": {"head_dim": 264},
    "soft cap": {"softcap": 5.0},
    "dropout": {"dropout": 0.5},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernel_cannot_goes_another_way(case: str, kernel: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(REFUSED[case])
    torch.manual_seed(0)
    found = attend(given, REFUSED[case])
    assert kernel.calls == 0
    monkeypatch.undo()
    torch.manual_seed(0)
    for ours, theirs in zip(found, attend(given, REFUSED[case]), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "name", [name for name, system in SYSTEMS.items() if "score" in system.uses and system.splices]
)
def test_every_system_in_every_precision(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Forward and backward; `tests/training/test_hot_loop.py` asks what the host reads on the way."""
    module = build(name)
    items = [module.codec.encode(sample) for sample in SYSTEMS[name].pool(tmp_path, 6)]
    batch = module.codec.collate(items, counts=step_counts(items))
    packed = module.language.config._attn_implementation == PACKED
    assert packed or name in ("blip2_t5", "instructblip_t5")
    for precision in PRECISIONS:
        if precision == "bf16-true":
            module.bfloat16()
        loss, expected = gradients(module, batch, precision)
        size = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
        for signature in SIGNATURES:
            with monkeypatch.context() as patch:
                kernel = StandIn(patch, signature)
                uses = packed and precision != "32-true"
                found_loss, found = gradients(module, batch, precision)
            crossed = sum(isinstance(part, ContextAttention) for part in module.modules())
            assert kernel.calls == (module.language.config.num_hidden_layers + crossed) * uses
            assert found_loss == pytest.approx(loss, rel=1e-4)
            for key, gradient in expected.items():
                # 4.4% was seen, and more where nearly nothing arrives (the mining of Mini-Gemini: 1e-7 of the whole)
                assert (found[key] - gradient).norm() <= 0.1 * gradient.norm() + 1e-5 * size, key
