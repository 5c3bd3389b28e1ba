"""Which reader a record is for, told by its keys: said where another one cannot read it."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vlm.errors import SampleError

_QWEN_MARKS = re.compile(r"<img>[^<>]+</img>|<box>|<ref>")
_OTHER_FAULTS = ("image", "region", "too long", "no label")
"""Of a sample that was read as what it is."""


def reader_of(record: Any) -> str | None:
    """Name of the class in `vlm.data` that reads a record of this form; None where no form is known."""
    return next(iter(readers_of(record)), None)


@contextmanager
def read_with(reader: str, record: Any) -> Iterator[None]:
    """Adds to a `SampleError` within it which reader the record is for, where that is another one."""
    try:
        yield
    except SampleError as error:
        readers = readers_of(record)
        if not readers or reader in readers or error.kind in _OTHER_FAULTS:
            raise
        reason = f"{error.reason}; the record has the form that vlm.data.{readers[0]} reads"
        raise SampleError(reason, sample_id=error.sample_id, source=error.source, kind=error.kind) from error


def readers_of(record: Any) -> tuple[str, ...]:
    """Names of the classes in `vlm.data` that read a record of this form, the usual one first."""
    if not isinstance(record, Mapping):
        return ()
    return next((readers for readers, fits in _FORMS if fits(record)), ())


def _has(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda record: all(key in record for key in keys)


def _first(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    entries = record.get(key)
    first = entries[0] if isinstance(entries, list) and entries else None
    return first if isinstance(first, Mapping) else {}


def _texts(record: Mapping[str, Any], key: str, inner: str) -> list[str]:
    turns = record.get(key)
    values = [turn.get(inner) for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    return [value for value in values if isinstance(value, str)]


def _is_qwen(record: Mapping[str, Any]) -> bool:
    texts = _texts(record, "conversations", "value")
    return any(_QWEN_MARKS.search(text) for text in texts) and not any("<image>" in text for text in texts)


def _is_llava(record: Mapping[str, Any]) -> bool:
    roles = _texts(record, "conversations", "from")
    return bool(roles) and {*roles} <= {"system", "human", "gpt"}


def _marks_in_strings(record: Mapping[str, Any]) -> bool:
    return any("<image>" in text for text in _texts(record, "messages", "content"))


_FORMS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], bool]], ...] = (
    (("QwenJson",), _is_qwen),
    (("LlavaJson", "MessagesJson", "Parquet"), _is_llava),
    (("MessagesJson", "Parquet"), _has("conversations")),
    (("MessagesJson", "Parquet"), _marks_in_strings),
    (("MessagesJson", "ChatJson", "Parquet"), _has("messages")),
    (("Mmc4", "Mmc4Pairs"), _has("text_list", "image_info")),
    (("Obelics",), _has("images", "texts")),
    (("GroundedCaptions",), lambda record: "caption" in record and ("ref_exps" in record or "noun_chunks" in record)),
    (("ReferringExpressions",), _has("image", "bbox", "sentences")),
    (("QwenReferring",), _has("image", "bbox", "sent")),
    (("VideoCaptions",), _has("clip_name", "caption")),
    (("TextLines",), _has("image", "lines")),
    (("ScreenElements",), _has("image", "elements")),
    (("ScreenSpot",), _has("img_filename", "instruction", "bbox")),
    (("Mind2Web",), _has("annotation_id", "actions", "action_reprs")),
    (("ChartQA",), _has("imgname", "query", "label")),
    (("CocoCaptions",), _has("images", "annotations")),
    (("KarpathyCaptions",), lambda record: "sentences" in _first(record, "images")),
    (("VQAv2Training",), lambda record: "question_id" in _first(record, "questions")),
    (("DocVQA",), lambda record: "questionId" in _first(record, "data")),
    (("ImagePairs",), _has("images", "question", "answer")),
    (("QwenQuestions", "VisualFlan"), _has("image", "question", "answer", "question_id")),
    (("VisualFlan",), lambda record: "inputs" in record and ("outputs" in record or "targets" in record)),
    (("VisualFlan",), lambda record: "question" in record and isinstance(record.get("image"), list)),
    (("VisualFlan", "QwenQuestions"), _has("question", "answer")),
    (("ImageFolder",), _has("file_name", "text")),
    (("PlainText",), _has("text")),
)
"""Readers of each form, the usual one first."""
