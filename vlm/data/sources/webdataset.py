"""WebDataset shards (LAION, COYO): tar files in which the members of one sample share a key."""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm.data.sampling.order import Blocks
from vlm.data.sources.base import Source, Tell
from vlm.data.sources.record_sources import after_image, exchange, text
from vlm.errors import SampleError, UserError, quoted, shorten
from vlm.sample import MAX_PIXELS, ImageFile, Sample, parse_sample
from vlm.sample.keys import SUFFIXES
from vlm.sample.paths import located

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


_TOGETHER = 4  # tars of a stream that are shuffled together


class _Shard(NamedTuple):
    """Attributes:

    places: int64[n, 4], position and length of the image, then of the text.
    note: what was left out.
    """

    places: np.ndarray
    note: str | None


@dataclass(frozen=True)
class Best:
    """Which pairs of a shard are kept: VILA's choice from COYO (`coyo_downloader.py`) unless said otherwise.

    Attributes:
        share: at most this share of a shard, those with the largest sums; of equal ones the first.
        above: the sum has to be larger.
        keys: numbers of `KEY.json` that are added up.
    """

    share: float = 0.2
    above: float = 0.6
    keys: Sequence[str] = ("clip_similarity_vitb32", "clip_similarity_vitl14")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"best.share must be above 0 and at most 1, found {self.share}")

    def among(self, sums: Sequence[float]) -> list[int]:
        """The places of those that stay, ascending."""
        passing = [at for at, value in enumerate(sums) if value > self.above]
        passing.sort(key=lambda at: -sums[at])
        return sorted(passing[: int(len(sums) * self.share)])


class WebDataset(Source):
    """Pictures and captions in tar files, read in place by position.

    ::

        00000.tar:  000000001.jpg  000000001.txt  000000001.json  000000002.jpg ...

    Tars are gone through once for where their members lie; after that a sample is two reads, in any order, so that a
    stopped run goes on exactly. Memory holds two numbers per member. The ranks of a training share this look, and are
    told how many samples the tars of the others hold.

    Without `streams` an epoch is shuffled as a whole, and every rank comes to read in every tar. With them the samples
    are cut into so many equal parts in the order of the files; an epoch walks through all of them side by side, a few
    tars of each shuffled together, and of every step a rank gets what comes from parts of its own. The samples of a
    step still depend on (seed, epoch, step) alone.

    Args:
        path: a tar file or URL of one, a numbered series (`shards/{00000..00099}.tar`), or a pattern (`shards/*.tar`).
        caption: where the caption is: `txt` for `KEY.txt`, or a key of `KEY.json`.
        prompt: the user's text beside the image.
        streams: parts that are read side by side, at least as many as ranks; a multiple of them gives ranks tars of
            their own. None: samples of all tars are shuffled together.
        best: leave out pairs that do not belong together, by numbers in `KEY.json`.
        name: by default the file's name without its ending.
        max_pixels: limit on decode.

    Raises:
        UserError: at first use; no such file, no tar file, a cut one, or no images with captions in it.
    """

    def __init__(
        self,
        path: str | Path,
        caption: str = "txt",
        prompt: str = "",
        best: Best | None = None,
        name: str | None = None,
        max_pixels: int = MAX_PIXELS,
        streams: int | None = None,
    ) -> None:
        if streams is not None and streams < 1:
            raise UserError(f"streams must be at least 1, found {streams}")
        self.path = located(path)
        self.streams = streams
        self._opened: dict[int, _Shard] = {}
        self.best = best
        self.caption = caption
        self.prompt = prompt
        self.name = name if name is not None else self.path.stem
        self.max_pixels = max_pixels

    @cached_property
    def files(self) -> list[Path]:
        """The shards in order."""
        pattern = str(self.path)
        if found := _RANGE.search(pattern):
            first, last = found.groups()
            numbers = range(int(first), int(last) + 1)
            return [located(pattern.replace(found.group(), str(number).zfill(len(first)))) for number in numbers]
        if any(mark in self.path.name for mark in "*?["):
            files = sorted(self.path.parent.glob(self.path.name))
            if not files:
                raise UserError(f"{self.path}: no file there; check the path")
            return files
        return [self.path]

    def _shard(self, number: int) -> "_Shard":
        """Opened when something first asks, and kept."""
        if number not in self._opened:
            self._opened[number] = self._open(self.files[number])
        return self._opened[number]

    def _open(self, file: Path) -> "_Shard":
        rows: list[tuple[int, ...]] = []
        facts: list[tuple[int, int] | None] = []
        bare: list[str] = []
        wanted = "KEY.txt" if self.caption == "txt" else "KEY.json"
        for key, members in find_members(file):
            image = next((members[suffix] for suffix in members if suffix in SUFFIXES), None)
            words = members.get(wanted.removeprefix("KEY"))
            if image is not None and words is not None:
                rows.append((*image, *words))
                facts.append(members.get(".json"))
            elif image is not None or words is not None:
                bare.append(f"{key} ({', '.join(members)})")
        note = None
        if bare:
            note = (
                f"{file}: {len(bare):,} of {len(bare) + len(rows):,} keys lack an image or {wanted} and are left "
                f"out, such as {shorten(bare[0])}; write the shard again with both under one name"
            )
        if self.best is not None:
            rows = [rows[at] for at in self.best.among(_numbers(file, facts, self.best))]
        return _Shard(np.array(rows, dtype=np.int64).reshape(-1, 4), note)

    def open_together(self, tell: Tell, *, world: int, rank: int) -> None:
        first, last = (len(self.files) * at // world for at in (rank, rank + 1))
        own: list[tuple[int, str | None]] | UserError
        try:
            own = [(len(shard.places), shard.note) for shard in map(self._shard, range(first, last))]
        except UserError as error:
            own = error
        found: list[tuple[int, str | None]] = []
        for told in tell(own):
            if isinstance(told, UserError):
                raise told
            found += told
        self._contents = found

    @cached_property
    def _contents(self) -> list[tuple[int, str | None]]:
        """Of each shard the number of samples, and what was left out."""
        shards = map(self._shard, range(len(self.files)))
        return [(len(shard.places), shard.note) for shard in shards]

    @cached_property
    def _ends(self) -> np.ndarray:
        """int64[shards], where the samples of each end."""
        ends = np.cumsum([number for number, _ in self._contents])
        if not ends[-1] and self.best is not None:
            raise UserError(f"{self.path}: no pair passes 'best' ({self.best}); lower it")
        if not ends[-1]:
            wanted = "KEY.txt" if self.caption == "txt" else "KEY.json"
            raise UserError(f"{self.path}: no picture with a {wanted} in it; set 'caption' to where the captions are")
        return ends

    def notes(self) -> list[str]:
        return [note for _, note in self._contents if note is not None]

    def blocks(self) -> Blocks | None:
        if self.streams is None:
            return None
        if self.streams > len(self):
            raise UserError(f"{self.path}: {len(self)} samples make no {self.streams} streams; lower 'streams'")
        return Blocks(self._ends, _TOGETHER, self.streams)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, asked for number {index}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        file, places = self.files[number], self._shard(number).places
        image_at, image_size, text_at, text_size = places[index - int(self._ends[number])].tolist()
        with file.open("rb") as opened:
            opened.seek(text_at)
            content = opened.read(text_size)
        identity = f"{file.stem}/{index}"
        error = partial(SampleError, sample_id=identity, source=str(file))
        try:
            words = content.decode()
            if self.caption != "txt":
                record: Any = json.loads(words)
                words = record[self.caption]
        except (KeyError, TypeError) as problem:
            raise error(f"its .json has no key {self.caption!r}; set 'caption' to one of its keys") from problem
        except (ValueError, RecursionError) as problem:
            raise error(
                f"its caption cannot be read ({shorten(str(problem))}); write the shard again in UTF-8"
            ) from problem
        if not isinstance(words, str) or not words.strip():
            raise error(f"its caption is {quoted(words)}; remove the sample or fill it in")
        picture = MemberImage(
            name=f"picture of {identity}", path=file, max_pixels=self.max_pixels, start=image_at, length=image_size
        )
        return parse_sample(
            {
                "id": identity,
                "task": "caption",
                "images": [picture],
                "messages": exchange(after_image(self.prompt), [text(words.strip())]),
            },
            source=str(file),
            position=index,
        )

    def has_image(self, index: int) -> bool:
        return 0 <= index < len(self)

    def image_mask(self) -> np.ndarray:
        return np.ones(len(self), dtype=bool)


class MemberImage(ImageFile):
    """An image inside of a larger file, read when it is decoded."""

    start: int
    length: int

    def __init__(self, *, name: str, path: Path, max_pixels: int, start: int, length: int) -> None:
        super().__init__(name=name, path=path, max_pixels=max_pixels)
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "length", length)

    def _open(self, sample: Sample) -> Any:
        assert self.path is not None
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = file.read(self.length)
        return ImageFile(name=self.name, data=data, max_pixels=self.max_pixels)._open(sample)


