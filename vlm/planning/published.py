"""What is published about language models, folders and data that are not on this disk."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml


@functools.cache
def _table() -> dict[str, Any]:
    return yaml.safe_load(files("vlm.planning").joinpath("published.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class KnownModel:
    """A published language model.

    Attributes:
        config: entries of its `config.json`.
        stored: dtype of its files.
    """

    config: Mapping[str, Any]
    stored: str


def known_model(path: str) -> KnownModel | None:
    """The language model of a folder or hub id, by its last word."""
    entry = _table()["language_models"].get(path.rstrip("/").rpartition("/")[2])
    return None if entry is None else KnownModel(**entry)


def known_models() -> list[str]:
    return sorted(_table()["language_models"])


def whole_folder(path: str) -> int | None:
    """Parameters of a published folder that holds more than what is read of it."""
    return _table()["whole_folders"].get(path.rstrip("/").rpartition("/")[2])


@dataclass(frozen=True)
class TypicalData:
    """Samples of a published stage.

    Attributes:
        question: tokens of text that are asked, without those of images and of the template.
        answer: the same of what is trained.
        samples: of an epoch; None: not known.
        source: who says how many samples there are.
        without_image: share of the samples that have no image.
        images: of each of the others.
        longest: tokens of the longest sample, images and template among them; 0: as the others.
        size: width and height of an image.
    """

    question: int
    answer: int
    samples: int | None = None
    source: str | None = None
    without_image: float = 0.0
    images: int = 1
    longest: int = 0
    size: tuple[int, int] = (640, 480)


def typical_data(system: str, stage: str) -> TypicalData:
    """What is known of a stage's data; typical values where nothing is."""
    table = _table()
    entry = table["data"].get(f"{system}/{stage}", table["unknown"])
    return TypicalData(**entry, size=tuple(table["image"]))
