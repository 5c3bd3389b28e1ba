"""What a new system needs: its class, its configurations, a line in the registry and a test entry; nothing in the core.

The toy is a seventeenth system; `blip2_t5` is one that is unlike all others.
"""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import cli
import vlm
from callbacks import StageTransition
from tests.commands.test_cli import World
from tests.conftest import GOLDEN
from tests.support.parity import assert_same_scores, assert_same_state
from tests.support.samples import samples
from tests.support.blip2 import blip2_t5
from tests.support.systems import LLAMA, ROOT, SYSTEMS, TOWER, build, llava_1_5, make
from tests.support.training import ListSource, trainer
from tests.systems import test_contract as contract
from vlm import registry
from vlm.batch import IGNORE
from vlm.data import BatchSpec, InstructionData
from vlm.language import Decoding
from vlm.recipes import print_systems
from vlm.schedules import Schedule
from vlm.stages import InitFrom
from vlm.systems import LLaVA15

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


class Seventeenth(LLaVA15):
    """The toy: images are cropped to 28 px."""

    system = "seventeenth"


def seventeenth(**changes) -> Seventeenth:
    return Seventeenth(**(llava_1_5().arguments | {"image": "crop"} | changes))


LINE = {"seventeenth": registry.System(f"{__name__}.Seventeenth")}
"""Of the registry."""

ENTRY = replace(SYSTEMS["llava_1_5"], make=seventeenth)
"""All that the contract test is told."""


def write_configs(folder: Path, source: dict) -> None:
    """A recipe of one stage, at paper size and at laptop size."""
    llava = registry.CONFIGS / "llava_1_5"
    model = yaml.safe_load((llava / "model.yaml").read_text())
    model["model"]["class_path"] = LINE["seventeenth"].class_path
    tiny = {
        "vision": {"init_args": {"weights": None, "options": TOWER}},
        "language": {"init_args": {"path": None, "config": LLAMA, "checkpointing": False}},
        "tokenizer": {"init_args": {"path": str(GOLDEN / "_shared" / "llama_sp_tokenizer.model")}},
    }
    stage = {
        "data": {"init_args": {"sources": [source], "batch": {"size": 3}, "num_workers": 0}},
        "trainer": {"precision": "32-true", "accelerator": "cpu", "max_steps": 2},
    }
    files = {
        "recipe.yaml": {"system": "seventeenth", "stages": {"1_align": {"configs": ["model.yaml", "1_align.yaml"]}}},
        "model.yaml": model,
        "1_align.yaml": yaml.safe_load((llava / "1_align.yaml").read_text()),
        "demo/model.yaml": {"model": {"init_args": tiny}},
        "demo/1_align.yaml": stage,
    }
    (folder / "demo").mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(yaml.safe_dump(content))


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "SYSTEMS", LINE)


