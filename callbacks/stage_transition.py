"""Entering and leaving a training stage."""

import itertools
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.progress import say
from vlm.checkpoints.artefact import write_artefact
from vlm.checkpoints.files.parts import gather
from vlm.checkpoints.resume.moments import moments
from vlm.codec import Codec
from vlm.data import VisionLanguageData
from vlm.data.loading.trainer_progress import cuts, is_ended_early, is_finished, why_stopped
from vlm.data.sources.base import Concat
from vlm.errors import SampleError
from vlm.building.instantiate import system_class
from vlm.building.stage_record import stage_record
from vlm.language.quantized import full_size
from vlm.module import VisionLanguageModule
from vlm.moving import changing_names
from vlm.schedules import Schedule
from vlm.stages import AdamW, InitFrom, Stage, Trained

_LOOKED_AT = 16


class StageTransition(Callback):
    """Owns what a stage trains and what it leaves behind.

    In `setup` it gives the stage to the module, whose `configure_model` acts on it. At the start of fit it prints what
    trains and where every tensor came from. When the last step is done it writes the artefact: `stage.json` and the
    trained tensors, with references by content to everything frozen.

    Args:
        name: of the stage, as in the recipe.
        train: {pattern: learning rate, weight decay, ...}; everything else is frozen.
        follows: artefacts or published folders to start from.
        continues: artefact of the stage whose schedule and optimizer moments go on here.
        modes: {pattern: train | eval} for modules whose published mode is not "train iff it holds a trained parameter".
        optimizer: AdamW's constants, and how its moments are kept.
        schedule: learning rate over steps.
        keep_optimizer: write the moments too, for a stage that continues this one.
        recompute: {part, or a glob over parts: true, false, or n}: whether its blocks, or every n-th of them, run again
            in the backward pass instead of keeping their activations; else as `checkpointing` of each part says.
    """

    def __init__(
        self,
        name: str,
        train: dict[str, Trained],
        follows: list[InitFrom] | None = None,
        continues: str | None = None,
        modes: dict[str, Literal["train", "eval"]] | None = None,
        optimizer: AdamW = AdamW(),  # noqa: B008  (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008
        keep_optimizer: bool = False,
        recompute: dict[str, bool | int] | None = None,
    ) -> None:
        how = optimizer, schedule, keep_optimizer
        self.stage = Stage(name, train, follows or [], continues, modes or {}, *how, recompute or {})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            assert isinstance(pl_module, VisionLanguageModule)
            pl_module.stage = self.stage

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        say(self._banner(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        if trainer.is_global_zero:
            say("\n".join(f"  {line}" for line in _work(trainer, pl_module)))
            say(f"stage {self.stage.name}: step {trainer.global_step:,} of {pl_module.total_steps():,}")

    def _banner(self, module: VisionLanguageModule) -> str:
        lines = [f"stage {self.stage.name} of {system_class(module).__name__}"]
        owner = self.stage.assign(name for name, _ in module.named_parameters())
        for part, network in module.named_children():
            total = sum(full_size(p) for p in network.parameters())
            trained = sum(full_size(p) for p in network.parameters() if p.requires_grad)
            patterns = dict.fromkeys(pattern for name, pattern in owner.items() if name.split(".")[0] == part)
            rates = [self.stage.train[pattern].lr for pattern in patterns]
            what = "frozen" if not trained else f"trains {trained:,} at lr {', '.join(f'{rate:g}' for rate in rates)}"
            lines.append(f"  {part:<12} {total:>15,} parameters, {what}")
        lines += [f"  surgery      {line}" for operation in module.surgery for line in operation.summary(module)]
        assert module.load_report is not None
        lines += [f"  {line}" for line in module.load_report.render().splitlines()]
        return "\n".join(lines)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        name = self.stage.name
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            say(f"stage {name} was tried with trainer.fast_dev_run; nothing was written")
            return
        done = is_finished(trainer)
        # also reached by a run that ran out of time: that one is not finished
        if trainer.interrupted or not (done or is_ended_early(trainer)):
            say(f"stage {name} stopped at step {trainer.global_step}; start it again to go on")
            return
        shortened = "; ".join([*cuts(trainer), *([] if done else [why_stopped(trainer)])]) or None
        folder = Path(trainer.default_root_dir) / "artefact"
        write_stage(
            folder,
            pl_module,
            global_step=pl_module.finished_steps() + trainer.global_step,
            optimizer=trainer.optimizers[0] if self.stage.keep_optimizer else None,
            shortened=shortened,
            is_writer=trainer.is_global_zero,
        )
        trainer.strategy.barrier("artefact")
        say(f"stage {name} is finished{f', shortened ({shortened})' if shortened else ''}: {folder}")


def _work(trainer: Trainer, module: VisionLanguageModule) -> list[str]:
    """What the stage goes through, and on what."""
    packs, accumulate = int(trainer.num_training_batches), trainer.accumulate_grad_batches
    data = trainer.datamodule  # type: ignore[attr-defined]
    lines = []
    if isinstance(data, VisionLanguageData):
        lines.append(f"{len(data.samples):,} samples, {data.batch.size:,} {data.batch.unit} a step")
        if tokens := _tokens_of_pictures(data.samples, module.codec):
            some = f"{tokens[0]:,}" if tokens[0] == tokens[-1] else f"{tokens[0]:,} to {tokens[-1]:,}"
            lines[-1] += f", {some} tokens a picture"
    device, each = trainer.strategy.root_device.type, "micro-batch" if accumulate == 1 else "micro-batches"
    lines.append(
        f"{-(-packs // accumulate):,} steps an epoch, on {trainer.world_size} x {device}, "
        f"{accumulate} {each} a step, {trainer.precision}"
    )
    return [*lines, *(f"shortened by {cut}" for cut in cuts(trainer))]


def _tokens_of_pictures(samples: Concat, codec: Codec) -> list[int]:
    """Of a few samples' images, in order: their sizes decide, which stand in the files' headers."""
    tokens = []
    for place in range(count := min(_LOOKED_AT, len(samples))):
        try:
            sample = samples[len(samples) * place // count]
            tokens += [codec.num_tokens(*file.size(sample)) for file in sample.images]
        except SampleError:  # told to the user by the loader that comes to it
            continue
    return sorted(tokens)


def write_stage(
    folder: Path,
    module: VisionLanguageModule,
    *,
    global_step: int,
    optimizer: torch.optim.Optimizer | None = None,
    shortened: str | None = None,
    is_writer: bool = True,
) -> None:
    """Writes what a stage has changed in a module and everything needed to rebuild it around that.

    Trained tensors of which the module keeps moving averages are written as these; the moments then come with the
    values that training goes on with.

    Every rank has to call it: sharded tensors are gathered one at a time; one rank writes.

    Args:
        global_step: optimizer steps so far, those of the stages it continues among them.
        optimizer: the one whose moments are kept.
        shortened: what cut the training short.
    """
    assert module.stage is not None
    changing, averages = changing_names(module), module.averages or {}
    # the state dict: under sharding, `named_parameters` may still show the gathered copies of the last forward
    tensors = [(name, averages.get(name, tensor)) for name, tensor in module.state_dict().items() if name in changing]
    kept = None if optimizer is None else moments(optimizer, with_weights=bool(averages))
    if not is_writer:
        for _, tensor in itertools.chain(tensors, kept or ()):
            gather(tensor)
        return
    record = stage_record(module, folder, global_step=global_step)
    write_artefact(folder, tensors=tensors, meta=record | {"shortened": shortened}, moments=kept)
