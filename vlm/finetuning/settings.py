"""The settings of a fine-tuning: a recipe's last stage, on one's own data, at one's own size."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlm import registry
from vlm.errors import UserError
from vlm.finetuning.recognise import Recognised, recognise
from vlm.finetuning.start import Start, is_before
from vlm.recipes import TrainingStage, find_recipe, load_recipe

FEW = 10_000
"""Below so many samples an epoch is too short: there are `EPOCHS_OF_FEW`."""
EPOCHS_OF_FEW = 3
_LEAST_BATCH, _STEPS_OF_AN_EPOCH = 8, 25
_PACK_TOKENS, _MOST_PACK_TOKENS = 4096, 8192


@dataclass(frozen=True)
class Made:
    """Settings of one stage, in the form of a configuration file.

    Attributes:
        settings: the content of the file.
        summary: what was decided, for a person.
        folder: run folder.
    """

    settings: dict[str, Any]
    summary: list[str]
    folder: Path


def make_settings(start: Start, asked: Any, *, on_gpu: bool | None = None) -> Made:
    """What `vlm fit` trains for the short words of `vlm.finetuning.options`.

    Args:
        on_gpu: whether it will run on one; None: whether there is one here.

    Raises:
        UserError: data or weights that do not do, or no recipe of the system.
    """
    if asked.val_split is not None and not 0 < asked.val_split < 1:
        raise UserError(f"--val-split must be between 0 and 1, found {asked.val_split}")
    recipe = _recipe_settings(start.system)
    found = [recognise(word, images=asked.images, options=_reader_options(recipe)) for word in asked.data]
    num = sum(data.num_samples for data in found)
    trained_on = num if asked.val_split is None else num - max(1, round(asked.val_split * num))
    if trained_on < 1:
        raise UserError(f"--val-split {asked.val_split}: leaves nothing of {num} records to train on")
    on_gpu = _has_gpu() if on_gpu is None else on_gpu
    model = copy.deepcopy(start.model)
    if is_before(start.stage, recipe["stage"]["name"]):  # talked to as its last stage is
        model["init_args"] |= {key: value for key, value in recipe["model"].items() if key in ("template", "image")}
    if on_gpu:
        _recompute(model["init_args"], recipe["stage"]["train"], asked.method)
    stage, callbacks = _trained(recipe["stage"], asked)
    goes_on = start.has_adapter and asked.method is not None and not asked.method_settings
    if goes_on:  # with the adapter that is there, as it is
        callbacks = []
    batch = asked.batch_size or _batch(recipe["data"]["batch"]["size"], trained_on)
    epochs = asked.epochs or (EPOCHS_OF_FEW if trained_on < FEW else 1)
    steps = -(-trained_on // batch)
    folder = asked.run or Path("runs") / _run_name(start, asked)
    settings: dict[str, Any] = {
        "seed_everything": 0,
        "model": model,
        "stage": {**stage, "follows": [start.follow(merge=start.has_adapter and not goes_on)]},
        "data": {
            "class_path": "vlm.data.InstructionData",
            "init_args": {
                "sources": [source for data in found for source in data.sources],
                **_validation(found, asked.val_split),
                "batch": {"size": batch, "unit": "samples"},
                "group_by_modality": bool(recipe["data"].get("group_by_modality", False)),
                "max_tokens": _pack_tokens(model["init_args"]),
                "num_workers": 4 if on_gpu else 0,
            },
        },
        "trainer": {
            "default_root_dir": str(folder),
            "max_epochs": epochs,
            "precision": "bf16-mixed" if on_gpu else "32-true",
            "gradient_clip_val": recipe["trainer"].get("gradient_clip_val"),
            **({"callbacks": callbacks} if callbacks else {}),
        },
        "checkpoint": {"every_n_train_steps": max(10, min(200, steps))},
    }
    if _has_validation(found, asked.val_split):
        settings["checkpoint"]["monitor"] = "val/loss"
    return Made(settings, _summary(start, found, settings, asked, num=num, steps=steps), folder)


# what the recipe says


def _recipe_settings(system: str) -> dict[str, Any]:
    """`stage`, `model` (arguments), `data` (arguments) and `trainer` of a system's last stage, the first of several."""
    recipe = load_recipe(find_recipe(system))
    stages = [node for node in recipe.nodes if isinstance(node, TrainingStage)]
    last = next(stage for stage in stages if not any(is_before(stage.name, other.name) for other in stages))
    found: dict[str, Any] = {"stage": {}, "model": {}, "data": {}, "trainer": {}}
    for file in last.configs:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        for key in ("model", "data"):
            found[key] |= content.get(key, {}).get("init_args", {})
        for key in ("stage", "trainer"):
            found[key] |= content.get(key, {})
    found["stage"].pop("follows", None)
    found["stage"]["name"] = last.name
    return found