def test_a_seventeenth_system_is_trained_and_judged(
    line: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is listed, its recipe is found by its name and runs, and what that leaves is opened as what it was."""
    world = World(tmp_path)
    records = [record | {"answers": ["a shade"]} for record in world.records]
    (tmp_path / "data.json").write_text(json.dumps(records))
    init = {"path": str(tmp_path / "data.json"), "image_root": str(tmp_path)}
    source = {"class_path": "vlm.data.LlavaJson", "init_args": init}
    write_configs(tmp_path / "configs" / "seventeenth", source)
    monkeypatch.setattr(registry, "CONFIGS", tmp_path / "configs")
    monkeypatch.chdir(ROOT)  # the recipe's process finds the class from here
    assert print_systems() == 0
    assert capfd.readouterr().out.split() == ["system", "stages", "seventeenth", "1_align"]
    run = tmp_path / "runs"
    assert cli.main(["fit", "--recipe", "seventeenth", "--demo", "--run", str(run)]) == 0
    stored = json.loads((run / "1_align" / "artefact" / "stage.json").read_text())
    assert (stored["system"], stored["global_step"]) == ("seventeenth", 2)
    assert vlm.load(run / "1_align").codec.transform.mode == "crop"
    judge = {
        "evaluation": {"metrics": {"data": "vlm.metrics.ExactMatch"}, "decoding": {"max_new_tokens": 3}},
        "data": {"class_path": "vlm.data.InstructionData", "init_args": {"test_sources": [source]}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump(judge))
    assert cli.main(["test", "-c", str(tmp_path / "judge.yaml"), "--weights", str(run / "1_align")]) == 0
    scores = json.loads((run / "1_align" / "evaluation" / "test" / "scores.json").read_text())
    assert scores["counts"] == {"data": 6}


def test_a_seventeenth_system_keeps_the_contract(line: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of everything that is asked of the system whose entry it has, but for ranks: processes without the entry."""
    monkeypatch.setitem(SYSTEMS, "seventeenth", ENTRY)
    monkeypatch.setattr(contract, "run_ranks", lambda *_: ())
    given = {"name": "seventeenth", "decoding": Decoding(max_new_tokens=4), "monkeypatch": monkeypatch}
    asked = [
        check for name, check in vars(contract).items() if name.startswith("test_") and "llava_1_5" in _names(check)
    ]
    assert len(asked) > 12
    for check in asked:
        (tmp_path / check.__name__).mkdir()
        given["tmp_path"] = tmp_path / check.__name__
        check(**{argument: given[argument] for argument in inspect.signature(check).parameters})


def _names(check) -> list[str]:
    return next(mark.args[1] for mark in check.pytestmark if mark.args[0] == "name")


def test_two_stages_learn(tmp_path: Path) -> None:
    pool = samples(tmp_path, 8)
    losses, previous = [sum(-scores.sum().item() for scores in build("blip2_t5").score(pool))], ""
    for name, stage in SYSTEMS["blip2_t5"].stages.items():
        folder = tmp_path / name
        follows = [InitFrom(previous, dict(stage.parts))] if previous else []
        transition = StageTransition(name, dict(stage.train), follows=follows, schedule=Schedule("constant"))
        module = blip2_t5(prefix=True)
        run = trainer(folder, max_epochs=8, accumulate_grad_batches=2, callbacks=[transition])
        run.fit(module, InstructionData([ListSource(pool)], batch=BatchSpec(4)))
        previous = str(folder / "artefact")
        loaded = vlm.load(folder)
        losses.append(sum(-scores.sum().item() for scores in loaded.score(pool)))
        assert_same_state(loaded, module)
        assert_same_scores(loaded.score(pool), module.score(pool))
    assert losses[0] > losses[1] > losses[2]


def test_the_prefix_belongs_to_the_sample(tmp_path: Path) -> None:
    """It is cut in the first half of the answer, by the sample's seed alone, and never in evaluation."""
    sample, codec = samples(tmp_path)[0], make("blip2_t5", prefix=True).codec
    whole = codec.encode(sample)
    (text,), (decoder,) = whole.text, whole.rows["decoder"]
    length, points = len(decoder.ids) - 1, set()
    for seed in range(200):
        item = codec.encode(sample, seed=seed)
        (longer,), (shorter,) = item.text, item.rows["decoder"]
        point = len(longer.ids) - len(text.ids)
        points.add(point)
        assert torch.equal(longer.ids[-1 - point : -1], decoder.ids[1 : 1 + point])
        assert torch.equal(shorter.targets, decoder.targets[point:])
        assert item.counts == {"lm": float((shorter.targets != IGNORE).sum())}
        assert torch.equal(codec.encode(sample, seed=seed).text[0].ids, longer.ids)
    assert points == set(range(1, length // 2 + 1))
    assert len(text.slots["image"]) == 4
    assert text.ids[-1] == codec.tokenizer.eos_id == decoder.targets[-1]
    assert torch.equal(codec.encode(sample, generate=True).text[0].ids, text.ids)
