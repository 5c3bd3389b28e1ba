"""The small vision towers of the demos: what they are, and how the files of their weights are made."""

from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import save_file

from vlm.demo.tower import View, padded_scene, screen, squashed_scene, train_pyramid, train_tower
from vlm.vision import ConvNeXtPyramid

TOWER_OPTIONS: dict[str, Any] = {"img_size": 98, "embed_dim": 128, "depth": 5, "num_heads": 4}


class SmallTower(NamedTuple):
    """A tower of `TOWERS`.

    Attributes:
        architecture: timm's name of it.
        options: of timm's constructor.
        steps: of its pretraining.
        view: what it sees then.
        batch: images a step.
    """

    architecture: str
    options: dict[str, Any]
    steps: int
    view: View = padded_scene
    batch: int = 48


TOWERS = {
    "clip": SmallTower("vit_large_patch14_clip_quickgelu_336", TOWER_OPTIONS, 4000),
    "eva": SmallTower(
        "eva_giant_patch14_clip_224", {"img_size": 98, "embed_dim": 112, "depth": 5, "num_heads": 4}, 1500
    ),
    "blip_vit": SmallTower(
        "vit_base_patch16_224", {"img_size": 112, "embed_dim": 96, "depth": 4, "num_heads": 4}, 1500
    ),
    "eva02_e": SmallTower(
        "eva02_enormous_patch14_clip_224",
        {"img_size": 98, "embed_dim": 96, "depth": 5, "num_heads": 4, "mlp_ratio": 4.0},
        1500,
        squashed_scene,
    ),
    "eva02_l": SmallTower(
        "eva02_large_patch14_clip_336",
        {"img_size": 224, "embed_dim": 80, "depth": 5, "num_heads": 4},
        900,
        screen,
        batch=8,
    ),
}
PYRAMID = "convnext_large_mlp"
PYRAMID_SIZE = 112
PYRAMID_OPTIONS: dict[str, Any] = {"depths": [1, 1, 4, 2], "dims": [16, 32, 64, 128], "ls_init_value": 0.1}
PYRAMID_STEPS = 2000


def make_tower(folder: Path, name: str) -> None:
    """Writes the pretrained tower of this name in `TOWERS`."""
    torch.manual_seed(0)
    tower = TOWERS[name]
    trunk = timm.create_model(tower.architecture, num_classes=0, **tower.options)
    for line in train_tower(trunk, steps=tower.steps, view=tower.view, batch=tower.batch):
        print(name, line, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    state = trunk.half().state_dict()
    if name.startswith("eva"):  # no system builds what is above the feature, its last block and norm
        above = (f"blocks.{tower.options['depth'] - 1}.", "norm.")
        state = {key: tensor for key, tensor in state.items() if not key.startswith(above)}
    save_file(state, folder / "model.safetensors")


def make_pyramid(folder: Path) -> None:
    """Writes the pretrained ConvNeXt."""
    torch.manual_seed(0)
    tower = ConvNeXtPyramid(PYRAMID, PYRAMID_SIZE, options=PYRAMID_OPTIONS).build()
    for line in train_pyramid(tower, steps=PYRAMID_STEPS):
        print("convnext", line, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tower.trunk.half().state_dict(), folder / "model.safetensors")
