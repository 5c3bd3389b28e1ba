"""Which recipes there are."""

from collections.abc import Sequence
from pathlib import Path

from vlm import registry
from vlm.errors import UserError
from vlm.recipes.reading import load_recipe


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
    if (own := registry.recipe_folder(name) / "recipe.yaml").is_file():
        return own
    if not registry.CONFIGS.is_dir():
        raise UserError(
            f"--recipe {name}: the recipes live in the folder configs/ of the repository, which an installed package "
            "does not have; give the path of a recipe.yaml"
        )
    raise UserError(f"--recipe {name}: no such system; choose one of {', '.join(systems())} or give a recipe.yaml")


def systems() -> list[str]:
    """Names of the systems that have a recipe, sorted."""
    return sorted(name for name in registry.SYSTEMS if (registry.recipe_folder(name) / "recipe.yaml").is_file())


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
    recipes = [load_recipe(registry.recipe_folder(name) / "recipe.yaml") for name in names]
    width = max(len("system"), *(len(recipe.system) for recipe in recipes))
    print(f"{'system':<{width}}  stages")
    for recipe in recipes:
        print(f"{recipe.system:<{width}}  {', '.join(node.name for node in recipe.nodes)}")
    return 0
