"""Every stage of a published recipe with one command: what the graph says, and a process for each node of it."""

from vlm.recipes.catalogue import find_recipe, print_systems, systems
from vlm.recipes.graph import Procedure, Recipe, StageRef, TrainingStage
from vlm.recipes.reading import load_recipe
from vlm.recipes.run import run_recipe

__all__ = [
    "Procedure",
    "Recipe",
    "StageRef",
    "TrainingStage",
    "find_recipe",
    "load_recipe",
    "print_systems",
    "run_recipe",
    "systems",
]
