"""On a CUDA device (`pytest -m gpu`): the kernel itself, every system in every precision, and a step of a Trainer.

`tests/language/test_kernel.py` asks the same of a stand-in on the CPU. No device has run this file yet: the bounds on
gradients are wider than what was seen there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import pytest
import torch

from tests.support.samples import samples
from tests.support.systems import RATE, SYSTEMS, build, make
from tests.support.training import packs, weights
from tests.support.varlen import CASES, PRECISIONS, attend, gradients, inputs
from vlm.codec import step_counts
from vlm.language.attention import PACKED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, the host may not wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_computes_what_attention_per_sequence_does(case: str) -> None:
    given = inputs(CASES[case])
    found = attend(given, CASES[case], device="cuda")
    for ours, exact in zip(found, attend(given, CASES[case], exact=True), strict=True):
        assert (ours - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if "score" in system.uses])
def test_every_system_in_every_precision(name: str, tmp_path: Path) -> None:
    there, here = build(name).cuda(), build(name)
    items = [here.codec.encode(sample) for sample in samples(tmp_path)]
    batch = here.codec.collate(items, counts=step_counts(items))
    packed = here.language.config._attn_implementation == PACKED
    for precision in PRECISIONS:
        if precision == "bf16-true":
            there.bfloat16(), here.bfloat16()
        loss, expected = gradients(here, batch, precision)
        guard = no_waiting() if packed and precision != "32-true" else None
        found_loss, found = gradients(there, batch.to("cuda"), precision, guard=guard)
        assert found_loss == pytest.approx(loss, rel=1e-4 if precision == "32-true" else 1e-2)
        size = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
        for key, gradient in expected.items():
            assert (found[key] - gradient).norm() <= 0.2 * gradient.norm() + 1e-3 * size, key


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_of_a_trainer(precision: str, tmp_path: Path) -> None:
    """A frozen language model, as in the first stages; what is drawn is what a CPU draws."""
    module, elsewhere = (make("llava_1_5", {"connector": RATE}) for _ in range(2))
    elsewhere.configure_model()
    run = L.Trainer(
        accelerator="gpu",
        devices=1,
        precision=precision,
        max_steps=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    run.fit(module, packs(module, tmp_path, [[range(6)]]))
    assert run.callback_metrics["train/loss"].isfinite()
    now = weights(module)
    for name, tensor in weights(elsewhere).items():
        assert torch.equal(now[name].cpu(), tensor) != name.startswith("connector"), name
