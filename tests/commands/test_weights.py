"""What `--weights` finds: checkpoints of a run that goes on, and runs that were moved."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

import cli
import vlm
from tests.commands.test_cli import World
from vlm.building.weight_sources import artefact_chain
from vlm.checkpoints.artefact import read_artefact
from vlm.checkpoints.published.open import find_weights
from vlm.checkpoints.resume.opened import read_trained
from vlm.errors import UserError


class Looks(Callback):
    """Opens the newest checkpoint in the middle of the training."""

    seen: list[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 1:
            opened = vlm.load(f"{trainer.default_root_dir}@last")
            weights = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
            self.seen.append((trainer.global_step, weights, dict(opened.named_parameters())))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two stages; the second follows the first, validates twice, and keeps the best."""
    world = World(tmp_path_factory.mktemp("trained"))
    world.run = world.folder / "runs" / "1_align"
    assert world.fit() == 0
    world.run, world.stage = world.folder / "runs" / "2_finetune", "2_finetune"
    follows = [{"artefact": str(world.folder / "runs/1_align/artefact"), "parts": {"connector": "connector"}}]
    looks = {"class_path": "tests.commands.test_weights.Looks"}
    status = world.fit(
        f"--stage.follows={json.dumps(follows)}",
        "--stage.train={connector: {lr: 0.01}}",
        "--checkpoint.every_n_train_steps=1",
        f"--trainer.callbacks+={json.dumps(looks)}",
    )
    assert status == 0
    return world


def test_the_newest_checkpoint_of_a_run_that_goes_on(trained: World) -> None:
    step, weights, opened = Looks.seen[-1]
    assert step == 1
    assert weights.keys() == opened.keys()
    for name, value in weights.items():
        assert torch.equal(value, opened[name]), name
