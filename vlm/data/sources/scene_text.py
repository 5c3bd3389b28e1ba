"""Images with text in them, and what a reader of characters (OCR) found: TextCaps, TextVQA, OCR-VQA."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.data.sources.fields import Fields, Record, read_list, read_object
from vlm.data.sources.instructions import fill_instruction
from vlm.data.sources.record_sources import IMAGE, ObjectSource, Part, exchange, text
from vlm.errors import UserError
from vlm.sample.paths import located

_MOST = 30
"""Tokens that InstructBLIP's code writes."""


class SceneTextSource(ObjectSource):
    """Samples whose question begins with the tokens that a reader of characters found.

    Args:
        path: the file, `{"data": [{"image_id", ...}]}`.
        ocr: `TextVQA_Rosetta_OCR_v0.2_train.json` or any file of its form, {"data": [{"image_id", "ocr_tokens"}]};
            None: tokens of the records themselves, where they have some.
        ocr_form: text with `{}` in the place of the tokens, at most 30 of them, a comma between them.
        image_pattern: file name from the id of the image.
        request: text with `{}` in the place of the question.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    def __init__(
        self,
        path: str | Path,
        ocr: str | Path | None = None,
        ocr_form: str = "OCR tokens: {}. ",
        image_pattern: str = "{}.jpg",
        request: str = "",
        **keywords: Any,
    ) -> None:
        super().__init__(path, **keywords)
        self.ocr = None if ocr is None else located(ocr)
        self.ocr_form, self.image_pattern, self.request = ocr_form, image_pattern, request

    def records(self) -> Iterator[Record]:
        tokens: dict[str, Any] = {}
        if self.ocr is not None:
            for at, entry in enumerate(read_list(self.ocr, "data")):
                found = Fields(entry, identity=f"entry {at}", source=self.ocr)
                tokens[found.text("image_id")] = found.need("ocr_tokens", list, "a list of texts")
        for at, entry in enumerate(read_list(self.path, "data")):
            fields = Fields(entry, identity=at, source=self.path)
            image = fields.text("image_id")
            if self.ocr is not None and image not in tokens:
                raise UserError(f"{self.path}: image {image!r} of entry {at} is not in {self.ocr}; fetch its version")
            yield {
                **entry,
                "id": str(self.identity(fields, at)),
                "ocr_tokens": tokens.get(image, entry.get("ocr_tokens")),
            }

    def identity(self, fields: Fields, at: int) -> Any:
        return fields.record.get("question_id", at)

    def asking(self, fields: Fields, question: str) -> list[Part]:
        """The image, the tokens as a text of their own, and the question."""
        found = fields.record.get("ocr_tokens") or []
        tokens = ", ".join(str(token) for token in found[:_MOST])
        put = fill_instruction(self.request, question)
        parts = [self.ocr_form.replace("{}", tokens)] if tokens else []
        parts += [put] if put else []
        return [IMAGE, *(text(part if at else f"\n{part}") for at, part in enumerate(parts))]

    def image(self, fields: Fields) -> str:
        return fields.file_name(self.image_pattern, "image_id")


class TextCaps(SceneTextSource):
    """TextCaps (Sidorov et al., 2020): captions that tell what is written.

    ::

        {"data": [{"image_id": "7", "caption_str": "A sign says stop.", ...}]}

    Args:
        path: `TextCaps_0.1_train.json` or any file of its form.
        **keywords: as in `SceneTextSource`.
    """

    task = "text_caps"

    def identity(self, fields: Fields, at: int) -> Any:
        return fields.record.get("caption_id", at)

    def chat(self, fields: Fields) -> dict[str, Any]:
        caption = fields.text("caption_str").strip()
        return {
            "images": [self.image(fields)],
            "messages": exchange(self.asking(fields, ""), [text(caption)]),
            "answers": [caption],
        }


class TextVQATokens(SceneTextSource):
    """TextVQA (Singh et al., 2019) with OCR tokens; the answer that most people gave is trained, all are in `answers`.

    ::

        {"data": [{"question_id": 7, "image_id": "a", "question": "What does it say?", "answers": ["stop", ...]}]}

    Args:
        path: `TextVQA_0.5.1_val.json` or any file of its form.
        **keywords: as in `SceneTextSource`.
    """

    task = "textvqa"

    def chat(self, fields: Fields) -> dict[str, Any]:
        answers = fields.answers("answers")
        best = Counter(answers).most_common(1)[0][0]
        return {
            "images": [self.image(fields)],
            "messages": exchange(self.asking(fields, fields.text("question")), [text(best)]),
            "answers": answers,
        }


class OCRVQA(ObjectSource):
    """OCR-VQA (Mishra et al., 2019): questions about the covers of books, one sample each.

    ::

        {"0761183272": {"imageURL": "http://.../a.jpg", "questions": ["Who wrote it?"], "answers": ["Ann"], "split": 1}}

    Args:
        path: `dataset.json`.
        split: 1 is training, 2 validation, 3 test.
        ending: of the image files, which are called like their entries; None: that of the URL.
        request: text with `{}` in the place of the question.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "ocr_vqa"

    def __init__(
        self, path: str | Path, split: int = 1, ending: str | None = ".jpg", request: str = "", **keywords: Any
    ) -> None:
        super().__init__(path, **keywords)
        self.split, self.ending, self.request = split, ending, request

    def records(self) -> Iterator[Record]:
        for identity, entry in read_object(self.path).items():
            fields = Fields(entry, identity=identity, source=self.path)
            if fields.number("split") != self.split:
                continue
            questions, answers = fields.texts("questions"), fields.texts("answers")
            if len(questions) != len(answers):
                raise fields.error(f"{len(questions)} 'questions' but {len(answers)} 'answers'; fetch the file again")
            ending = Path(fields.text("imageURL")).suffix if self.ending is None else self.ending
            for at, (question, answer) in enumerate(zip(questions, answers, strict=True)):
                yield {"id": f"{identity}/{at}", "image": identity + ending, "question": question, "answer": answer}

    def chat(self, fields: Fields) -> dict[str, Any]:
        put, answer = fill_instruction(self.request, fields.text("question")), fields.text("answer")
        return {
            "images": [fields.text("image")],
            "messages": exchange([IMAGE, text(f"\n{put}")], [text(answer)]),
            "answers": [answer],
        }