def find_members(file: Path) -> Iterable[tuple[str, dict[str, tuple[int, int]]]]:
    """Key and {suffix: (position, length)} of the members of a tar file, in the order in which the keys appear.

    Members of a key belong together wherever they stand: they are read by position, so a tar need not be sorted. Where
    one comes a second time, as in tars that were joined, it begins another sample. What macOS leaves beside files
    (`._a.jpg`) is no member.
    """
    found: dict[tuple[str, int], dict[str, tuple[int, int]]] = {}
    rounds: Counter[str] = Counter()
    try:
        with file.open("rb") as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
            for member in tar:
                # the key ends at the first point of the name, as in WebDataset itself
                folder, _, base = member.name.rpartition("/")
                if not member.isfile() or base.startswith("._"):
                    continue
                stem, _, suffix = base.partition(".")
                key, suffix = f"{folder}/{stem}".lstrip("/"), f".{suffix.lower()}"
                if suffix in found.get((key, rounds[key]), {}):
                    rounds[key] += 1
                found.setdefault((key, rounds[key]), {})[suffix] = (member.offset_data, member.size)
            size = file.stat().st_size
            if any(start + length > size for members in found.values() for start, length in members.values()):
                raise tarfile.ReadError("the last member is cut off")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); check the path") from error
    except tarfile.TarError as error:
        raise UserError(
            f"{file}: is no whole tar file ({error}); fetch it again (gzipped ones have to be unpacked)"
        ) from error
    return [(key, members) for (key, _), members in found.items()]


def _numbers(file: Path, places: Sequence[tuple[int, int] | None], best: Best) -> list[float]:
    """The sum that decides about each sample of a shard, read from its `KEY.json`."""
    sums: list[float] = []
    with file.open("rb") as opened:
        for at, place in enumerate(places):
            try:
                if place is None:
                    raise KeyError("KEY.json")
                opened.seek(place[0])
                facts = json.loads(opened.read(place[1]))
                sums.append(sum(float(facts[key]) for key in best.keys))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise UserError(
                    f"{file}: sample {at} has no number {' or '.join(best.keys)} in its .json ({error}); leave 'best' "
                    "out or name its keys"
                ) from error
    return sums
