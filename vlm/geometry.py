"""Places in an image, and where they come to lie when the image is cut, padded, squashed or mirrored.

A place is a share of the picture's width and height: (0, 0) is the outer corner at the top left, (1, 1) the one at the
bottom right, whatever the number of pixels.
"""

from collections.abc import Iterable
from dataclasses import dataclass

Point = tuple[float, float]
Points = tuple[Point, ...]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Placement:
    """Where an image lies in a view of it, both in shares: `scale * place + shift` along each axis.

    A negative scale mirrors.
    """

    scale_x: float = 1.0
    shift_x: float = 0.0
    scale_y: float = 1.0
    shift_y: float = 0.0

    def __call__(self, points: Iterable[Point]) -> Points:
        return tuple((self.scale_x * x + self.shift_x, self.scale_y * y + self.shift_y) for x, y in points)

    def then(self, after: "Placement") -> "Placement":
        """This one, and `after` applied to the view that it makes."""
        return Placement(
            after.scale_x * self.scale_x,
            after.scale_x * self.shift_x + after.shift_x,
            after.scale_y * self.scale_y,
            after.scale_y * self.shift_y + after.shift_y,
        )

    def inverse(self) -> "Placement":
        """From the view back to the image."""
        return Placement(1 / self.scale_x, -self.shift_x / self.scale_x, 1 / self.scale_y, -self.shift_y / self.scale_y)

    @classmethod
    def of_crop(cls, crop: Box, *, size: tuple[float, float]) -> "Placement":
        """A view that shows `crop` (pixels, may reach beyond the image) of an image of `size`."""
        (left, top, right, bottom), (width, height) = crop, size
        across, down = right - left, bottom - top
        return cls(width / across, -left / across, height / down, -top / down)


MIRRORED = Placement(scale_x=-1.0, shift_x=1.0)


@dataclass(frozen=True)
class View:
    """What a system sees of an image, and the frame that its places count from.

    Attributes:
        placement: of the image in the frame.
        size: of the frame in pixels, width and height; of the image that it shows, not of what is added around it.
        shown: placement of the image in the first view, where that is not the frame.
    """

    placement: Placement
    size: tuple[float, float]
    shown: Placement | None = None

    def in_picture(self, box: Box) -> Box:
        """A box of the frame, in shares of the image."""
        return bounds(self.placement.inverse()(corners(box)))

    def in_view(self, box: Box) -> Box:
        """A box of the frame, in shares of the first view."""
        return box if self.shown is None else bounds(self.shown(corners(self.in_picture(box))))


def corners(box: Box) -> Points:
    """Top left and bottom right."""
    left, top, right, bottom = box
    return (left, top), (right, bottom)


def bounds(points: Iterable[Point]) -> Box:
    """The smallest box around some points."""
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def clipped(points: Iterable[Point]) -> Points:
    """The points, moved to the nearest edge where they lie outside."""
    return tuple((min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)) for x, y in points)
