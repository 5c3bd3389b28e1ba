"""Between two logged steps the host asks the device for nothing, so that it stays ahead."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks import Health, LogCadence, Progress, ThroughputMonitor
from tests.support.host_reads import HostReads, no_copies
from tests.support.systems import RATE, SYSTEMS, make
from tests.support.training import packs, trainer
from tests.support.varlen import StandIn
from vlm.building.build import assemble
from vlm.codec import step_counts

ALL_KINDS = (
    *("blip_pretrain", "blip_vqa", "blip_nlvr", "blip2_qformer", "blip2_t5", "cogagent", "fuyu", "instructblip"),
    *("llava_next", "mini_gemini", "qwen_vl", "xcomposer2_4khd"),
)
"""Systems whose steps run, together, all that there is."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALL_KINDS else pytest.mark.slow) for name in SYSTEMS]
)
def test_a_micro_batch_reads_nothing(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Forward and backward of every system on a device that has no values, by the path of the kernel."""
    monkeypatch.setattr("vlm.language.attention._kernel_dtype", lambda query, value: query.dtype)
    system, module = SYSTEMS[name], make(name)
    with torch.device("meta"):
        assemble(module)
    items = [module.codec.encode(sample, seed=1) for sample in system.pool(tmp_path, 3)]
    batch = module.codec.collate(items, counts=step_counts(items)).to("meta", non_blocking=True)
    module.features = []  # of those with queues, as `on_step_start` leaves it
    with no_copies():
        module.training_step(batch, 0).backward()


class _Reads(L.Callback):
    """Notes what is read during the micro-batches of every step."""

    def __init__(self) -> None:
        self.of_step: dict[int, list[str]] = {}
        self.mode = HostReads()

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.of_step.setdefault(trainer.global_step + 1, [])
        self.mode.found = self.of_step[trainer.global_step + 1]


def test_a_run_reads_where_it_logs_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A trainer with all that a run has around its steps; the optimizer of the CPU counts its steps on the host."""
    StandIn(monkeypatch, "torch 2.13")
    module, reads = make("llava_1_5", {"connector": RATE}), _Reads()
    run = trainer(
        tmp_path,
        max_epochs=1,
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        log_every_n_steps=3,
        gradient_clip_val=1.0,
        enable_progress_bar=True,
        callbacks=[reads, LogCadence(adapt=False), Health(every_n_steps=3), ThroughputMonitor(), Progress()],
    )
    with reads.mode:
        run.fit(module, packs(module, tmp_path, [[[0, 1], [2, 3]]] * 6))
    found = {step: [read for read in places if "torch/optim/" not in read] for step, places in reads.of_step.items()}
    read = {step for step, places in found.items() if places}
    assert {3, 6} <= read <= {2, 3, 4, 6}, found  # 2: what was measured at the first step, which has arrived by then
