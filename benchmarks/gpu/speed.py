"""How fast systems of 7B shape train on one device, with random weights that are made there."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from benchmarks.gpu.networks import MAKERS
from benchmarks.gpu.results import Results
from benchmarks.gpu.texts import samples_of
from callbacks import CompiledBlocks, MixedPrecisionFSDP, ThroughputMonitor
from vlm.batch import Batch
from vlm.building.build import assemble
from vlm.building.network import allocate, empty_weights, tie
from vlm.building.precision import compute_dtype, keep_frozen_in
from vlm.checkpoints.report import LoadReport
from vlm.codec import Encoded, step_counts
from vlm.module import VisionLanguageModule
from vlm.monitoring.peak import matmul_peak
from vlm.sample import Sample
from vlm.stages import Stage, Trained


@dataclass(frozen=True)
class Variant:
    """One way to train one network.

    Attributes:
        network: of `MAKERS`.
        train: patterns of what is trained.
        recompute: as in `stage.recompute`; by itself every block of the language model.
        sharded: FSDP2 with one rank, float32 shards and bfloat16 compute; else `bf16-mixed`.
        compiled: blocks of the language model.
        tokens: of a pack.
        picture: width and height of the pictures.
    """

    network: str
    train: Sequence[str] = ("connector", "language")
    recompute: dict[str, bool | int] = field(default_factory=lambda: {"language": True})
    sharded: bool = False
    compiled: bool = False
    tokens: int = 8000
    picture: tuple[int, int] = (640, 480)


EXPERT = ("connector", "language.model.layers.*.expert.weight")
HD = ("vision", "connector", "separators", "language")
VARIANTS = {
    "stage2": Variant("llava_1_5"),
    "stage1": Variant("llava_1_5", ("connector",)),
    "stage2_fsdp2": Variant("llava_1_5", sharded=True),
    "stage2_compiled": Variant("llava_1_5", sharded=True, compiled=True),
    "stage2_every_2nd": Variant("llava_1_5", recompute={"language": 2}, sharded=True, tokens=6000),
    "stage2_kept": Variant("llava_1_5", recompute={"language": False}, sharded=True, tokens=3600),
    "expert": Variant("cogvlm", EXPERT),
    "anyres": Variant("llava_next", ("vision", "connector", "newline", "language"), tokens=12000, picture=(1200, 900)),
    "hd": Variant("xcomposer2_4khd", HD, tokens=16000, picture=(3840, 1600)),
}
"""In the order of what matters most. The last three have half of the language model's blocks, to fit."""
PACKS, STEPS = 4, 3
"""Of a step, and of a run; the first step warms up."""


def measure_peak(results: Results) -> None:
    """Products of square matrices, in the types that are trained in."""
    for dtype in (torch.bfloat16, torch.float32):
        peak = matmul_peak(results.device, dtype)
        results.note(f"product of matrices, {dtype}", None, f"{peak / 1e12:.4g} TFLOP/s", peak=peak)


def run_variant(results: Results, name: str) -> None:
    """Trains a few steps; what the monitor says of them."""
    variant = VARIANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        kind, arguments, surgery = MAKERS[variant.network](is_small=results.is_small)
        module = _on_device(kind)(**arguments)
        for operation in surgery:
            module.register_surgery(operation)
        module.stage = Stage(name, dict.fromkeys(variant.train, Trained(2e-5)), recompute=variant.recompute)
        picture, tokens = ((640, 480), 300) if results.is_small else (variant.picture, variant.tokens)
        samples = samples_of(Path(folder), picture=picture, limit=tokens)
        batches = _packs(module, samples, tokens // results.shrink)
        first = _First()
        steps = STEPS + variant.compiled
        run = L.Trainer(
            accelerator="cpu" if results.is_small else "gpu",
            devices=1,
            strategy="fsdp2" if variant.sharded and not results.is_small else "auto",
            precision="32-true" if variant.sharded and not results.is_small else "bf16-mixed",
            accumulate_grad_batches=PACKS,
            max_steps=steps,
            gradient_clip_val=1.0,
            log_every_n_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
            callbacks=list(_callbacks(variant, results, first)),
        )
        run.fit(module, DataLoader(batches * steps, batch_size=None, collate_fn=_as_it_is))  # type: ignore[arg-type]
        page = (Path(folder) / "report.md").read_text()
    found = {key: value.item() for key, value in run.callback_metrics.items()}
    (results.out / f"{name}.md").write_text(page, encoding="utf-8")
    text = f"{found['speed/tokens_per_s']:,.0f} tokens/s, {found['mfu/total']:.1%} of the measured peak"
    mean = sum(batch.text.ids.shape[0] for batch in batches) / len(batches)
    results.note(
        "speed", None, text, speed=found, first_loss=first.loss, tokens_of_a_pack=mean, sharded=variant.sharded
    )


def _callbacks(variant: Variant, results: Results, first: L.Callback) -> Iterator[L.Callback]:
    yield from (ThroughputMonitor(), first)
    if variant.sharded and not results.is_small:
        yield MixedPrecisionFSDP()
    if variant.compiled:
        yield CompiledBlocks(backend="eager" if results.is_small else "inductor")


class _First(L.Callback):
    """The loss of the first pack, by which variants are compared."""

    loss = float("nan")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 0:
            self.loss = float(outputs["loss"])


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _packs(module: VisionLanguageModule, samples: Iterator[Sample], tokens: int) -> list[Batch]:
    """The packs of one step, of about so many tokens each."""
    packs: list[list[Encoded]] = [[]]
    for sample in samples:
        item = module.codec.encode(sample, seed=1)
        if packs[-1] and sum(other.num_tokens for other in packs[-1]) + item.num_tokens > tokens:
            if len(packs) == PACKS:
                break
            packs.append([])
        packs[-1].append(item)
    counts = step_counts([item for pack in packs for item in pack])
    return [module.codec.collate(pack, counts=counts, packs=PACKS) for pack in packs]


def _on_device(kind: type) -> Callable[..., VisionLanguageModule]:
    """A system whose weights are drawn where they stay: on the host that alone would take minutes."""

    class OnDevice(kind):  # type: ignore[misc, valid-type]
        def configure_model(self) -> None:
            if self.load_report is not None:
                return
            with empty_weights():
                assemble(self)
            if self.device_mesh is not None:
                self.shard(self, self.device_mesh)
            elif (dtype := compute_dtype(self)) is not None:
                keep_frozen_in(self, dtype)
                self.frozen_dtype = dtype
            device = self.trainer.strategy.root_device
            allocate(self, device)
            tie(self, self.ties)
            _draw(self, device)
            self.load_report = LoadReport()

    return OnDevice


@torch.no_grad()
def _draw(module: VisionLanguageModule, device: torch.device) -> None:
    """The same numbers in every variant, so that their first losses can be compared."""
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in module.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if "norm" in name and name.endswith("weight"):
            local.fill_(1.0)
        else:
            local.copy_(torch.randn(local.shape, device=device, generator=generator) * 0.02)
