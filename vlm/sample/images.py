"""Images that are not decoded yet."""

import io
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlm.errors import quoted, shorten
from vlm.sample.paths import is_remote, located

if TYPE_CHECKING:
    from vlm.sample.parts import Sample

MAX_PIXELS = 100_000_000
"""Default limit on decode: a 100-megapixel image is a mistake or an attack."""
_MAX_PATH, _MAX_NAME = 4096, 255  # bytes, on every common file system
_LIGHT = 1 << 17
_CONTENT = ("data:", "/9j/", "iVBORw0KGgo")  # how a URL of data, and JPEG and PNG in base64 begin


@dataclass(frozen=True)
class ImageFile:
    """An image that is not decoded yet: a file, or bytes out of a shard or a parquet row; or one from memory."""

    name: str
    path: Path | None = None
    data: bytes | None = None
    max_pixels: int = MAX_PIXELS
    image: Image.Image | None = None
    _size: tuple[int, int] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def is_light(self) -> bool:
        """Whether it can go along with its sample: it says where its bytes are, or they are few (128 KiB)."""
        return self.image is None and len(self.data or b"") <= _LIGHT

    def size(self, sample: "Sample") -> tuple[int, int]:
        """(width, height), read from the header alone, and once: several steps of an encoding ask."""
        if self._size is None:
            with self._open(sample) as image:
                object.__setattr__(self, "_size", image.size)
        assert self._size is not None
        return self._size

    def read(self, sample: "Sample") -> Image.Image:
        """The image, decoded, in RGB, as the published pipelines have it: `Image.open(...).convert("RGB")`.

        So transparency is dropped, of an animation the first frame is taken, and a rotation that a camera noted in
        EXIF is not applied. 16 bits of grey become the upper 8, where that conversion would cut them off to white.

        Raises:
            SampleError: missing, truncated, not an image, larger than `max_pixels`, or with pixels of 32 bits, whose
                range nobody knows.
        """
        with self._open(sample) as image, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Palette images with Transparency")  # dropped, as said above
            if image.mode in ("I", "F"):
                raise sample.error(
                    f"image {quoted(self.name)} has pixels of 32 bits; bring them to 0..255 and save 8 bits",
                    kind="image",
                )
            try:
                if image.mode.startswith("I;16"):
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return image.convert("RGB")
            except (OSError, SyntaxError, ValueError) as error:
                raise sample.error(
                    f"image {quoted(self.name)} cannot be decoded ({error}); replace or remove it", kind="image"
                ) from error

    def _open(self, sample: "Sample") -> Image.Image:
        try:
            with warnings.catch_warnings():
                # our own limit below says the same with the sample's name
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                if self.image is not None:
                    image = self.image.copy()  # the caller's stays open
                elif self.path is not None and is_remote(self.path):
                    image = Image.open(io.BytesIO(self.path.read_bytes()))
                else:
                    image = Image.open(self.path if self.path is not None else io.BytesIO(self.data or b""))
        except FileNotFoundError as error:
            remedy = "correct the path or image_root"
            if "\\" in self.name:
                remedy = "write / for \\ in paths"
            elif "://" in self.name:
                remedy = "download it and give its path"
            raise sample.error(
                f"image {quoted(self.name)} does not exist (looked at {shorten(str(self.path), 200)}); {remedy}",
                kind="image",
            ) from error
        except Image.DecompressionBombError as error:
            raise sample.error(f"image {quoted(self.name)} is too large ({error}); shrink it", kind="image") from error
        except (UnidentifiedImageError, OSError, ValueError) as error:
            # of bytes PIL names the address, which differs from start to start
            why = getattr(error, "strerror", None) or shorten(str(error).partition(" <_io.")[0])
            raise sample.error(
                f"image {quoted(self.name)} is not a readable picture ({why}); save it as PNG or JPEG",
                kind="image",
            ) from error
        width, height = image.size
        if width * height > self.max_pixels:
            image.close()
            raise sample.error(
                f"image {quoted(self.name)} has {width}x{height} pixels, over the limit of {self.max_pixels:,}; "
                "shrink it or raise max_pixels",
                kind="image",
            )
        return image


def parse_image(entry: Any, *, error, image_root: str | Path | None, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """A path, bytes or an image of PIL as an `ImageFile`; `error` makes the exception for a bad one.

    A finished one stays as it is.
    """
    if isinstance(entry, ImageFile):
        return entry
    if isinstance(entry, Image.Image):
        return ImageFile(name="<image>", image=entry, max_pixels=max_pixels)
    if isinstance(entry, Path):
        entry = str(entry)
    if isinstance(entry, bytes):
        return ImageFile(name="<bytes>", data=entry, max_pixels=max_pixels)
    if not isinstance(entry, str) or not entry:
        raise error(f"an image must be a path, found {quoted(entry)}", kind="image")
    if fault := _no_path(entry):
        raise error(f"image {quoted(entry, 60)} {fault}", kind="image")
    if image_root is None:
        return ImageFile(name=entry, path=Path(entry), max_pixels=max_pixels)
    root = located(image_root)
    outside = f"image {quoted(entry)} lies outside the image root {root}; set image_root to a folder that holds it"
    if is_remote(root):
        if ".." in entry.split("/") or entry.startswith("/") or "://" in entry:
            raise error(outside, kind="image")
        return ImageFile(name=entry, path=root / entry, max_pixels=max_pixels)
    # as it is written: a link inside of the root is the user's own, wherever it leads (a hub's cache is full of them)
    root = Path(os.path.abspath(root))
    path = Path(os.path.normpath(root / entry))
    if not path.is_relative_to(root) and not path.is_relative_to(root.resolve()):
        raise error(outside, kind="image")
    return ImageFile(name=entry, path=path, max_pixels=max_pixels)


def _no_path(entry: str) -> str | None:
    """Why a text can be no path, whatever is on the disk."""
    try:
        encoded = os.fsencode(entry)
    except UnicodeEncodeError:
        encoded = b"\0"
    if entry.startswith(_CONTENT) or len(encoded) > _MAX_PATH or max(map(len, encoded.split(b"/"))) > _MAX_NAME:
        return "is no path but the image itself; save it as a file and give its path"
    return "has a character that no path has; correct it" if b"\0" in encoded else None
