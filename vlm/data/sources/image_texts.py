"""Images with one text each: lists of captions, questions with choices, statements and memes."""

from collections import Counter
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, get_args

from vlm.data.sources.fields import Fields
from vlm.data.sources.instructions import fill_instruction
from vlm.data.sources.record_sources import RecordSource, after_image, exchange, text
from vlm.errors import UserError

Ask = Literal["answer", "choice", "question"]


class CaptionList(RecordSource):
    """Captions one by one, as BLIP and LAVIS list those of COCO and CapFilt: an image with five of them is five
    samples, which is what shares by size count.

    ::

        [{"image": "train2014/a.jpg", "image_id": "coco_9", "caption": "A boat."}]

    Samples of one image have its id, where there is one, as their `group`. In lists to be tested with, an image has all
    its captions at once.

    Args:
        path: JSON list or JSONL.
        prompt: the user's text beside the image.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "caption"

    def __init__(self, path: str | Path, prompt: str = "", **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.prompt = prompt

    def chat(self, fields: Fields) -> dict[str, Any]:
        found = fields.record.get("caption")
        captions = fields.texts("caption") if isinstance(found, list) else [fields.text("caption")]
        return {
            "images": [fields.text("image")],
            "messages": exchange(after_image(self.prompt), [text(captions[0].strip())]),
            "answers": captions,
            **({"group": str(fields.value("image_id"))} if fields.has("image_id") else {}),
        }


class AOKVQA(RecordSource):
    """A-OKVQA (Schwenk et al., 2022): questions with four choices and the answers of ten people.

    ::

        [{"question_id": "a", "image_id": 7, "question": "Where is it?", "choices": ["at sea", "at home", ...],
          "correct_choice_idx": 0, "direct_answers": ["sea", ...]}]

    Args:
        path: `aokvqa_v1p0_train.json` or any file of its form.
        ask: for an `answer` (the one that most people gave is trained), a `choice` (of those that stand behind the
            question; the text of the right one is trained), or for the `question` to that answer.
        image_pattern: file name from the number of the image.
        request: text with `{}` in the place of the question, or of the answer where the question is asked for, and
            `{options}` in that of the choices, `(a) x (b) y`.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "aokvqa"
    image_key = "image_id"

    def __init__(
        self,
        path: str | Path,
        ask: Ask = "answer",
        image_pattern: str = "{:012d}.jpg",
        request: str = "",
        **keywords: Any,
    ) -> None:
        super().__init__(path, **keywords)
        if ask not in get_args(Ask):
            raise UserError(f"AOKVQA: ask must be one of {', '.join(get_args(Ask))}, found {ask!r}")
        self.ask, self.image_pattern, self.request = ask, image_pattern, request

    def chat(self, fields: Fields) -> dict[str, Any]:
        question, choices = fields.text("question"), fields.texts("choices")
        made: dict[str, Any] = {"id": fields.value("question_id")}
        if self.ask == "choice":
            right = fields.number("correct_choice_idx")
            if not 0 <= right < len(choices):
                raise fields.error(f"'correct_choice_idx' {right} is none of its {len(choices)} choices; correct it")
            said, answer, made["answers"], made["choices"] = question, choices[right], [choices[right]], choices
        else:
            answers = Counter(fields.texts("direct_answers"))
            said, answer = question, answers.most_common(1)[0][0]
            made["answers"] = [{"text": one, "weight": n} for one, n in answers.items()]
            if self.ask == "question":
                said, answer, made["answers"] = answer, question, [question]
        put = fill_instruction(self.request, said, choices)
        return made | {
            "images": [fields.file_name(self.image_pattern, "image_id")],
            "messages": exchange(after_image(put), [text(answer)]),
        }


class ChoiceQuestions(RecordSource):
    """Questions with choices and one image each, as LAVIS lists IconQA's (Lu et al., 2021).

    ::

        [{"image": "val/choose_txt/7/image.png", "question": "What shape is it?", "choices": ["a square", "a ball"],
          "answer": 0}]

    `answer` is the place of the right choice, whose text is trained.

    Args:
        path: JSON list or JSONL.
        task: of the samples.
        request: text with `{}` in the place of the question and `{options}` in that of the choices, `(a) x (b) y`.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    def __init__(self, path: str | Path, task: str = "icon_qa", request: str = "", **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.task, self.request = task, request

    def chat(self, fields: Fields) -> dict[str, Any]:
        choices, letter = fields.choice(ascii_uppercase)
        right = str(choices[ascii_uppercase.index(letter)])
        put = fill_instruction(self.request, fields.text("question"), [str(choice) for choice in choices])
        return {
            "images": [fields.text("image")],
            "messages": exchange(after_image(put), [text(right)]),
            "choices": choices,
            "answers": [right],
        }


class LabelledImages(RecordSource):
    """Images with a text and a label that is 0 or 1: statements that are false or true, memes that are hateful or not.

    ::

        {"image": "000000085637.jpg", "caption": "The cat is under the bed.", "label": 1}    VSR (Liu et al., 2022)
        {"id": 42953, "img": "img/42953.png", "text": "...", "label": 0}                     Hateful Memes

    Args:
        path: JSONL or JSON list.
        task: of the samples.
        text_key: of the text.
        image_key: of the file name.
        words: what the labels 0 and 1 are called; they are the answers, and the choices.
        request: text with `{}` in the place of the text.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    def __init__(
        self,
        path: str | Path,
        task: str,
        text_key: str = "caption",
        image_key: str = "image",
        words: tuple[str, str] = ("false", "true"),
        request: str = "",
        **keywords: Any,
    ) -> None:
        super().__init__(path, **keywords)
        self.task, self.text_key, self.image_key = task, text_key, image_key
        self.words, self.request = tuple(words), request

    def chat(self, fields: Fields) -> dict[str, Any]:
        label = fields.number("label")
        if label not in (0, 1):
            raise fields.error(f"'label' must be 0 or 1, found {label}")
        put = fill_instruction(self.request, fields.text(self.text_key), self.words)
        return {
            "images": [fields.text(str(self.image_key))],
            "messages": exchange(after_image(put), [text(self.words[label])]),
            "choices": list(self.words),
            "answers": [self.words[label]],
        }
