"""Records straight from COCO: `captions_*.json`, and `instances_*.json` for the boxes."""

import json
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vlm.errors import SampleError, UserError
from vlm.procedures.instruct.records import Item, distinct
from vlm.procedures.instruct.task_specs import Box
from vlm.sample import parse_image

_Pixels = tuple[str, tuple[float, float, float, float]]
"""Name of a category, and left, top, width, height."""


def read_coco(captions: str | Path, instances: str | Path | None, *, image_root: str | Path | None) -> list[Item]:
    """The pictures of a file of captions, in its order; ids are COCO's.

    Boxes become shares of the picture's size. Those of crowds and those without area are left out: the first are no
    single object, the second are faults of the annotation. The files are read whole, as they are one object each.

    Args:
        instances: None for no boxes. It may hold other pictures as well.
        image_root: folder of the pictures; by default that of `captions`.

    Raises:
        UserError: not such files, or a picture without a caption.
    """
    file = _File(captions, "images", "annotations")
    told: dict[int, list[str]] = defaultdict(list)
    for entry in file.lists["annotations"]:
        told[file.number(entry, "image_id")].append(" ".join(file.text(entry, "caption").split()))
    boxes = _boxes(instances) if instances is not None else {}
    root = Path(captions).parent if image_root is None else Path(image_root)
    items = []
    for picture in file.lists["images"]:
        number, image = file.number(picture, "id"), file.text(picture, "file_name")

        error = partial(SampleError, sample_id=str(number), source=str(captions))
        sentences = tuple(filter(None, told[number]))
        if not sentences:
            raise error("the picture has no caption; take it out of 'images'")
        size = file.number(picture, "width"), file.number(picture, "height")
        if min(size) < 1:
            raise error(f"'width' and 'height' must be at least 1, found {size}")
        items.append(
            Item(
                id=str(number),
                image=image,
                captions=sentences,
                boxes=tuple(box for pixels in boxes.get(number, ()) for box in _shares(pixels, *size)),
                file=parse_image(image, error=error, image_root=root),
                source=str(captions),
            )
        )
    return distinct(items, str(captions))


def _boxes(path: str | Path) -> dict[int, list[_Pixels]]:
    file = _File(path, "annotations", "categories")
    names = {file.number(entry, "id"): file.text(entry, "name") for entry in file.lists["categories"]}
    found: dict[int, list[_Pixels]] = defaultdict(list)
    for entry in file.lists["annotations"]:
        category, box = file.number(entry, "category_id"), entry.get("bbox")
        if category not in names:
            raise file.error(entry, f"category {category} is not in 'categories'")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) for x in box):
            raise file.error(entry, f"'bbox' must be [left, top, width, height], found {box!r}")
        if not entry.get("iscrowd"):
            left, top, width, height = box
            found[file.number(entry, "image_id")].append((names[category], (left, top, width, height)))
    return found


def _shares(pixels: _Pixels, width: int, height: int) -> list[Box]:
    """The box within the picture, none where nothing of it is."""
    name, (x, y, w, h) = pixels
    left, right = (min(1.0, max(0.0, value / width)) for value in (x, x + w))
    top, bottom = (min(1.0, max(0.0, value / height)) for value in (y, y + h))
    return [Box(name, left, top, right, bottom)] if left < right and top < bottom else []


class _File:
    """One of COCO's JSON files; every error names it and the entry."""

    def __init__(self, path: str | Path, *keys: str) -> None:
        self.path = path
        try:
            data = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
        except ValueError as error:
            raise UserError(f"{path}: broken JSON ({error}); fetch it again") from error
        for key in keys:
            found = data.get(key) if isinstance(data, dict) else None
            if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
                raise UserError(f"{path}: holds no list {key!r}; give COCO's captions_*.json and instances_*.json")
        self.lists: dict[str, list[dict[str, Any]]] = {key: data[key] for key in keys}

    def error(self, entry: Mapping[str, Any], message: str) -> SampleError:
        return SampleError(message, sample_id=str(entry.get("id")), source=str(self.path))

    def number(self, entry: Mapping[str, Any], key: str) -> int:
        value = entry.get(key)
        if not isinstance(value, int):
            raise self.error(entry, f"{key!r} must be a whole number, found {value!r}")
        return value

    def text(self, entry: Mapping[str, Any], key: str) -> str:
        value = entry.get(key)
        if not isinstance(value, str):
            raise self.error(entry, f"{key!r} must be a text, found {value!r}")
        return value
