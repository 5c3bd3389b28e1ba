"""The parts of a sample."""

from dataclasses import dataclass
from typing import Literal

from vlm.errors import Fault, SampleError
from vlm.geometry import Points
from vlm.sample.images import ImageFile

DOCUMENT = "document"


ROLES = ("system", "user", "assistant", DOCUMENT)


@dataclass(frozen=True)
class ImagePart:
    """Stands where an image is; takes the next entry of `Sample.images`."""


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class RefPart:
    """A phrase that the regions behind it belong to."""

    text: str


RegionKind = Literal["box", "quad", "point"]


RegionUnit = Literal["share", "pixel", "square"]


@dataclass(frozen=True)
class RegionPart:
    """A place in an image.

    Attributes:
        kind: box, quad or point.
        points: top left and bottom right of a box, the four corners of a quad, or the one point.
        image: index into `Sample.images`.
        unit: of the points.
    """

    kind: RegionKind
    points: Points
    image: int = 0
    unit: RegionUnit = "share"

    def shares(self, width: int, height: int) -> Points:
        """The points in shares of the stored image, given its size in pixels; those beyond its edge too."""
        if self.unit == "share":
            return self.points
        side = max(width, height)
        if self.unit == "pixel":
            return tuple((x / width, y / height) for x, y in self.points)
        shift_x, shift_y = (side - width) / 2, (side - height) / 2
        return tuple(((x * side - shift_x) / width, (y * side - shift_y) / height) for x, y in self.points)


Part = ImagePart | TextPart | RefPart | RegionPart


Places = Literal["unnamed", "sides", "regions"]
"""What a sample says about where things are in its pictures: nothing, left or right, or regions."""


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        begun: of the last one, the assistant's: an answer that is only begun, for `generate` to go on with.
        weight: of the assistant's: factor on the loss of its tokens; 0: it is not trained.
    """

    role: str
    content: tuple[Part, ...]
    begun: bool = False
    weight: float = 1.0


@dataclass(frozen=True)
class Sample:
    """One parsed sample. Build it with `parse_sample`, which checks everything that can be wrong with it.

    `resolution` is not part of a record: the data module says at which resolution the images of a data set are shown
    (`vlm.data.wrappers.resolution`), in words of the system's codec; None leaves it to the system. Neither are
    `instructions`: how its question may be put, of which one is taken before it is encoded; the first where nothing is
    drawn (`vlm.data.wrappers.instructed`).
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageFile, ...] = ()
    source: str = "<memory>"
    task: str | None = None
    group: str | None = None
    answers: tuple[tuple[str, float], ...] = ()
    choices: tuple[str, ...] = ()
    resolution: str | None = None
    instructions: tuple[str, ...] = ()

    def error(self, message: str, *, kind: Fault | None = None) -> SampleError:
        """A `SampleError` that names this sample and its file."""
        return SampleError(message, sample_id=self.id, source=self.source, kind=kind)
