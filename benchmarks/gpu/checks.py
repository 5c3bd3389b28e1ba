"""Is what the GPU computes right: beside the CPU in float32, packed beside separate, resumed beside never stopped."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.gpu.results import Results
from callbacks import Health, LogCadence, MixedPrecisionFSDP, ResumeCheckpoint, ThroughputMonitor
from tests.support.systems import SYSTEMS, make
from tests.support.training import ListSource, full
from vlm.codec import step_counts
from vlm.data import BatchSpec, InstructionData
from vlm.module import VisionLanguageModule

PRECISIONS = {"32-true": (1e-3, 5e-3), "bf16-mixed": (0.06, 0.15), "bf16-true": (0.06, 0.25)}
"""{precision: how far a loss may be off, relative, and the gradient, as the length of the difference}."""
SMALL = ("llava_1_5", "instructblip_t5", "blip_pretrain")
"""Systems for a try on the CPU."""


def check_systems(results: Results) -> None:
    """Loss and gradient of every system in three precisions, beside the CPU's in float32."""
    for name in SMALL if results.is_small else SYSTEMS:
        with results.checking(name):
            expected, exact = _step(name, torch.device("cpu"), "32-true")
            for precision, (loss_bound, gradient_bound) in PRECISIONS.items():
                with results.checking(f"{name}, {precision}"):
                    loss, gradient = _step(name, results.device, precision)
                    off = abs(loss - expected) / abs(expected)
                    differs = ((gradient - exact).norm() / exact.norm()).item()
                    text = f"loss {loss:.5f}, {off:.1e} off; gradient {differs:.1e} off"
                    results.note(f"{name}, {precision}", off < loss_bound and differs < gradient_bound, text)


def _step(name: str, device: torch.device, precision: str) -> tuple[float, Tensor]:
    module = make(name)
    module.configure_model()
    module.to(device, torch.bfloat16 if precision == "bf16-true" else torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        items = [module.codec.encode(sample, seed=1) for sample in SYSTEMS[name].pool(Path(folder), 6)]
        batch = module.codec.collate(items, counts=step_counts(items)).to(device)
    if module.in_batch_terms:
        module.epochs_done = 0.0
        module.on_step_start()
    torch.manual_seed(0)
    with torch.autocast(device.type, torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
        loss = module.training_step(batch, 0)
    loss.backward()
    gradients = [p.grad.detach().float().cpu().flatten() for p in module.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


def check_packs(results: Results) -> None:
    """The loss of a pack is the sum of those of its samples alone."""
    for precision, bound in (("32-true", 1e-4), ("bf16-mixed", 0.02)):
        with results.checking(f"packed beside separate, {precision}"), tempfile.TemporaryDirectory() as folder:
            module = make("llava_1_5")
            module.configure_model()
            module.to(results.device)
            items = [module.codec.encode(sample) for sample in SYSTEMS["llava_1_5"].pool(Path(folder), 6)]

            def loss_of(some: Sequence[Any], module: VisionLanguageModule = module) -> float:
                batch = module.codec.collate(some, counts=step_counts(some)).to(results.device)
                return module.losses(batch)["lm"].item()

            with (
                torch.no_grad(),
                torch.autocast(results.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"),
            ):
                packed, separate = loss_of(items), sum(loss_of([item]) for item in items)
            off = abs(packed - separate) / separate
            results.note(f"packed beside separate, {precision}", off < bound, f"{off:.1e} off")


RUNS: Mapping[str, dict[str, Any]] = {
    "32-true": {"precision": "32-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "fsdp2, bf16-mixed": {"strategy": "fsdp2"},
}


def check_resume(results: Results) -> None:
    """A tiny LLaVA through the trainer with what a run has around it, whole, and stopped and resumed."""
    for name, options in RUNS.items():
        if results.is_small and "fsdp2" in name:  # on the CPU the tests have it
            continue
        with results.checking(f"resume, {name}"), tempfile.TemporaryDirectory() as folder:
            whole = _fit(results, Path(folder), "whole", options)
            _fit(results, Path(folder), "part", options, stop_at=2)
            (last,) = (Path(folder) / "part" / "checkpoints").glob("step=*2.ckpt")
            resumed = _fit(results, Path(folder), "part", options, resume=last)
            off = max((whole[n].float() - resumed[n].float()).abs().max().item() for n in whole)
            # on CUDA the backward passes of some kernels add in no fixed order, unless trainer.deterministic is set
            fine = off == 0 if results.is_small else off < 1e-2
            results.note(f"resume, {name}", fine, "bit-equal" if off == 0 else f"weights {off:.1e} apart")


class _StopAt(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.should_stop = True


def _fit(
    results: Results,
    folder: Path,
    name: str,
    options: dict[str, Any],
    *,
    stop_at: int = 0,
    resume: Path | None = None,
) -> dict[str, Tensor]:
    module, pool = make("llava_1_5"), SYSTEMS["llava_1_5"].pool(folder, 16)
    run = L.Trainer(
        accelerator="cpu" if results.is_small else "gpu",
        devices=1,
        default_root_dir=folder / name,
        accumulate_grad_batches=2,
        max_epochs=1,
        max_steps=4,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[
            *(Health(every_n_steps=1), ThroughputMonitor(), LogCadence()),
            *([_StopAt(stop_at)] if stop_at else []),
            ResumeCheckpoint(every_n_train_steps=2),
            *([MixedPrecisionFSDP()] if "strategy" in options else []),
        ],
        **options,
    )
    data = InstructionData([ListSource(pool)], batch=BatchSpec(4))
    run.fit(module, datamodule=data, ckpt_path=resume, weights_only=False)
    return {name: full(tensor).cpu() for name, tensor in module.state_dict().items()}
