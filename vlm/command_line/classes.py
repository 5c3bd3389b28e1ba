"""Short names of classes: `LlavaJson` for `vlm.data.LlavaJson`."""

from importlib import import_module

PACKAGES = (
    *("vlm.systems", "vlm.data", "vlm.vision", "vlm.connectors", "vlm.language", "vlm.prompts"),
    *("vlm.metrics", "vlm.evaluation"),
)
"""Packages whose classes stand in configurations."""


def import_classes() -> None:
    """Imports what may be named: the configuration parser knows a class by its last name once it is imported."""
    for package in map(import_module, PACKAGES):
        for name in package.__all__:
            getattr(package, name)
