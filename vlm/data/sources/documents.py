"""Interleaved documents (MMC4, OBELICS) and plain text, for `model.template: document`."""

from array import array
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.sources.base import Source
from vlm.data.sources.fields import Fields, Record
from vlm.data.sources.forms import read_with
from vlm.data.sources.interleave import MAX_IMAGES, interleave
from vlm.data.sources.record_sources import IMAGE, Part, RecordSource, text
from vlm.errors import SampleError, UserError, quoted
from vlm.sample import DOCUMENT, Sample, parse_sample
from vlm.sample.paths import located


def document(content: list[Part]) -> list[dict[str, Any]]:
    return [{"role": DOCUMENT, "content": content}]


class Mmc4(RecordSource):
    """Multimodal C4 (Zhu et al., 2023): sentences, and images each with the sentence that matches it.

    ::

        {"text_list": ["The harbour.", "A boat."], "url": "...",
         "image_info": [{"image_name": "a.png", "matched_text_index": 1, "matched_sim": 0.3}]}

    Each image stands before its sentence, at most `max_images` of them in the order of the file, as VILA reads it.

    Args:
        path: JSON list or JSONL (a shard).
        max_images: of a document.
        min_similarity: images that match their sentence less are left out.
        images_first: all images, then all text; VILA's ablation, which hurts.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "document"
    image_key = "image_info"

    def __init__(
        self,
        path: str | Path,
        max_images: int = MAX_IMAGES,
        min_similarity: float = 0.0,
        images_first: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__(path, **keywords)
        self.max_images, self.min_similarity, self.images_first = max_images, min_similarity, images_first

    def matched(self, fields: Fields) -> list[tuple[str, int]]:
        """The images of a record that are similar enough, each with the number of its sentence."""
        return [
            (info.text("image_name"), info.need("matched_text_index", int, "the number of a sentence"))
            for info in fields.objects("image_info")
            if self._similarity(info) >= self.min_similarity
        ]

    @staticmethod
    def _similarity(info: Fields) -> float:
        found: float = info.need("matched_sim", (int, float), "a number") if "matched_sim" in info.record else 1.0
        return found

    def chat(self, fields: Fields) -> dict[str, Any]:
        sentences = fields.texts("text_list")
        try:
            content, shown = interleave(sentences, self.matched(fields), max_images=self.max_images)
        except SampleError:
            raise
        except UserError as error:
            raise fields.error(str(error)) from error
        if self.images_first:
            content = [IMAGE] * len(shown) + [text(" ".join(sentences))]
        return {"images": shown, "messages": document(content)}


class Mmc4Pairs(Mmc4):
    """Documents of MMC4 in pieces: every image with its own sentence is a sample, the rest of the text is left out.

    VILA's ablation that shows what the text between images is good for.

    Args:
        path: JSON list or JSONL (a shard); read once more than other files, for the number of images of each record.
        **keywords: as in `Mmc4`.
    """

    task = "caption"

    @cached_property
    def _ends(self) -> np.ndarray:
        """int64[records], samples up to the end of each record."""
        return np.cumsum([self._num_pieces(at) for at in range(len(self._records))])

    def _num_pieces(self, at: int) -> int:
        try:
            fields = Fields(self._records[at], identity=at, source=str(self.path))
            return min(len(self.matched(fields)), self.max_images)
        except SampleError:
            return 1  # which is the one that is bad

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, asked for number {index}")
        at = int(np.searchsorted(self._ends, index, side="right"))
        record = self._records[at]
        with read_with(type(self).__name__, record):
            return self._piece(record, at, index)

    def _piece(self, record: Record, at: int, index: int) -> Sample:
        fields = Fields(record, identity=record.get("id", at), source=str(self.path))
        sentences = fields.texts("text_list")
        number = index - (int(self._ends[at - 1]) if at else 0)
        image, sentence = self.matched(fields)[number]
        if not 0 <= sentence < len(sentences):
            raise fields.error(f"image {number} belongs to sentence {sentence}, but there are {len(sentences)}")
        return parse_sample(
            {
                "id": f"{fields.identity}/{number}",
                "task": self.task,
                "images": [image],
                "messages": document([IMAGE, text(sentences[sentence])]),
            },
            source=str(self.path),
            position=index,
            image_root=self.image_root,
            max_pixels=self.max_pixels,
        )

    def has_image(self, index: int) -> bool:
        return 0 <= index < len(self)

    def image_mask(self) -> np.ndarray:
        return np.ones(len(self), dtype=bool)


class Obelics(RecordSource):
    """OBELICS (Laurençon et al., 2023): two lists of one length, at each place either an image or a text.

    ::

        {"images": ["a.png", null], "texts": [null, "A boat."]}

    Args:
        path: JSON list or JSONL. Images are paths; where the file has addresses, download them first.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "document"

    def _flag(self, record: Record) -> bool:  # type: ignore[override]
        images = record.get("images")
        return isinstance(images, list) and any(images)

    def chat(self, fields: Fields) -> dict[str, Any]:
        images = fields.need("images", list, "a list of paths and nulls")
        texts = fields.need("texts", list, "a list of texts and nulls")
        if len(images) != len(texts):
            raise fields.error(f"'images' has {len(images)} places and 'texts' {len(texts)}; they must be alike")
        content: list[Part] = []
        for at, (image, words) in enumerate(zip(images, texts, strict=True)):
            if (image is None) == (words is None):
                raise fields.error(
                    f"place {at} must have either an image or a text, found {quoted(image)} and {words!r}"
                )
            content.append(IMAGE if image is not None else text(words))
        return {"images": [image for image in images if image is not None], "messages": document(content)}


