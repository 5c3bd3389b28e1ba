"""Moments in 8 bits, by bitsandbytes."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import StageTransition
from tests.support.samples import samples
from tests.support.systems import make
from tests.support.training import ListSource, trainer, weights
from vlm.checkpoints.resume.single_file import AtomicCheckpointIO
from vlm.data import BatchSpec, VisionLanguageData
from vlm.errors import UserError
from vlm.schedules import Schedule
from vlm.stages import AdamW, Stage, Trained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TRAIN = {"connector": Trained(1e-2), "language.lm_head": Trained(1e-2, weight_decay=0.1)}


def fit(folder: Path, kind: Any, resumed_from: Path | None = None) -> Any:
    module = make("llava_1_5")
    stage = StageTransition("test", TRAIN, optimizer=AdamW(kind=kind), schedule=Schedule("constant"))
    keep = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(
        folder, max_epochs=1, callbacks=[stage, keep], enable_checkpointing=True, plugins=[AtomicCheckpointIO()]
    )
    run.fit(module, VisionLanguageData([ListSource(samples(folder, 12))], batch=BatchSpec(4)), ckpt_path=resumed_from)
    assert run.global_step == 3
    return module, run.optimizers[0]


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
def test_moments_take_a_quarter_and_a_resume_is_exact(kind: str, tmp_path: Path) -> None:
    for folder in ("float32", "8bit", "again"):
        (tmp_path / folder).mkdir()
    whole, optimizer = fit(tmp_path / "8bit", kind)
    exact, plain = fit(tmp_path / "float32", "adamw")
    head, other = whole.language.lm_head.weight, exact.language.lm_head.weight
    state = [tensor for tensor in optimizer.state[head].values() if torch.is_tensor(tensor)]
    size = sum(tensor.nbytes for tensor in state if tensor.numel() != 256)  # without the two tables of 256 levels
    assert size == 2 * head.numel() + 2 * 4 * -(-head.numel() // 256)  # and a scale for 256 elements
    assert sum(t.nbytes for t in plain.state[other].values() if t.ndim) == 8 * head.numel()
    moved = (other - make_start()).norm()
    assert (head - other).norm() <= 0.1 * moved
    again, _ = fit(tmp_path / "again", kind, tmp_path / "8bit" / "step=1.ckpt")
    ours, theirs = weights(again), weights(whole)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def make_start() -> torch.Tensor:
    module = make("llava_1_5")
    module.configure_model()
    return module.language.lm_head.weight.detach()


def test_what_cannot_be_kept_in_8_bits_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"stage\.optimizer\.kind: moments of adamw_8bit are not handed to another"):
        Stage("s", TRAIN, optimizer=AdamW(kind="adamw_8bit"), keep_optimizer=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"needs bitsandbytes; pip install 'vlm\[quantized\]'"):
        fit(tmp_path / "a", "adamw_8bit")
