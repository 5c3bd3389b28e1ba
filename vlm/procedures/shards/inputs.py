"""Images with their texts in shards: tar files as they are; lists and folders cut into pieces."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm.data.sources.folder import files_below
from vlm.data.sources.json_records import RecordFile
from vlm.data.sources.webdataset import MemberImage, WebDataset, find_members
from vlm.errors import SampleError, UserError, quoted
from vlm.sample import MAX_PIXELS, ImageFile, ImagePart, Message, Sample, TextPart
from vlm.sample.keys import SUFFIXES

SHARD_SIZE = 1000
_IMAGE_KEYS = ("image", "file_name")
_LISTS = (".json", ".jsonl")


@dataclass(frozen=True)
class Pair:
    """An image and what is said about it.

    Attributes:
        id: of its own among all shards: the shard's file and the key in it.
        source: file that it comes from.
        texts: as they came with the image; none where there are none.
        belongs: whether these texts belong to the image, where somebody knows.
    """

    id: str
    image: ImageFile
    source: str
    texts: tuple[str, ...] = ()
    belongs: bool | None = None

    def sample(self, *texts: str, prompt: str = "") -> Sample:
        """The image as a system is asked about it, or with the texts that are compared with it."""
        asked = Message("user", (ImagePart(), *([TextPart(prompt)] if prompt else [])))
        said = tuple(Message("assistant", (TextPart(text),)) for text in texts[:1])
        answers = tuple((text, 1.0) for text in texts)
        return Sample(self.id, (asked, *said), (self.image,), source=self.source, task="caption", answers=answers)


@dataclass(frozen=True)
class Shard:
    """A piece of the input, which one file is made of.

    Attributes:
        name: of that file, without ending.
        path: tar file, list or folder.
        first: number of its first record there.
        count: how many; None: all, of a tar.
        image_root: folder that the images of a list start at.
        caption_key: where a record or `KEY.json` has its texts; `txt` is `KEY.txt` of a tar.
        truth_key: of a record of a list: whether its texts belong to its image.
    """

    name: str
    path: Path
    first: int = 0
    count: int | None = None
    image_root: Path | None = None
    caption_key: str = "caption"
    truth_key: str | None = None

    def identity(self) -> dict[str, Any]:
        """By which it is known again; a tar or list that was written anew has another size."""
        size = None if self.path.is_dir() else self.path.stat().st_size
        return {"path": str(self.path), "first": self.first, "count": self.count, "bytes": size}

    def pairs(self) -> Iterator[Pair | SampleError]:
        """In their order; one that cannot be read as its error. Images are not decoded.

        Raises:
            UserError: the file cannot be read at all.
        """
        if self.count is None:
            yield from self._members()
            return
        entries = _files(self.path) if self.path.is_dir() else _records(self.path)
        for at in range(self.first, self.first + self.count):
            try:
                entry = entries[at]
                yield self._file(entry) if isinstance(entry, str) else self._record(entry, at)
            except SampleError as error:
                yield error

    def _members(self) -> Iterator[Pair | SampleError]:
        times: Counter[str] = Counter()  # in tars that were joined a key stands twice
        for key, members in find_members(self.path):
            place = next((members[suffix] for suffix in members if suffix in SUFFIXES), None)
            times[key] += 1
            identity = f"{self.name}/{key}" + (f"~{times[key]}" if times[key] > 1 else "")
            if place is None:
                yield self._error(identity, "has no image beside its text; leave it out")
            else:
                start, length = place
                image = MemberImage(
                    name=f"image of {identity}", path=self.path, max_pixels=MAX_PIXELS, start=start, length=length
                )
                try:
                    yield Pair(identity, image, str(self.path), self._texts_beside(identity, members))
                except SampleError as error:
                    yield error

    def _texts_beside(self, identity: str, members: dict[str, tuple[int, int]]) -> tuple[str, ...]:
        place = members.get(".txt" if self.caption_key == "txt" else ".json")
        if place is None:
            return ()
        with self.path.open("rb") as file:
            file.seek(place[0])
            content = file.read(place[1])
        try:
            if self.caption_key == "txt":
                return _texts(content.decode())
            return _texts(json.loads(content).get(self.caption_key))
        except (ValueError, AttributeError, RecursionError) as error:
            raise self._error(identity, f"its text cannot be read ({error}); write the shard again in UTF-8") from error

    def _file(self, name: str) -> Pair:
        text = (self.path / name).with_suffix(".txt")
        try:
            texts = _texts(text.read_text(encoding="utf-8-sig")) if text.is_file() else ()
        except (OSError, UnicodeDecodeError) as error:
            raise self._error(name, f"{text.name} cannot be read ({error}); save it as UTF-8") from error
        return Pair(name, ImageFile(name=name, path=self.path / name), str(self.path), texts)

    def _record(self, record: dict[str, Any], at: int) -> Pair:
        image = next((record[key] for key in _IMAGE_KEYS if isinstance(record.get(key), str)), None)
        identity = str(record.get("id", at))
        if not image:
            found = quoted(sorted(map(str, record)))
            raise self._error(identity, f"'image' must be the path of one image, found keys {found}")
        try:
            texts = _texts(record.get(self.caption_key))
        except ValueError as error:
            raise self._error(identity, f"{self.caption_key!r}: {error}") from error
        belongs = None if self.truth_key is None else record.get(self.truth_key)
        if not isinstance(belongs, bool | None):
            raise self._error(identity, f"{self.truth_key!r} must be true or false, found {quoted(belongs)}")
        root = self.path.parent if self.image_root is None else self.image_root
        # by its place: several captions of one image may stand apart under one id
        return Pair(f"{self.path.stem}/{at}", ImageFile(name=image, path=root / image), str(self.path), texts, belongs)

    def _error(self, identity: str, message: str) -> SampleError:
        return SampleError(message, sample_id=identity, source=str(self.path))


def find_shards(
    paths: Sequence[str | Path],
    *,
    shard_size: int = SHARD_SIZE,
    image_root: Path | None = None,
    caption_key: str | None = None,
    truth_key: str | None = None,
) -> list[Shard]:
    """The shards of some tar files (a numbered series or a pattern, too), JSON lists, JSONL files and folders.

    Args:
        shard_size: images of a piece of a list or folder.
        caption_key: where texts are; by default `txt` of a tar and `caption` of a list.
        truth_key: of `Shard`.

    Raises:
        UserError: there are none, a file is not there, or two make the same name.
    """
    if not paths:
        raise UserError("the list of shards is empty; name tar files, lists or folders of images")
    if shard_size < 1:
        raise UserError(f"--shard_size is {shard_size}; it must be at least 1")
    shards: list[Shard] = []
    for path in map(Path, paths):
        if not path.is_dir() and path.suffix not in _LISTS:
            if path.suffix != ".tar":
                raise UserError(f"{path}: is no tar file, list (.json, .jsonl) or folder of images; check the path")
            files = WebDataset(path).files
            if missing := [file for file in files if not file.is_file()]:
                raise UserError(f"{missing[0]}: no such file; check the path")
            shards += [Shard(file.stem, file, caption_key=caption_key or "txt") for file in files]
            continue
        number = len(_files(path) if path.is_dir() else _records(path))
        if not number:
            raise UserError(f"{path}: holds no images ({', '.join(sorted(SUFFIXES))}); check the path")
        stem = path.resolve().name if path.is_dir() else path.stem
        shards += [
            Shard(
                f"{stem}-{at // shard_size:05d}",
                path,
                at,
                min(shard_size, number - at),
                image_root,
                caption_key or "caption",
                truth_key,
            )
            for at in range(0, number, shard_size)
        ]
    return join_shards(shards)


def join_shards(*parts: Sequence[Shard]) -> list[Shard]:
    """Shards of several inputs.

    Raises:
        UserError: two would make one file.
    """
    shards = [shard for part in parts for shard in part]
    names: dict[str, Path] = {}
    for shard in shards:
        if shard.name in names:
            raise UserError(
                f"{shard.path} and {names[shard.name]} would both make {shard.name}; give them to two runs, or rename "
                "one of them"
            )
        names[shard.name] = shard.path
    return shards


def _texts(value: Any) -> tuple[str, ...]:
    """One text or several, empty ones left out."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in values):
        raise ValueError(f"must be a text or a list of them, found {quoted(value)}")
    return tuple(text.strip() for text in values if text.strip())


# Both are asked for once for each piece of a file.
@lru_cache(maxsize=4)
def _records(path: Path) -> RecordFile:
    return RecordFile(path, flag=bool)


@lru_cache(maxsize=4)
def _files(folder: Path) -> list[str]:
    found = (file.relative_to(folder) for file in files_below(folder) if file.suffix.lower() in SUFFIXES)
    return sorted(os.fspath(file) for file in found)
