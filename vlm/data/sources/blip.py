"""The annotation files that BLIP (Li et al., 2022) publishes for its fine-tuning."""

from collections import Counter
from pathlib import Path
from typing import Any

from vlm.data.sources.fields import Fields
from vlm.data.sources.record_sources import IMAGE, RecordSource, after_image, exchange, text


class BlipQuestions(RecordSource):
    """Questions of VQA v2 and Visual Genome, to train on: all answers are in `answers`, each with its weight.

    ::

        [{"question_id": 9, "question": "What is it?", "answer": ["a boat", "boat"], "image": "val2014/a.jpg",
          "dataset": "vqa"},
         {"question_id": 3, "question": "What is red?", "answer": "the boat", "image": "image/1.jpg", "dataset": "vg"}]

    An answer of VQA v2 weighs as much as the share of people who gave it, and that of Visual Genome `single_weight`.

    Args:
        path: `vqa_train.json`, `vqa_val.json`, `vg_qa.json` or any file of their form.
        single_weight: of the answer of a question that has one alone.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "vqa"

    def __init__(self, path: str | Path, single_weight: float = 0.2, **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.single_weight = single_weight

    def chat(self, fields: Fields) -> dict[str, Any]:
        if isinstance(fields.value("answer"), list):
            counts = Counter(fields.texts("answer"))
            weights = {answer: count / counts.total() for answer, count in counts.items()}
        else:
            weights = {fields.text("answer"): self.single_weight}
        return {
            "images": [fields.text("image")],
            "messages": exchange(after_image(fields.text("question")), [text(max(weights, key=weights.__getitem__))]),
            "answers": [{"text": answer, "weight": weight} for answer, weight in weights.items()],
        }


class NLVR2(RecordSource):
    """NLVR2 (Suhr et al., 2019): whether a sentence is true of two images.

    ::

        [{"sentence": "There are two dogs.", "label": "True", "images": ["train/0-img0.png", "train/0-img1.png"]}]

    Args:
        path: `nlvr_train.json`, `nlvr_dev.json`, `nlvr_test.json` or any file of their form.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "nlvr2"
    image_key = "images"

    def chat(self, fields: Fields) -> dict[str, Any]:
        images = fields.texts("images")
        if len(images) != 2:
            raise fields.error(f"'images' names {len(images)}; a sentence is judged about two", kind="image")
        label = fields.text("label")
        if label not in ("True", "False"):
            raise fields.error(f"'label' must be True or False, found {label!r}", kind="no label")
        question = [IMAGE, IMAGE, text(f"\n{fields.text('sentence')}")]
        return {"images": images, "messages": exchange(question, [text(label)]), "answers": [label]}
