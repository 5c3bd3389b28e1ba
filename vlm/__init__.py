"""Sixteen published vision-language systems and every training stage of each.

Importing this package is light: no torch. It installs an import hook that repairs torchvision at its first import
on a CPU-only torch (see `_torchvision_hook`), so import `vlm` before lightning, timm or torchvision.

`docs/python.md` has it in Python and in notebooks.
"""

from importlib import import_module

from vlm import _torchvision_hook

_torchvision_hook.install()

__version__ = "0.1.0"

_ROOMS = ("connectors", "data", "language", "prompts", "schedules", "stages", "systems", "vision")

__all__ = ["load", *_ROOMS]


def __getattr__(name: str):
    if name == "load":  # imports torch, so only on first use
        return import_module("vlm.loading").load
    if name in _ROOMS:
        return import_module(f"vlm.{name}")
    raise AttributeError(f"module 'vlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
