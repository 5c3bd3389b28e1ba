"""Captions: COCO's, and captions whose phrases are boxes (GRIT)."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.data.sources.fields import Fields, Record, read_list
from vlm.data.sources.record_sources import (
    ObjectSource,
    Part,
    RecordSource,
    after_image,
    box,
    by_unique,
    exchange,
    text,
)
from vlm.errors import UserError, quoted


class CocoCaptions(ObjectSource):
    """COCO captions (Chen et al., 2015): one sample per image, all its captions in `answers`.

    ::

        {"images": [{"id": 9, "file_name": "a.jpg"}], "annotations": [{"image_id": 9, "caption": "A boat."}]}

    `PretrainingData` trains on another caption in each epoch; elsewhere the first one is the answer. Images without a
    caption are left out, as in COCO's own tools.

    Args:
        path: `captions_train2017.json` or any file of its form.
        prompt: the user's text beside the image.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "caption"

    def __init__(self, path: str | Path, prompt: str = "", **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.prompt = prompt

    def records(self) -> Iterator[Record]:
        annotations = read_list(self.path, "annotations")
        images = by_unique(self.path, read_list(self.path, "images"), "id")
        captions: defaultdict[Any, list[str]] = defaultdict(list)
        for at, entry in enumerate(annotations):
            fields = Fields(
                entry if isinstance(entry, dict) else {}, identity=f"annotation {at}", source=str(self.path)
            )
            image = fields.need("image_id", (int, str), "the id of an image")
            if image not in images:
                raise UserError(f"{self.path}: annotation {at} is of image_id {image!r}, which is not under 'images'")
            captions[image].append(fields.text("caption").strip())
        for image, found in captions.items():
            yield {"id": str(image), "file_name": images[image].get("file_name"), "captions": found}

    def chat(self, fields: Fields) -> dict[str, Any]:
        captions = fields.texts("captions")
        return {
            "images": [fields.text("file_name")],
            "messages": exchange(after_image(self.prompt), [text(captions[0])]),
            "answers": captions,
        }


class KarpathyCaptions(ObjectSource):
    """Captions in the form of Karpathy's splits (Karpathy and Fei-Fei, 2015) of Flickr30k, Flickr8k and COCO.

    ::

        {"images": [{"imgid": 0, "filename": "a.jpg", "split": "test", "sentences": [{"raw": "A boat."}]}]}

    One sample per image, all its captions in `answers`; see `CocoCaptions`.

    Args:
        path: `dataset_flickr30k.json` or any file of its form.
        split: whose images to take.
        prompt: the user's text beside the image.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "caption"

    def __init__(self, path: str | Path, split: str = "test", prompt: str = "", **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.split, self.prompt = split, prompt

    def records(self) -> Iterator[Record]:
        images = read_list(self.path, "images")
        if images and "sentences" not in images[0]:
            remedy = "; the file is of the form that vlm.data.CocoCaptions reads" if "file_name" in images[0] else ""
            raise UserError(f"{self.path}: images[0] has no 'sentences'; found {quoted(sorted(images[0]))}{remedy}")
        for identity, image in by_unique(self.path, images, "imgid").items():
            if image.get("split") == self.split:
                yield {**image, "id": str(identity)}

    def chat(self, fields: Fields) -> dict[str, Any]:
        captions = [sentence.text("raw").strip() for sentence in fields.objects("sentences")]
        if not captions:
            raise fields.error("'sentences' is empty; remove the picture")
        folder = fields.record.get("filepath")  # of COCO's images
        name = fields.text("filename")
        return {
            "images": [f"{folder}/{name}" if folder else name],
            "messages": exchange(after_image(self.prompt), [text(captions[0])]),
            "answers": captions,
        }


class GroundedCaptions(RecordSource):
    """Captions whose phrases carry boxes, as in GRIT (Kosmos-2, Peng et al., 2023).

    ::

        {"id": "7", "image": "a.jpg", "caption": "a dog on the grass",
         "ref_exps": [[0, 5, 0.1, 0.2, 0.5, 0.9, 0.98]], "noun_chunks": [[9, 18, 0.0, 0.6, 1.0, 1.0, 0.8]]}

    Entries are first and last character, then the box in shares, then how sure the detector was. Boxes of one phrase
    stand one behind the other. Of phrases that overlap the longer one stays, the first of equals, so that a caption has
    no nested boxes (Qwen-VL's greedy cleaning).

    Args:
        path: JSON list or JSONL.
        phrases: which entries to take: `ref_exps` (referring expressions) or `noun_chunks`.
        min_score: entries the detector was less sure of are left out.
        prompt: the user's text beside the image.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "grounded_caption"

    def __init__(
        self, path: str | Path, phrases: str = "ref_exps", min_score: float = 0.0, prompt: str = "", **keywords: Any
    ) -> None:
        super().__init__(path, **keywords)
        if phrases not in ("ref_exps", "noun_chunks"):
            raise UserError(f"phrases must be ref_exps or noun_chunks, found {phrases!r}")
        self.phrases, self.min_score, self.prompt = phrases, min_score, prompt

    def chat(self, fields: Fields) -> dict[str, Any]:
        caption = fields.text("caption")
        boxes: defaultdict[tuple[int, int], list[list[float]]] = defaultdict(list)
        for at, entry in enumerate(fields.need(self.phrases, list, "a list of [start, end, x0, y0, x1, y1, score]")):
            entry = Fields({"entry": entry}, identity=fields.identity, source=fields.source).numbers("entry", 7)
            start, end = int(entry[0]), int(entry[1])
            if not 0 <= start < end <= len(caption):
                raise fields.error(
                    f"{self.phrases}[{at}]: {start}..{end} is no part of a caption of {len(caption)} characters"
                )
            if entry[6] >= self.min_score:
                boxes[start, end].append([min(max(value, 0.0), 1.0) for value in entry[2:6]])
        parts: list[Part] = []
        at = 0
        for start, end in without_overlap(boxes):
            parts += [text(caption[at:start])] if start > at else []
            parts += [{"type": "ref", "text": caption[start:end]}, *(box(b, unit="share") for b in boxes[start, end])]
            at = end
        parts += [text(caption[at:])] if at < len(caption) else []
        return {"images": [fields.text("image")], "messages": exchange(after_image(self.prompt), parts)}


def without_overlap(spans: dict[tuple[int, int], Any]) -> list[tuple[int, int]]:
    """Spans in order, of overlapping ones the longer, of equals the first."""
    kept: list[tuple[int, int]] = []
    for start, end in sorted(spans, key=lambda span: (span[0] - span[1], span)):
        if all(end <= other_start or start >= other_end for other_start, other_end in kept):
            kept.append((start, end))
    return sorted(kept)