def _reader_options(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{reader: arguments} that say how this system reads it: whether boxes in LLaVA's files are places."""
    options: dict[str, dict[str, Any]] = {}
    for source in recipe["data"]["sources"]:
        if source.get("init_args", {}).get("places"):
            options[source["class_path"].rpartition(".")[2]] = {"places": True}
    return options


def _trained(published: dict[str, Any], asked: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`stage` and the callbacks that it needs."""
    stage = {"name": "finetune", **{key: value for key, value in published.items() if key != "name"}}
    if stage["schedule"].get("warmup", 0) >= 1:  # a number of steps of a run of another length
        stage["schedule"] = stage["schedule"] | {"warmup": 0.03}
    callbacks: list[dict[str, Any]] = []
    if asked.method is not None:
        file = registry.CONFIGS / "finetune" / f"{asked.method}.yaml"
        if not file.is_file():
            raise UserError(f"--{asked.method}: {file} is missing; the configurations come with the repository")
        overlay = yaml.safe_load(file.read_text(encoding="utf-8"))
        stage = {key: value for key, value in stage.items() if key != "modes"} | overlay["stage"]
        callbacks = overlay["trainer"]["callbacks+"]
        _adjust(callbacks[0]["init_args"], asked.method_settings)
    if asked.lr is not None:
        top = max(float(how["lr"]) for how in stage["train"].values())
        stage["train"] = {part: how | {"lr": asked.lr * float(how["lr"]) / top} for part, how in stage["train"].items()}
    return stage, callbacks


def _adjust(arguments: dict[str, Any], given: dict[str, Any]) -> None:
    """`--lora.rank=8` alone keeps the ratio of alpha to the rank."""
    if "rank" in given and "alpha" not in given and isinstance(given["rank"], int):
        arguments["alpha"] = arguments["alpha"] * given["rank"] / arguments["rank"]
    arguments.update(given)


# at one's own size


def _batch(published: int, num: int) -> int:
    """The published batch, halved until an epoch has some steps."""
    batch = published
    while batch > _LEAST_BATCH and num < batch * _STEPS_OF_AN_EPOCH:
        batch //= 2
    return batch


def _pack_tokens(model: dict[str, Any]) -> int:
    """Tokens of a micro-batch: what a GPU of 24 GB takes, but never less than one sample may have."""
    return max(_PACK_TOKENS, min(int(model.get("max_tokens", 0)), _MOST_PACK_TOKENS))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _recompute(model: dict[str, Any], trained: dict[str, Any], method: str | None) -> None:
    """Blocks that a gradient passes keep their input alone."""
    for part, description in model.items():
        passed = part == "language" or (method is None and any(name.split(".")[0] == part for name in trained))
        if isinstance(description, dict) and part in ("language", "vision") and passed:
            description["init_args"]["checkpointing"] = True


def _validation(found: list[Recognised], share: float | None) -> dict[str, Any]:
    given = [source for data in found for source in data.val_sources]
    return {**({"val_sources": given} if given else {}), **({} if share is None else {"val_split": share})}


def _has_validation(found: list[Recognised], share: float | None) -> bool:
    return bool(_validation(found, share))


def _run_name(start: Start, asked: Any) -> str:
    data = "_".join(dict.fromkeys(Path(word.rpartition("=")[2]).stem for word in asked.data))
    return re.sub(r"[^\w.-]+", "_", "_".join([start.name, data, *([asked.method] if asked.method else [])]))


def _summary(
    start: Start, found: list[Recognised], settings: dict[str, Any], asked: Any, *, num: int, steps: int
) -> list[str]:
    stage, trainer, data = settings["stage"], settings["trainer"], settings["data"]["init_args"]
    rates = ", ".join(f"{part} at {float(how['lr']):g}" for part, how in stage["train"].items())
    how = "all weights of "
    if asked.method is not None and "callbacks" in trainer:
        how = f"{asked.method} of rank {trainer['callbacks'][0]['init_args']['rank']}: "
    elif asked.method is not None:
        how = "the adapter that is there: "
    if stage["follows"][0].get("merge"):
        how = f"(its adapter becomes part of the weights) {how}"
    lines = [f"fine-tuning of {start.system}, from {start.path} ({start.stage})"]
    lines += [f"  data     {line}" for part in found for line in part.said]
    if asked.val_split is not None:
        lines.append(
            f"  held out {asked.val_split:.3g} of {num:,} records, by image: loss and answers after each epoch"
        )
    lines += [
        f"  trains   {how}{rates}",
        f"  steps    {steps:,} of {data['batch']['size']} samples an epoch, {trainer['max_epochs']} epochs; "
        f"{trainer['precision']}, at most {data['max_tokens']:,} tokens at once",
        f"  run      {trainer['default_root_dir']}",
    ]
    return lines
