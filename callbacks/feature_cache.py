"""Features of frozen towers, kept on the disk."""

import platform
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from callbacks.progress import say
from vlm.batch import Batch
from vlm.data.loading.opaque import OpaqueBatch
from vlm.errors import UserError
from vlm.module import VisionLanguageModule
from vlm.moving import changing_names
from vlm.vision import FeatureFiles, TowerDescription, keep_features, with_keys


class FeatureCache(Callback):
    """Sends every view through a frozen tower once, and reads its features from the disk from then on.

    For stages of several epochs, and for several runs over the same images. The numbers are those of a tower that sees
    each view alone, whatever is in the folder already: features are known by the content of the tower's weights, its
    settings, the precision and the device, and by the pixels of the view. Images are still decoded.

    Args:
        folder: where features are kept, a folder below it for each tower; any number of ranks and runs share it. It
            grows with every new view, and nothing is ever removed from it.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._files: dict[str, FeatureFiles] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        towers = {n: d for n, d in pl_module.arguments.items() if isinstance(d, TowerDescription)}
        if not towers:
            raise UserError(f"callbacks.FeatureCache: {pl_module.system} has no tower; leave the callback out")
        if pl_module.is_sharded:
            raise UserError(
                "callbacks.FeatureCache: with sharded weights all ranks run the tower together; use trainer.strategy: "
                "ddp, or leave the callback out"
            )
        if pl_module.arguments.get("augment") is not None:
            raise UserError(
                "callbacks.FeatureCache: model.augment shows every image anew in each epoch; set one of them to null"
            )
        changing = {part: _what_changes(pl_module, part) for part in towers}
        if all(changing.values()):
            raise UserError(f"callbacks.FeatureCache: {'; '.join(map(str, changing.values()))}; leave the callback out")
        for part, description in towers.items():
            if reason := changing[part]:
                say(f"feature cache: not of {part}: {reason}")
                continue
            tower = pl_module.get_submodule(part)
            files = FeatureFiles(self.folder / f"{part}-{_identity(trainer, pl_module, part, description)}")
            keep_features(tower, files)
            self._files[part] = files
            count, size = files.size()
            facts = description.facts()
            say(
                f"feature cache: {part} in {files.folder}, {count:,} views in {size / 2**30:.2f} GiB; 1,000 views take "
                f"up to {1000 * facts.num_tokens * facts.dim * 4 / 2**30:.2f} GiB"
            )
        # on this module alone: of a class that has this hook Lightning warns in every run
        pl_module.on_before_batch_transfer = _name_views  # type: ignore[method-assign]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for part, files in self._files.items():
            files.finish()
            say(f"feature cache: {part}: {files.num_read:,} views read, {files.num_computed:,} computed")
        self._close(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(pl_module)

    def _close(self, module: LightningModule) -> None:
        vars(module).pop("on_before_batch_transfer", None)
        for part in self._files:
            keep_features(module.get_submodule(part), None)
        self._files = {}


def _name_views(batch: Any, dataloader_idx: int) -> Any:
    content = batch.content if isinstance(batch, OpaqueBatch) else batch
    if not isinstance(content, Batch):  # samples that are to be answered
        return batch
    named = with_keys(content)
    return OpaqueBatch(named) if isinstance(batch, OpaqueBatch) else named


def _what_changes(module: VisionLanguageModule, part: str) -> str | None:
    """Why the features of a tower are not the same the next time; None where they are."""
    assert module.stage is not None
    if trained := sorted(name for name in changing_names(module) if name.startswith(f"{part}.")):
        return f"stage {module.stage.name!r} changes {trained[0]}"
    if any(layer.training for layer in module.get_submodule(part).modules()):
        return f"stage.modes has {part} in train mode, where it drops at random"
    return None


def _identity(trainer: Trainer, module: VisionLanguageModule, part: str, description: Any) -> str:
    """What the features of a view depend on beside its pixels, as 16 hexadecimal digits."""
    tower: nn.Module = module.get_submodule(part)
    device = trainer.strategy.root_device
    machine = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    )
    parts = [
        *(f"{name} {content}" for name, content in sorted(module.frozen_hashes.items()) if name.startswith(f"{part}.")),
        *(f"{name} {parameter.dtype}" for name, parameter in tower.named_parameters()),
        repr(replace(description, weights=None)),
        f"{tower} compiled: {module.compile_network is not None}",
        f"{trainer.precision} {torch.get_float32_matmul_precision()} {machine} {torch.__version__} {timm.__version__}",
    ]
    return blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
