"""Between two logged steps the host asks the device for nothing, so that it stays ahead."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import distributed

from callbacks import Health, LogCadence, Progress, ResumeCheckpoint, ThroughputMonitor
from tests.support.host_reads import HostReads, no_copies
from tests.support.ranks import run_ranks
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


def _collectives(folder: Path) -> dict[int, list[str]]:
    """{step: what a rank asks of the others in it, outside of DDP's own sums of gradients}."""
    of_step: dict[int, list[str]] = {}
    module = make("llava_1_5", {"connector": RATE})
    run = trainer(
        folder,
        world=2,
        strategy="ddp",
        max_epochs=1,
        max_time={"hours": 1},  # of which the first rank's clock counts
        accumulate_grad_batches=2,
        log_every_n_steps=3,
        enable_checkpointing=True,
        callbacks=[LogCadence(adapt=False), Health(every_n_steps=3), ThroughputMonitor(), ResumeCheckpoint()],
    )

    def noted(name: str) -> Any:
        plain = getattr(distributed, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            of_step.setdefault(run.global_step, []).append(name)
            return plain(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "all_reduce",
            "barrier",
            "broadcast",
            "_broadcast_coalesced",
            "all_gather_object",
            "broadcast_object_list",
        ):
            patch.setattr(distributed, name, noted(name))
        run.fit(module, packs(module, folder, [[[0, 1], [2, 3], [4], [5]]] * 6, world=2, rank=distributed.get_rank()))
    return of_step


@pytest.mark.slow
def test_the_ranks_wait_for_each_other_where_they_log_alone(tmp_path: Path) -> None:
    """Otherwise there are the sum of the step's losses, and what any rank wants, asked without a device."""
    asked = run_ranks(_collectives, 2, tmp_path)[0]
    assert asked[5] == ["all_reduce"] * 2, asked
