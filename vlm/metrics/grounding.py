"""Accuracy of boxes."""

from typing import Any

from vlm.batch import SampleInfo
from vlm.errors import UserError
from vlm.geometry import Box
from vlm.metrics.base import MeanScore, references, sample_error
from vlm.metrics.boxes import iou
from vlm.prompts.regions import REGION_FORMS, RegionForm


class GroundingAccuracy(MeanScore):
    """The share of first boxes with an IoU of at least 0.5 with a reference, as RefCOCO is reported, in [0, 1].

    Yu et al., "Modeling Context in Referring Expressions", 2016. Answers without a box are wrong. References are text
    too, on the same padded or unpadded image.

    Args:
        form: how the boxes are written: a name in `vlm.prompts.regions.REGION_FORMS`, or a form.
        references: the same for the references, where they are written in another form: `qwen_999` judges as Qwen-VL
            does, whose references are not rounded to its form.
        threshold: smallest IoU that is right.
    """

    name = "iou_50"

    def __init__(
        self,
        *,
        form: str | RegionForm = "llava",
        references: str | RegionForm | None = None,
        threshold: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.form = region_form("form", form)
        self.reference_form = self.form if references is None else region_form("references", references)
        self.threshold = threshold

    def parse(self, text: str) -> list[Box]:
        """All boxes in an answer, those that make no sense too."""
        return _boxes(text, self.form)

    def score(self, prediction: str, sample: SampleInfo) -> float:
        wanted = [box for text in references(sample) for box in _boxes(text, self.reference_form)]
        if not wanted:
            raise sample_error(sample, f"no box in its answers {references(sample)}; write them in the metric's 'form'")
        found = self.parse(prediction)[:1]
        return float(any(iou(box, target) >= self.threshold for box in found for target in wanted))


def region_form(key: str, form: str | RegionForm) -> RegionForm:
    """The form of that name; `key` is the argument, for messages."""
    if isinstance(form, RegionForm):
        return form
    if form not in REGION_FORMS:
        raise UserError(f"{key}: no boxes are written like {form!r}; use one of {', '.join(REGION_FORMS)}")
    return REGION_FORMS[form]


def _boxes(text: str, form: RegionForm) -> list[Box]:
    return [points[0] + points[1] for kind, points in form.find(text) if kind == "box"]
