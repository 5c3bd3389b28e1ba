"""How far two boxes agree."""

from vlm.geometry import Box


def iou(one: Box, other: Box) -> float:
    """Shared area over joint area, in [0, 1]; 0 for a box whose corners are swapped or that has no area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0 or not (_area(one) and _area(other)):
        return 0.0
    shared = width * height
    return shared / (_area(one) + _area(other) - shared)


def _area(box: Box) -> float:
    left, top, right, bottom = box
    return max(0.0, right - left) * max(0.0, bottom - top)
