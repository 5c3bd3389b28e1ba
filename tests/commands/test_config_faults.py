"""A configuration with a mistake ends in one line: file, key, and the nearest one that there is."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import cli
from lightning.pytorch import Trainer
from tests.commands.test_cli import World
from vlm.command_line.classes import import_classes
from vlm.command_line.commands import OPTIONS
from vlm.command_line.config_faults import Section, find_fault, find_lost_key
from vlm.command_line.layers import Layer, read_layers
from callbacks import Evaluation, Health, Predictions, ResumeCheckpoint, StageTransition, ThroughputMonitor
from vlm.data import VisionLanguageData
from vlm.module import VisionLanguageModule
from vlm.recipes.catalogue import find_recipe
from vlm.recipes.configs import config_files
from vlm.recipes.graph import TrainingStage
from vlm.recipes.reading import load_recipe
from vlm.registry import SYSTEMS

SECTIONS = {
    "stage": Section(StageTransition),
    "checkpoint": Section(ResumeCheckpoint),
    "health": Section(Health),
    "throughput": Section(ThroughputMonitor),
    "predictions": Section(Predictions),
    "evaluation": Section(Evaluation),
    "trainer": Section(Trainer),
    "model": Section(VisionLanguageModule, is_class=True),
    "data": Section(VisionLanguageData, is_class=True),
}
LLAVA = yaml.safe_load((Path(__file__).parents[2] / "configs" / "llava_1_5" / "model.yaml").read_text())
STAGE = yaml.safe_load((Path(__file__).parents[2] / "configs" / "llava_1_5" / "1_align.yaml").read_text())


def source(**changes: Any) -> dict[str, Any]:
    return {
        "data": {
            "init_args": {"sources": [{"class_path": "vlm.data.LlavaJson", "init_args": {"path": "a.json"}} | changes]}
        }
    }


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "top": ({"modle": {}}, "modle: unknown key; did you mean model?"),
    "far from all": ({"trainer": {"zzzz": 1}}, "trainer.zzzz: unknown key; Trainer has accelerator, accumulate_grad"),
    "trainer": ({"trainer": {"max_stepz": 3}}, "trainer.max_stepz: unknown key; did you mean max_steps?"),
    "argument": ({"data": {"init_args": {"source": []}}}, "data.init_args.source: unknown key; did you mean sources?"),
    "of a base": (
        {"data": {"init_args": {"shufle_images": 1}}},
        "data.init_args.shufle_images: unknown key; did you mean shuffle_images?",
    ),
    "dataclass": (
        {"data": {"init_args": {"batch": {"sise": 3}}}},
        "data.init_args.batch.sise: unknown key; did you mean size?",
    ),
    "entry of a list": (
        source(init_args={"path": "a", "image_rot": "x"}),
        "data.init_args.sources[0].init_args.image_rot: unknown key; did you mean image_root?",
    ),
    "class path": (
        source(class_path="vlm.data.LlavaJsn"),
        "data.init_args.sources[0].class_path: vlm.data has no LlavaJsn; did you mean LlavaJson?",
    ),
    "short name": (
        source(class_path="LlavaJsn"),
        "data.init_args.sources[0].class_path: no Source is called 'LlavaJsn'; did you mean LlavaJson?",
    ),
    "module": (source(class_path="vml.data.LlavaJson"), "there is no module 'vml'; did you mean LlavaJson?"),
    "another kind of class": (source(class_path="vlm.vision.TimmTower"), "vlm.vision.TimmTower is no Source; there"),
    "beside class_path": (
        {"data": {"init_args": {"val_sources": [{"class_path": "LlavaJson", "path": "a"}]}}},
        "data.init_args.val_sources[0].path: stands beside class_path; arguments of LlavaJson go below init_args",
    ),
    "no dash": (
        {"data": {"init_args": {"val_sources": {"class_path": "LlavaJson"}}}},
        "data.init_args.val_sources: is a list; put a dash before each entry",
    ),
    "missing argument": (
        {"data": {"init_args": {"val_sources": [{"class_path": "LlavaJson"}]}}},
        "data.init_args.val_sources[0].init_args.path: is not given; LlavaJson needs it",
    ),
    "callback": (
        {"trainer": {"callbacks": [{"class_path": "EarlyStoping"}]}},
        "trainer.callbacks[0].class_path: no Callback is called 'EarlyStoping'; did you mean EarlyStopping?",
    ),
    "callback's argument": (
        {"trainer": {"callbacks+": [{"class_path": "EarlyStopping", "init_args": {"monitr": "x"}}]}},
        "trainer.callbacks[0].init_args.monitr: unknown key; did you mean monitor?",
    ),
    "callback without its argument": (
        {"trainer": {"callbacks": [{"class_path": "EarlyStopping"}]}},
        "trainer.callbacks[0].init_args.monitor: is not given; EarlyStopping needs it",
    ),
    "free keys": (
        {"stage": {"train": {"connector": {"lrr": 1}}}},
        "stage.train.connector.lrr: unknown key; did you mean lr?",
    ),
    "number": (
        {"stage": {"train": {"connector": {"lr": "fast"}}}},
        "stage.train.connector.lr: expects a number, found 'fast'",
    ),
    "list for keys": ({"stage": {"train": ["connector"]}}, "stage.train: expects keys, found ['connector']"),
    "flag": ({"data": {"init_args": {"drop_last": "yes please"}}}, "expects true or false, found 'yes please'"),
    "choice": ({"trainer": {"precision": "bf16-mxed"}}, "64-true or bf16, found 'bf16-mxed'; did you mean bf16-mixed?"),
    "union": ({"trainer": {"val_check_interval": [1]}}, "expects a whole number, a number, text, timedelta or keys"),
    "nested class": (
        {"model": {"init_args": {"vision": {"init_args": {"wieghts": 1}}}}},
        "model.init_args.vision.init_args.wieghts: unknown key; did you mean weights?",
    ),
    "system": ({"model": {"class_path": "LLaVA16"}}, "no VisionLanguageModule is called 'LLaVA16'; did you mean"),
    "no class": ({"data": 3}, "data: expects VisionLanguageData by class_path and init_args, found 3"),
    "metric": (
        {"evaluation": {"metrics": {"a": {"class_path": "VQAAcuracy"}}}},
        "evaluation.metrics.a.class_path: no AnswerMetric or Judge is called 'VQAAcuracy'; did you mean VQAAccuracy?",
    ),
    "logger": ({"trainer": {"logger": {"class_path": "WandbLoger"}}}, "did you mean WandbLogger?"),
}


@pytest.fixture(scope="module", autouse=True)
def _classes() -> None:
    import_classes()


@pytest.mark.parametrize("case", FAULTS)
def test_the_key_and_the_nearest_one(case: str) -> None:
    content, words = FAULTS[case]
    layers = [Layer("model.yaml", LLAVA), Layer("stage.yaml", STAGE), Layer("mine.yaml", content)]
    fault = find_fault(layers, SECTIONS, OPTIONS)
    assert fault is not None
    assert fault.startswith("mine.yaml: ")
    assert words in fault
    assert len(fault) < 400
    assert "\n" not in fault


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_every_shipped_configuration_is_without_fault(system: str) -> None:
    recipe = load_recipe(find_recipe(system))
    for stage in recipe.nodes:
        if isinstance(stage, TrainingStage):
            layers = read_layers([f"--config={file}" for file in config_files(recipe, stage, demo=True)])
            layers.append(Layer("recipe", {"stage": {"name": stage.name}}))
            assert find_fault(layers, SECTIONS, OPTIONS) is None
            assert find_lost_key(layers, SECTIONS, OPTIONS) is None


@pytest.mark.parametrize("case", ["argument", "callback without its argument", "top", "choice"])
def test_the_command_line_says_it(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(FAULTS[case][0]))
    assert world.fit("-c", str(tmp_path / "mine.yaml")) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"vlm: error: {tmp_path / 'mine.yaml'}: ")
    assert FAULTS[case][1] in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("a: [1", "mine.yaml: line 1, column 6: is no YAML"),
        ("- a", "holds no keys"),
        ("trainer: {max_steps: 1}\ntrainer: {max_epochs: 1}", "the key 'trainer' stands twice"),
    ],
)
def test_files_that_are_none(text: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    assert cli.main(["fit", "-c", str(tmp_path / "mine.yaml")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_options_are_named_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--model=LLaVA15", "--data=InstructionData", "--data.init_args.source=3"]) == 2
    assert "command line: data.init_args.source: unknown key; did you mean sources?" in capsys.readouterr().err
    assert cli.main(["fit", "--model", "LLaVA16"]) == 2
    assert "did you mean LLaVA15?" in capsys.readouterr().err
    assert cli.main(["fit"]) == 2
    assert "stage.name: is not given" in capsys.readouterr().err
