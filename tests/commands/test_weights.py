"""What `--weights` finds: checkpoints of a run that goes on, and runs that were moved."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

import cli
import vlm
from tests.commands.test_cli import World
from tests.conftest import GOLDEN
from vlm.checkpoints.published.open import find_weights
from vlm.errors import UserError

STEPS = 2


class Looks(Callback):
    """Opens the newest checkpoint in the middle of the training."""

    seen: ClassVar[list[tuple[dict[str, Tensor], dict[str, Tensor]]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            opened = vlm.load(f"{trainer.default_root_dir}@last")
            assert opened.weights.endswith("checkpoints/step=1.ckpt")
            self.seen.append((values(pl_module), values(opened)))


def values(module: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two stages whose paths are relative to where they were trained; the second keeps its best state."""
    world = World(tmp_path_factory.mktemp("place"))
    (world.folder / "parts").mkdir()
    shutil.copy(GOLDEN / "_shared" / "llama_sp_tokenizer.model", world.folder / "parts/tokenizer.model")
    source = {
        "class_path": "vlm.data.LlavaJson",
        "init_args": {"path": str(world.folder / "data.json"), "image_root": str(world.folder)},
    }
    world.options = ["--model.init_args.tokenizer.init_args.path=parts/tokenizer.model"]
    follows = [{"artefact": "runs/1_align/artefact", "parts": {"connector": "connector"}}]
    with contextlib.chdir(world.folder):
        world.run = Path("runs/1_align")
        assert world.fit() == 0
        world.run, world.stage = Path("runs/2_finetune"), "2_finetune"
        done = world.fit(
            f"--stage.follows={json.dumps(follows)}",
            "--stage.train={language: {lr: 0.01}}",
            "--checkpoint.every_n_train_steps=1",
            "--checkpoint.monitor=val/loss",
            "--trainer.val_check_interval=1",
            f"--data.init_args.val_sources={json.dumps([source])}",
            "--trainer.callbacks+={class_path: tests.commands.test_weights.Looks}",
        )
    assert done == 0
    return world


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_the_data_of_a_stage_is_put_to_a_checkpoint(world: World, tmp_path: Path) -> None:
    source = {
        "class_path": "vlm.data.LlavaJson",
        "init_args": {"path": str(world.folder / "data.json"), "image_root": str(world.folder)},
    }
    content = {
        "data": {"class_path": "vlm.data.InstructionData", "init_args": {"predict_sources": [source]}},
        "answers": {"out": str(tmp_path / "answers.jsonl"), "decoding": {"max_new_tokens": 2}},
        "trainer": {"accelerator": "cpu"},
    }
    (tmp_path / "asked.yaml").write_text(json.dumps(content))
    with contextlib.chdir(world.folder):
        assert cli.main(["predict", "-c", str(tmp_path / "asked.yaml"), "--weights", "runs/2_finetune@best"]) == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [record["id"] for record in world.records]


def test_the_newest_checkpoint_while_training_goes_on(world: World) -> None:
    trained, opened = Looks.seen[-1]
    assert same(trained, opened)
    assert not same(opened, values(vlm.load(world.folder / "runs")))


def test_checkpoints_by_name(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    run = world.folder / "runs/2_finetune"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["best"], "nothing to resume from is left"
    step = json.loads((run / "checkpoints/best/score.json").read_text())["step"]
    best = run / f"checkpoints/best/step={step}.ckpt"
    for name in (f"{run}@best", f"{run}@{step}", f"{run.parent}@best", best):
        assert find_weights(name) == str(best)
    assert find_weights(f"{run}@last") == str(run / "artefact")
    if step == STEPS:
        assert same(values(vlm.load(f"{run}@best")), values(vlm.load(run)))
    with pytest.raises(UserError, match=r"2_finetune@7: no such checkpoint in .*; there are best"):
        find_weights(f"{run}@7")
    with pytest.raises(UserError, match=r"1_align@best: no such checkpoint in .*; there is none"):
        find_weights(f"{run.parent}/1_align@best")
    image = str(world.folder / "1.png")
    assert (
        cli.main(["predict", "--weights", f"{run}@best", "--image", image, "--prompt", "?", "--max_new_tokens=2"]) == 0
    )
    assert capfd.readouterr().out.startswith(image)


def test_a_moved_run_opens_from_anywhere(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = values(vlm.load(world.folder / "runs"))
    monkeypatch.chdir("/")
    elsewhere = tmp_path / "elsewhere"
    world.folder.rename(elsewhere)
    try:
        assert same(values(vlm.load(elsewhere / "runs")), before)
        assert same(values(vlm.load(elsewhere / "runs/2_finetune@best")), before)
        arguments = ["--image", str(elsewhere / "1.png"), "--prompt", "?", "--max_new_tokens=2"]
        assert cli.main(["predict", "--weights", str(elsewhere / "runs"), *arguments]) == 0
        capfd.readouterr()

        shutil.copytree(elsewhere / "runs/2_finetune/artefact", tmp_path / "alone/mine")
        assert cli.main(["predict", "--weights", str(tmp_path / "alone/mine"), *arguments]) == 2
        error = capfd.readouterr().err
        assert "parts/tokenizer.model, which is missing; looked for" in error
        shutil.copytree(elsewhere / "parts", tmp_path / "parts")
        monkeypatch.chdir(tmp_path)
        assert cli.main(["predict", "--weights", str(tmp_path / "alone/mine"), *arguments]) == 2
        error = capfd.readouterr().err
        assert "the stage it follows is missing: it is neither in" in error
        assert f"nor beside it in {tmp_path}" in error
        shutil.copytree(elsewhere / "runs/1_align/artefact", tmp_path / "alone/the_one_before")
        assert same(values(vlm.load(tmp_path / "alone/mine")), before)
    finally:
        elsewhere.rename(world.folder)
