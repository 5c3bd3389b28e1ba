"""Settings of Lightning's trainer that a stage cannot obey, each with what says the same here."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm.command_line.layers import Layer
from vlm.errors import UserError

_AVERAGES = "keeps its averages outside of checkpoints and artefacts; use callbacks.EMA"
_FREEZES = "changes what is trained during the run; say it by stage.train, a stage each"
REFUSED_CALLBACKS = {
    "StochasticWeightAveraging": _AVERAGES,
    "WeightAveraging": _AVERAGES,
    "EMAWeightAveraging": _AVERAGES,
    "BatchSizeFinder": "would change the batch, which is the published one; data.init_args.max_tokens or "
    "micro_batch_size say how much of it a device takes at once",
    "LearningRateFinder": "knows one rate, and a stage has one for each part; set them in stage.train",
    "GradientAccumulationScheduler": "would change the batch; data.init_args.batch is the same on any number of "
    "devices and micro-batches",
    "BaseFinetuning": _FREEZES,
    "BackboneFinetuning": _FREEZES,
    "ModelPruning": "changes weights that checkpoints refer to by their content; prune the exported folder",
    "Timer": "is what trainer.max_time sets; use that",
}


def check_trainer_settings(settings: Any, *, trains: bool) -> None:
    """Refuses what would not do what it says, before anything is made.

    Args:
        settings: the resolved options of a command.

    Raises:
        UserError: the key, and what says the same here.
    """
    trainer = settings.trainer
    for name in _callback_names(trainer.callbacks):
        if name in REFUSED_CALLBACKS:
            raise UserError(f"trainer.callbacks: {name} {REFUSED_CALLBACKS[name]}")
    if trainer.barebones:
        raise UserError(
            "trainer.barebones: a stage cannot run without checkpoints and logs; for its bare speed see "
            "speed/steps_per_s in the log, with health, predictions and throughput as they are"
        )
    if trains and trainer.enable_checkpointing is False:
        raise UserError(
            "trainer.enable_checkpointing: false: a run keeps its newest state, to go on from; leave it out "
            "(checkpoint.every_n_train_steps says how often)"
        )


def check_launcher(environment: Mapping[str, str]) -> None:
    """Refuses torchrun's restarts where the ranks of the next attempt would meet at the store of the last one.

    What the dead have left there is taken for the addresses of the living: the ranks would wait for them.

    Raises:
        UserError: what to set.
    """
    restarts, shared = (environment.get(f"TORCHELASTIC_{name}") for name in ("MAX_RESTARTS", "USE_AGENT_STORE"))
    if restarts not in (None, "0") and shared == "True":
        raise UserError(
            f"torchrun --max-restarts {restarts}: restarted ranks would look for those that have died; "
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and use --standalone or --rdzv-backend=c10d"
        )


def check_seed(layers: Iterable[Layer]) -> None:
    """Refuses `seed_everything: true`, which Lightning turns into a number before anyone can see it."""
    given = [seed for layer in layers if (seed := layer.content.get("seed_everything")) is not None]
    if given and given[-1] is True:  # of several the last one wins
        raise UserError(
            "seed_everything: true would draw another seed at every start, and a run that goes on would be another "
            "one; give a number"
        )


def _callback_names(callbacks: Any) -> Iterator[str]:
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if (path := getattr(callback, "class_path", None)) is not None:
            yield path.rpartition(".")[2]


def keep_in_run(callbacks: list[Any], profiler: Any, folder: Path) -> Any:
    """Places of what Lightning would write beside the states to resume from, or say where nobody hears it.

    Args:
        callbacks: a ModelCheckpoint without a folder gets one of its own.
        profiler: made by Lightning, or its name.

    Returns:
        The profiler, which writes its report into the run folder.
    """
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(folder / "model_checkpoints")
    kinds = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    made = kinds[profiler]() if profiler in kinds else profiler
    if isinstance(made, Profiler):
        made.dirpath = made.dirpath or folder
        made.filename = made.filename or "profile"
    return made


def log_of_run(folder: str | Path, ckpt_path: Any) -> Any:
    """The TensorBoard log of a run, without what a killed start logged after the checkpoint to go on from."""
    from lightning.pytorch.loggers import TensorBoardLogger

    step = re.search(r"step=(\d+)", str(ckpt_path or ""))
    return TensorBoardLogger(str(folder), name="", version="tensorboard", purge_step=int(step[1]) if step else 0)
