"""Visual Dialog (Das et al., 2017): questions about an image that follow each other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.data.sources.fields import Fields, Record, read_object
from vlm.data.sources.instructions import fill_instruction
from vlm.data.sources.record_sources import ObjectSource, after_image, exchange, text
from vlm.errors import UserError

_LISTS = ("questions", "answers", "dialogs")


class VisualDialog(ObjectSource):
    """Each question of each dialog, with what was said before it and a hundred answers to choose from.

    ::

        {"data": {"questions": ["is it day", ...], "answers": ["yes", ...], "dialogs": [
            {"image_id": 7, "caption": "a boat at sea", "dialog": [
                {"question": 0, "answer": 0, "answer_options": [4, 0, ...], "gt_index": 1}, ...]}]}}

    The instruction is put together as LAVIS does for InstructBLIP: the caption, `q: ... a: ...` of the earlier
    questions, and `request`.

    Args:
        path: `visdial_1.0_val.json` or any file of its form.
        image_pattern: file name from the number of the image.
        request: text with `{}` in the place of the question.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "visual_dialog"

    def __init__(
        self,
        path: str | Path,
        image_pattern: str = "VisualDialog_val2018_{:012d}.jpg",
        request: str = "",
        **keywords: Any,
    ) -> None:
        super().__init__(path, **keywords)
        self.image_pattern, self.request = image_pattern, request

    def records(self) -> Iterator[Record]:
        data = read_object(self.path).get("data")
        found: list[Any] = [data.get(key) if isinstance(data, dict) else None for key in _LISTS]
        if not all(isinstance(texts, list) for texts in found):
            raise UserError(f"{self.path}: 'data' must hold the lists {', '.join(_LISTS)}; fetch it again")
        questions, answers, dialogs = found
        for at, dialog in enumerate(dialogs):
            fields = Fields(dialog, identity=f"dialog {at}", source=self.path)
            number, caption = fields.number("image_id"), fields.text("caption")
            said: list[str] = []
            for turn, entry in enumerate(fields.objects("dialog")):
                asked = self._told(entry, questions, entry.number("question"))
                options = entry.need("answer_options", list, "a list of numbers")
                choices = [self._told(entry, answers, option) for option in options]
                right = entry.number("gt_index")
                if not 0 <= right < len(choices):
                    raise entry.error(f"'gt_index' {right} is none of its {len(choices)} 'answer_options'; correct it")
                yield {
                    "id": f"{number}-{turn}",
                    "image_id": number,
                    "caption": caption,
                    "history": " ".join(said),
                    "question": asked,
                    "choices": choices,
                    "answer": choices[right],
                }
                said.append(f"q: {asked} a: {self._told(entry, answers, entry.number('answer'))}")

    @staticmethod
    def _told(fields: Fields, texts: list[Any], number: Any) -> str:
        """What stands under a number of the file's lists."""
        if type(number) is not int or not 0 <= number < len(texts) or not isinstance(texts[number], str):
            raise fields.error(f"number {number!r} names none of the {len(texts)} texts of the file; fetch it again")
        return str(texts[number])

    def chat(self, fields: Fields) -> dict[str, Any]:
        history = fields.words("history")
        told = f"dialog history: {history}\n" if history else ""
        asked = fill_instruction(self.request, fields.text("question"))
        right = fields.text("answer")
        return {
            "images": [fields.file_name(self.image_pattern, "image_id")],
            "messages": exchange(
                after_image(f'This image has the caption "{fields.text("caption")}". {told}{asked}'), [text(right)]
            ),
            "choices": fields.texts("choices"),
            "answers": [right],
        }
