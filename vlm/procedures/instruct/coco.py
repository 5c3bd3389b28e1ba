"""Records straight from COCO: `captions_*.json`, and `instances_*.json` for the boxes."""

from collections import defaultdict
from pathlib import Path

from vlm.data.sources.fields import Fields, read_object
from vlm.errors import UserError
from vlm.procedures.instruct.records import Item, distinct
from vlm.procedures.instruct.task_specs import Box
from vlm.sample import parse_image

_Pixels = tuple[str, tuple[float, float, float, float]]
"""Name of a category, and left, top, width, height."""


def read_coco(captions: str | Path, instances: str | Path | None, *, image_root: str | Path | None) -> list[Item]:
    """The images of a file of captions, in its order; ids are COCO's.

    Boxes become shares of the picture's size. Those of crowds and those without area are left out: the first are no
    single object, the second are faults of the annotation. The files are read whole, as they are one object each.

    Args:
        instances: None for no boxes. It may hold other images as well.
        image_root: folder of the images; by default that of `captions`.

    Raises:
        UserError: not such files, or an image without a caption.
    """
    images, annotations = _lists(captions, "images", "annotations")
    told: dict[int, list[str]] = defaultdict(list)
    for entry in annotations:
        told[entry.number("image_id")].append(" ".join(entry.words("caption").split()))
    boxes = _boxes(instances) if instances is not None else {}
    root = Path(captions).parent if image_root is None else Path(image_root)
    items = []
    for entry in images:
        number, image = entry.number("id"), entry.text("file_name")
        sentences = tuple(filter(None, told[number]))
        if not sentences:
            raise entry.error("the image has no caption; take it out of 'images'")
        size = entry.number("width"), entry.number("height")
        if min(size) < 1:
            raise entry.error(f"'width' and 'height' must be at least 1, found {size}")
        items.append(
            Item(
                id=str(number),
                image=image,
                captions=sentences,
                boxes=tuple(box for pixels in boxes.get(number, ()) for box in _shares(pixels, *size)),
                file=parse_image(image, error=entry.error, image_root=root),
                source=str(captions),
            )
        )
    return distinct(items, str(captions))


def _boxes(path: str | Path) -> dict[int, list[_Pixels]]:
    annotations, categories = _lists(path, "annotations", "categories")
    names = {entry.number("id"): entry.text("name") for entry in categories}
    found: dict[int, list[_Pixels]] = defaultdict(list)
    for entry in annotations:
        category = entry.number("category_id")
        if category not in names:
            raise entry.error(f"category {category} is not in 'categories'")
        left, top, width, height = entry.numbers("bbox", 4)
        if not entry.has("iscrowd"):
            found[entry.number("image_id")].append((names[category], (left, top, width, height)))
    return found


def _shares(pixels: _Pixels, width: int, height: int) -> list[Box]:
    """The box within the image, none where nothing of it is."""
    name, (x, y, w, h) = pixels
    left, right = (min(1.0, max(0.0, value / width)) for value in (x, x + w))
    top, bottom = (min(1.0, max(0.0, value / height)) for value in (y, y + h))
    return [Box(name, left, top, right, bottom)] if left < right and top < bottom else []


def _lists(path: str | Path, *keys: str) -> list[list[Fields]]:
    """The lists of objects in one of COCO's JSON files."""
    data = read_object(Path(path))
    lists = []
    for key in keys:
        found = data.get(key)
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise UserError(f"{path}: holds no list {key!r}; give COCO's captions_*.json and instances_*.json")
        lists.append([Fields(entry, identity=entry.get("id"), source=path) for entry in found])
    return lists
