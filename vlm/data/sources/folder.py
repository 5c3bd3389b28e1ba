"""Folders of images with captions."""

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.sources.base import JsonSource, Source
from vlm.errors import SampleError, UserError, quoted
from vlm.sample import MAX_PIXELS, Sample, parse_sample
from vlm.sample.keys import SUFFIXES

METADATA = "metadata.jsonl"


class ImageFolder(Source):
    """Pictures whose captions lie in `metadata.jsonl`, or each in a text file beside its image.

    ::

        metadata.jsonl      {"file_name": "a/boat.jpg", "text": "A boat."} a line, as in Hugging Face's imagefolder
        a/boat.jpg

        a/boat.jpg          without `metadata.jsonl`: all images in the folder and below it
        a/boat.txt          "A boat."

    Names of files and folders are never taken for captions. Where there is a `metadata.jsonl`, it alone says what
    belongs to the data; other images are left alone.

    Args:
        path: the folder.
        caption: key of the caption in `metadata.jsonl`.
        prompt: the user's text beside the image.
        name: by default the folder's name.
        max_pixels: limit on decode.

    Raises:
        UserError: at first use; no such folder, no images, or images without captions.
    """

    def __init__(
        self,
        path: str | Path,
        caption: str = "text",
        prompt: str = "",
        name: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.path = Path(path)
        self.caption = caption
        self.prompt = prompt
        self.name = name if name is not None else self.path.name
        self.max_pixels = max_pixels

    @cached_property
    def _captions(self) -> "_Listed | _Beside":
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such folder; check the path")
        if (self.path / METADATA).is_file():
            file = self.path / METADATA
            return _Listed(file, caption=self.caption, prompt=self.prompt, max_pixels=self.max_pixels)
        return _Beside(self.path, prompt=self.prompt, max_pixels=self.max_pixels)

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int) -> Sample:
        return self._captions[index]

    def has_image(self, index: int) -> bool:
        return 0 <= index < len(self)

    def image_mask(self) -> np.ndarray:
        return np.ones(len(self), dtype=bool)


class _Listed(JsonSource):
    """The lines of a `metadata.jsonl`."""

    reader = "ImageFolder"

    def __init__(self, path: Path, *, caption: str, prompt: str, max_pixels: int) -> None:
        super().__init__(path, max_pixels=max_pixels)
        self.caption = caption
        self.prompt = prompt

    @staticmethod
    def _flag(record: Mapping[str, Any]) -> bool:
        return True

    def _schema(self, record: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        identity = record.get("id", record.get("file_name", index))
        for key in ("file_name", self.caption):
            if not isinstance(record.get(key), str):
                raise SampleError(
                    f"line {index + 1}: key {key!r} must be a string, found {quoted(record.get(key))}; "
                    f"the line has the keys {sorted(record)}",
                    sample_id=str(identity),
                    source=str(self.path),
                )
        return _record(str(identity), record["file_name"], record[self.caption], self.prompt)


def files_below(folder: Path) -> Iterator[Path]:
    """All files, those in linked folders too, each folder once; without what macOS leaves beside files (`._a.jpg`)."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in sorted(folders) if os.path.realpath(os.path.join(place, name)) not in seen]
        yield from (Path(place, name) for name in names if not name.startswith("._"))


class _Beside:
    """Pictures with a text file beside each."""

    def __init__(self, folder: Path, *, prompt: str, max_pixels: int) -> None:
        self.folder = folder
        self.prompt = prompt
        self.max_pixels = max_pixels
        files = (file.relative_to(folder) for file in files_below(folder) if file.suffix.lower() in SUFFIXES)
        self.files = sorted(file.as_posix() for file in files)
        if not self.files:
            raise UserError(f"{folder}: holds no pictures ({', '.join(sorted(SUFFIXES))}); check the path")
        bare = [file for file in self.files if not (folder / file).with_suffix(".txt").is_file()]
        if bare:
            raise UserError(
                f"{folder}: {len(bare)} of {len(self.files)} pictures have no caption, such as {bare[0]!r}; put "
                f"{Path(bare[0]).with_suffix('.txt').as_posix()!r} beside it, or list all pictures in {METADATA}"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder} has {len(self)} pictures, asked for number {index}")
        file = self.files[index]
        text = (self.folder / file).with_suffix(".txt")
        try:
            caption = text.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SampleError(
                f"caption {text.name!r} cannot be read ({error}); save it as UTF-8",
                sample_id=file,
                source=str(self.folder),
            ) from error
        return parse_sample(
            _record(file, file, caption, self.prompt),
            source=str(self.folder),
            image_root=self.folder,
            max_pixels=self.max_pixels,
        )


def _record(identity: str, image: str, caption: str, prompt: str) -> dict[str, Any]:
    text = [{"type": "text", "text": f"\n{prompt}"}] if prompt else []
    return {
        "id": identity,
        "images": [image],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, *text]},
            {"role": "assistant", "content": caption},
        ],
    }
