"""Places in pictures: referring expressions, lines of text, elements of a screen."""

from pathlib import Path
from typing import Any, Literal

from vlm.data.sources.fields import Fields
from vlm.data.sources.record_sources import Part, RecordSource, after_image, box, exchange, text
from vlm.errors import UserError

Direction = Literal["ground", "refer"]
GROUND = "Provide the bounding box coordinate of the region this sentence describes."
REFER = "Provide a short description for this region."
"""LLaVA-1.5's requests (paper, table 7)."""


class _Turns(RecordSource):
    """Several regions of one image, each a turn: from words to the region, or from the region to words."""

    def __init__(
        self,
        path: str | Path,
        direction: Direction = "ground",
        request: str | None = None,
        unit: Literal["pixel", "share"] = "pixel",
        **keywords: Any,
    ) -> None:
        super().__init__(path, **keywords)
        if direction not in ("ground", "refer"):
            raise UserError(f"direction must be ground or refer, found {direction!r}")
        if unit not in ("pixel", "share"):
            raise UserError(f"unit must be pixel or share, found {unit!r}")
        self.direction = direction
        self.request = request if request is not None else GROUND if direction == "ground" else REFER
        self.unit = unit
        self.task = direction

    def turns(self, fields: Fields, pairs: list[tuple[str, Part]]) -> dict[str, Any]:
        """Messages of (words, region) pairs."""
        messages: list[dict[str, Any]] = []
        for words, region in pairs:
            start: list[Part] = [] if messages else after_image("")
            before, _, after = (self.request if "{}" in self.request else f"{self.request} {{}}").partition("{}")
            before = before if messages else f"\n{before}"
            if self.direction == "ground":
                messages += exchange([*start, text(f"{before}{words}{after}")], [region])
            else:
                behind = [text(after)] if after else []
                messages += exchange([*start, text(before), region, *behind], [text(words)])
        return {"images": [fields.text("image")], "messages": messages}


class ReferringExpressions(_Turns):
    """Regions with sentences that mean them, in the way of RefCOCO (Yu et al., 2016).

    ::

        {"id": "7", "image": "a.jpg", "bbox": [x, y, width, height], "sentences": ["the left dog", "a brown dog"]}

    Each sentence is a turn. `bbox` is in pixels, as in COCO.

    Args:
        path: JSON list or JSONL.
        direction: `ground`, from a sentence to the box (REC), or `refer`, from the box to a sentence (REG).
        request: what stands before the sentence or the box, or text with `{}` in its place; by default LLaVA-1.5's.
        unit: of `bbox`.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    def chat(self, fields: Fields) -> dict[str, Any]:
        x, y, width, height = fields.numbers("bbox", 4)
        if width <= 0 or height <= 0:
            raise fields.error(f"'bbox' {[x, y, width, height]} has no area; it is x, y, width, height", kind="region")
        region = box([x, y, x + width, y + height], unit=self.unit)
        return self.turns(fields, [(sentence, region) for sentence in fields.texts("sentences")])


class ScreenElements(_Turns):
    """Screenshots with their elements (CogAgent's CCS400K, Hong et al., 2023; Pix2Struct's HTML).

    ::

        {"id": "7", "image": "a.png", "elements": [{"html": "<button>OK</button>", "box": [x0, y0, x1, y1]}]}

    Each element is a turn, `html` or `text` its words.

    Args:
        path: JSON list or JSONL.
        direction: `ground`, from the element to its box (REC), or `refer`, from the box to the element (REG).
        request: what stands before the element or the box, or text with `{}` in its place; by default LLaVA-1.5's.
        unit: of `box`.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    def chat(self, fields: Fields) -> dict[str, Any]:
        elements = fields.objects("elements")
        if not elements:
            raise fields.error("'elements' is empty; remove the record")
        pairs = [
            (
                element.text("html" if "html" in element.record else "text"),
                box(element.numbers("box", 4), unit=self.unit),
            )
            for element in elements
        ]
        return self.turns(fields, pairs)


class TextLines(RecordSource):
    """Pictures with the lines of text in them and where they are (OCR with quads).

    ::

        {"id": "7", "image": "a.png", "lines": [{"text": "OPEN", "quad": [x0, y0, x1, y1, x2, y2, x3, y3]}]}

    The answer is all lines in their order, each a phrase with its quad; without `places` it is the text alone.

    Args:
        path: JSON list or JSONL.
        prompt: the user's text beside the image.
        places: write where each line is.
        between: text between two lines; Qwen-VL has none.
        unit: of `quad`.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "ocr"

    def __init__(
        self,
        path: str | Path,
        prompt: str = "Read the text in the picture.",
        places: bool = True,
        unit: Literal["pixel", "share"] = "pixel",
        between: str = "\n",
        **keywords: Any,
    ) -> None:
        super().__init__(path, **keywords)
        self.prompt, self.places, self.unit, self.between = prompt, places, unit, between

    def chat(self, fields: Fields) -> dict[str, Any]:
        answer: list[Part] = []
        for line in fields.objects("lines"):
            if answer and self.between:
                answer.append(text(self.between))
            if self.places:
                quad = {"type": "quad", "quad": line.numbers("quad", 8), "unit": self.unit}
                answer += [{"type": "ref", "text": line.text("text")}, quad]
            else:
                answer.append(text(line.text("text")))
        if not answer:
            raise fields.error("'lines' is empty: there is nothing to read in this picture; remove the record")
        return {"images": [fields.text("image")], "messages": exchange(after_image(self.prompt), answer)}
