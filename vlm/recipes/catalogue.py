"""Which recipes there are."""

from collections.abc import Sequence
from pathlib import Path

from vlm.errors import UserError
from vlm.recipes.graph import load_recipe

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
"""The recipes of a checkout. An installed package has none: there a recipe is named by its file."""


def find_recipe(name: str) -> Path:
    """The file of a recipe given by the name of its system, its file, or the folder of its file.

    Raises:
        UserError: there is none.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"--recipe {name}: no such file")
        return path
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if (CONFIGS / name / "recipe.yaml").is_file():
        return CONFIGS / name / "recipe.yaml"
    if not CONFIGS.is_dir():
        raise UserError(
            f"--recipe {name}: the recipes live in the folder configs/ of the repository, which an installed package "
            "does not have; give the path of a recipe.yaml"
        )
    raise UserError(f"--recipe {name}: no such system; choose one of {', '.join(systems())} or give a recipe.yaml")


def systems() -> list[str]:
    """Names of the systems that have a recipe, sorted."""
    return sorted(path.parent.name for path in CONFIGS.glob("*/recipe.yaml"))


def print_systems(arguments: Sequence[str] = ()) -> int:
    """`vlm systems`: one line per system with its stages in order.

    Raises:
        UserError: a recipe is wrong, or there are none beside the package, or there are arguments.
    """
    if arguments:
        raise UserError(f"vlm systems takes no arguments, found {' '.join(arguments)}")
    names = systems()
    if not names:
        raise UserError("no recipes here: they live in the folder configs/ of the repository, beside vlm/")
    recipes = [load_recipe(CONFIGS / name / "recipe.yaml") for name in names]
    width = max(len("system"), *(len(recipe.system) for recipe in recipes))
    print(f"{'system':<{width}}  stages")
    for recipe in recipes:
        print(f"{recipe.system:<{width}}  {', '.join(node.name for node in recipe.nodes)}")
    return 0