class PlainText(Source):
    """Text alone: `{"text": "..."}` a line, or a `.txt` file with a document a line.

    Args:
        path: `.json`, `.jsonl` or `.txt`.
        name: by default the file's name without its ending.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path = located(path)
        self.name = name if name is not None else self.path.stem

    @cached_property
    def _lines(self) -> "_TextRecords | np.ndarray":
        if self.path.suffix == ".txt":
            return _line_starts(self.path)
        return _TextRecords(self.path)

    def __len__(self) -> int:
        lines = self._lines
        return len(lines) - 1 if isinstance(lines, np.ndarray) else len(lines)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, asked for number {index}")
        lines = self._lines
        if not isinstance(lines, np.ndarray):
            return lines[index]
        start, end = lines[index : index + 2].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            content = file.read(end - start)
        try:
            line = content.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise SampleError(
                f"line {index + 1} is not UTF-8 ({error.reason} at byte {error.start}); convert the file",
                sample_id=str(index),
                source=str(self.path),
            ) from error
        return parse_sample(
            {"id": index, "task": "text", "messages": document([text(line)])}, source=str(self.path), position=index
        )

    def has_image(self, index: int) -> bool:
        return False

    def image_mask(self) -> np.ndarray:
        return np.zeros(len(self), dtype=bool)


class _TextRecords(RecordSource):
    image_key = None

    def chat(self, fields: Fields) -> dict[str, Any]:
        return {"messages": document([text(fields.text("text"))]), "task": "text"}


def _line_starts(path: Path) -> np.ndarray:
    """int64[n + 1], where each line begins and the last one ends; the file is read in pieces."""
    starts = array("q", [0])
    try:
        with path.open("rb") as file:
            offset = 0
            while chunk := file.read(1 << 20):
                found = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + offset + 1
                starts.frombytes(found.astype(np.int64).tobytes())
                offset += len(chunk)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if offset > starts[-1]:
        starts.append(offset)
    if len(starts) == 1:
        raise UserError(f"{path}: holds no samples; remove it from the sources or fill it")
    return np.frombuffer(starts, dtype=np.int64)
