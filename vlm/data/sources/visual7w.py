"""Visual7W's questions whose answers are places."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.data.sources.fields import Fields, Record, read_list
from vlm.data.sources.record_sources import ObjectSource, Part, after_image, box, by_unique, exchange
from vlm.data.sources.requests import asked
from vlm.errors import UserError
from vlm.seeding import seed_from


class Visual7W(ObjectSource):
    """Pointing questions of Visual7W (Zhu et al., 2016): which of four places it is, one sample each.

    ::

        {"boxes": [{"box_id": 5, "x": 1, "y": 2, "width": 30, "height": 40, "name": "dog"}],
         "images": [{"filename": "v7w_1.jpg", "split": "train",
                     "qa_pairs": [{"qa_id": 7, "question": "Which one barks?", "answer": 5,
                                   "multiple_choices": [6, 8, 9]}]}]}

    The four places stand behind the question in an order that depends on the question alone; the answer is one of them.

    Args:
        path: `dataset_v7w_pointing.json`.
        split: `train`, `val` or `test`.
        request: text with `{}` in the place of the question; what is behind it ends before the places.
        choices: name the places; without, the answer is any place.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "visual7w"

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        request: str = "{} Candidates: ",
        choices: bool = True,
        **keywords: Any,
    ) -> None:
        super().__init__(path, **keywords)
        self.split, self.request, self.choices = split, request, choices

    def records(self) -> Iterator[Record]:
        boxes = by_unique(self.path, read_list(self.path, "boxes"), "box_id")
        for number, image in enumerate(read_list(self.path, "images")):
            fields = Fields(image, identity=number, source=self.path)
            if fields.text("split") != self.split:
                continue
            for pair in fields.objects("qa_pairs"):
                found = Fields(pair.record, identity=pair.value("qa_id"), source=self.path)
                answer = found.value("answer")
                places = [answer, *found.need("multiple_choices", list, "a list of box_id")]
                if missing := [place for place in places if place not in boxes]:
                    raise UserError(
                        f"{self.path}: question {found.identity} names box {missing[0]}, which is not there"
                    )
                ordered = sorted(places, key=lambda place: seed_from(str(found.identity), str(place)))
                yield {
                    "id": str(found.identity),
                    "image": fields.text("filename"),
                    "question": found.text("question"),
                    "answer": boxes[answer],
                    "places": [boxes[place] for place in ordered],
                }

    def chat(self, fields: Fields) -> dict[str, Any]:
        places = [_box(place) for place in fields.objects("places")]
        answer = _box(Fields(fields.value("answer"), identity=fields.identity, source=fields.source))
        question = after_image(asked(fields.text("question"), self.request))
        return {
            "images": [fields.text("image")],
            "messages": exchange([*question, *(places if self.choices else [])], [answer]),
        }


def _box(fields: Fields) -> Part:
    x, y = (fields.need(key, (int, float), "a number of pixels") for key in ("x", "y"))
    width, height = fields.length("width"), fields.length("height")
    return box([max(x, 0), max(y, 0), x + width, y + height], unit="pixel")
