"""Features of frozen towers on the disk: the same numbers, whoever wrote them and whatever is there already.

What is read is what one call on the same shapes made. Beside a tower that sees a whole pack at once: 0 seen on two
kinds of processor.
"""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks import FeatureCache
from tests.support.systems import RATE, SYSTEMS, build, make
from tests.support.training import Recorder, packs, trainer
from vlm.data.loading.opaque import OpaqueBatch
from vlm.codec import step_counts
from vlm.errors import UserError
from vlm.stages import Trained
from vlm.vision import FeatureFiles, RandomCropFlip, TowerDescription, keep_features, with_keys

EACH_OWN_WAY = {"llava_1_5", "blip2", "blip2_qformer", "cogagent", "mini_gemini_hd", "xcomposer2_4khd"}
"""Systems that look through their towers each in a way of its own; the others are asked among the slow tests."""
FROZEN = [
    pytest.param(name, marks=() if name in EACH_OWN_WAY else pytest.mark.slow)
    for name in SYSTEMS
    if name != "fuyu" and "vision" in SYSTEMS[name].make().arguments
]
STEPS = (((0, 3), (2, 1)), ((5,), (2, 4)))


def losses(module: Any, batch: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: value.detach() for name, value in module.losses(batch).items()}


@pytest.mark.parametrize("name", FROZEN)
def test_every_frozen_tower(name: str, tmp_path: Path) -> None:
    module: Any = build(name)
    module.requires_grad_(False).eval()
    items = [module.codec.encode(sample) for sample in SYSTEMS[name].pool(tmp_path, 3)]
    batch = with_keys(module.codec.collate(items, counts=step_counts(items)))
    module.names_views = True
    sealed = module.on_before_batch_transfer(OpaqueBatch(batch), 0)  # as the data modules hand it to a trainer
    assert {name: views.keys for name, views in sealed.to("cpu").views.items()} == {
        name: views.keys for name, views in batch.views.items()
    }
    plain = losses(module, batch)
    files = {}
    for part, description in module.arguments.items():
        if isinstance(description, TowerDescription):
            files[part] = FeatureFiles(tmp_path / part)
            keep_features(module.get_submodule(part), files[part])
    computed = losses(module, batch)
    for part, kept in files.items():
        kept.finish()
        assert (kept.num_read, kept.num_computed > 0) == (0, True)
        module.get_submodule(part).forward = None  # nobody runs it
    read = losses(module, batch)
    assert all(kept.num_read == kept.num_computed == kept.size()[0] for kept in files.values())
    for term, value in plain.items():
        assert torch.equal(read[term], computed[term])
        torch.testing.assert_close(computed[term], value, rtol=1e-6, atol=1e-6)


def fit(folder: Path, *callbacks: L.Callback, epochs: int = 2, resume: Path | None = None) -> Recorder:
    module, recorder = make("llava_1_5", {"connector": RATE}), Recorder()
    run = trainer(folder, max_epochs=epochs, accumulate_grad_batches=2, callbacks=[recorder, *callbacks])
    run.fit(module, packs(module, folder, STEPS))
    return recorder


def test_a_run_with_features_of_another_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plain = fit(tmp_path)
    found = [fit(tmp_path, FeatureCache(str(tmp_path / "features"))) for _ in range(2)]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("feature cache: vision: ")]
    assert told == [
        "feature cache: vision: 10 views read, 6 computed",  # two epochs of 8, two views are in two packs
        "feature cache: vision: 16 views read, 0 computed",
    ]
    for theirs, ours, expected in zip(*(run.gradients for run in (*found, plain)), strict=True):
        for name, gradient in expected.items():
            assert torch.equal(theirs[name], ours[name])
            torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-7)


def test_files_that_are_not_whole_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    keys = ["aa1", "bb2", "aa3"]

    def find(files: FeatureFiles) -> torch.Tensor:
        found = files.find(keys, lambda view: views[view : view + 1, None], device=torch.device("cpu"))
        files.finish()
        return found

    first, other = FeatureFiles(tmp_path), FeatureFiles(tmp_path)  # two writers of one folder
    expected = find(first)
    torn = sorted(tmp_path.glob("*/*.features"))
    torn[0].write_bytes(torn[0].read_bytes()[:-1])
    torn[1].write_bytes(b"")
    assert torch.equal(find(other), expected)
    assert torch.equal(find(first), expected)
    assert (other.num_read, other.num_computed, first.num_read) == (1, 2, 3)
    monkeypatch.setattr("vlm.vision.feature_files.save", lambda tensors: 1 // 0)
    first.find(["cc4"], lambda view: views[:1], device=torch.device("cpu"))
    with pytest.raises(ZeroDivisionError):
        first.finish()  # what happens on the thread ends the run


@pytest.mark.parametrize(
    ("name", "train", "changes", "message"),
    [
        ("llava_1_5", {"connector": RATE, "vision.trunk.pos_embed": RATE}, {}, "changes vision.trunk.pos_embed"),
        ("llava_1_5", {"connector": RATE}, {"augment": RandomCropFlip(size=28)}, "model.augment"),
        ("fuyu", {"connector": RATE}, {}, "has no tower"),
    ],
)
def test_what_is_refused(name: str, train: dict[str, Trained], changes: dict, message: str, tmp_path: Path) -> None:
    module = make(name, train, **changes)
    run = trainer(tmp_path, max_epochs=1, callbacks=[FeatureCache(str(tmp_path / "features"))])
    with pytest.raises(UserError, match=message):
        run.fit(module, packs(module, tmp_path, (((1,),),)))
