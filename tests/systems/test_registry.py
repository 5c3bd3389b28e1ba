"""The one place that names the systems."""

import importlib

import pytest
import yaml

import vlm.systems
from tests.support.systems import SYSTEMS as TINY
from vlm import registry
from vlm.checkpoints.published.family import get_family
from vlm.recipes import find_recipe, load_recipe, systems
from vlm.registry import SYSTEMS, recipe_folder


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_named_once_and_complete(name: str) -> None:
    for path in SYSTEMS[name].class_paths:
        module, _, kind = path.rpartition(".")
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
    assert {path.rpartition(".")[2] for system in SYSTEMS.values() for path in system.class_paths} == {
        *vlm.systems.__all__
    }
    assert systems() == sorted(SYSTEMS)
    others = {path.parent.name for path in registry.CONFIGS.glob("*/recipe.yaml")} - SYSTEMS.keys()
    assert others == {"blip_capfilt"}, "a recipe of no system is named by its folder"
    assert load_recipe(find_recipe("blip_capfilt")).system == "blip_capfilt"
