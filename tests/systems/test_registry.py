"""The one place that names the systems, and a seventeenth one that needs its class, its configurations and an entry."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import cli
import vlm
import vlm.systems
from tests.commands.test_cli import World
from tests.support.systems import SYSTEMS as TINY
from tests.support.systems import llava_1_5
from vlm import registry
from vlm.checkpoints.published.family import get_family
from vlm.recipes import print_systems, systems
from vlm.registry import SYSTEMS, System, recipe_folder
from vlm.systems import LLaVA15


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_named_once_and_complete(name: str) -> None:
    module, _, kind = SYSTEMS[name].class_path.rpartition(".")
    assert (module, getattr(importlib.import_module(module), kind).system) == ("vlm.systems", name)
    for file in ("recipe.yaml", "model.yaml", "demo/model.yaml"):
        assert (recipe_folder(name) / file).is_file()
    assert (
        yaml.safe_load((recipe_folder(name) / "model.yaml").read_text())["model"]["class_path"]
        == SYSTEMS[name].class_path
    )
    assert name in TINY, "the contract test has to know it"
    if SYSTEMS[name].family is not None:
        assert get_family(name).system == name


def test_nothing_is_left_out() -> None:
    assert {path.rpartition(".")[2] for path in (system.class_path for system in SYSTEMS.values())} == {
        *vlm.systems.__all__
    }
    assert [path.parent.name for path in sorted(registry.CONFIGS.glob("*/recipe.yaml"))] == systems() == sorted(SYSTEMS)


class Seventeenth(LLaVA15):
    """The toy: images are cropped to 28 px."""

    system = "seventeenth"


def seventeenth(**changes) -> Seventeenth:
    return Seventeenth(**(llava_1_5().arguments | {"image": "crop"} | changes))


ENTRY = replace(TINY["llava_1_5"], make=seventeenth)
"""All that the contract test is told."""


def write_configs(folder: Path) -> None:
    """A recipe of one stage, at paper size and at laptop size."""
    llava = registry.CONFIGS / "llava_1_5"
    model = yaml.safe_load((llava / "model.yaml").read_text())
    model["model"]["class_path"] = f"{__name__}.Seventeenth"
    recipe = {"system": "seventeenth", "stages": {"1_align": {"configs": ["model.yaml", "1_align.yaml"]}}}
    (folder / "demo").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "model.yaml").write_text(yaml.safe_dump(model))
    (folder / "1_align.yaml").write_text((llava / "1_align.yaml").read_text())
    for name in ("model.yaml", "1_align.yaml"):
        (folder / "demo" / name).write_text((llava / "demo" / name).read_text())


def test_a_seventeenth_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is listed, its recipe is found by its name, its stage trains, and what it leaves opens as what it was."""
    write_configs(tmp_path / "configs" / "seventeenth")
    monkeypatch.setattr(registry, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(registry, "SYSTEMS", {"seventeenth": System(f"{__name__}.Seventeenth")})
    assert print_systems() == 0
    assert capsys.readouterr().out.split() == ["system", "stages", "seventeenth", "1_align"]
    assert cli.main(["fit", "--recipe", "seventeenth", "--demo", "--dry-run"]) == 0
    assert "configs/seventeenth/demo/1_align.yaml" in capsys.readouterr().out
    monkeypatch.setattr("tests.commands.test_cli.CONFIGS", tmp_path / "configs" / "seventeenth")
    world = World(tmp_path)
    assert world.fit("--trainer.max_steps=1") == 0
    assert vlm.load(world.run).system == "seventeenth"
    assert json.loads((world.run / "artefact" / "stage.json").read_text())["system"] == "seventeenth"
    assert ENTRY.make().codec.transform.mode == "crop"
