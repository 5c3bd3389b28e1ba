"""What somebody asks in Python, as samples: records like those in files, with images from memory too."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlm.data.sources.base import IMAGE_MARK, content_parts
from vlm.data.sources.messages import TURN_KEYS, chat_record
from vlm.errors import SampleError, UserError
from vlm.sample import MAX_PIXELS, Sample, parse_sample
from vlm.sample.keys import check_record

Asked = Sample | Mapping[str, Any]
"""A sample, or a record of one: a question or a conversation."""

IMAGE_KEYS = ("image", "images")
_PROMPT_KEYS = ("prompt", "question", "text")
_READ = (*_PROMPT_KEYS, *IMAGE_KEYS, "ocr")


def as_samples(asked: Asked | Sequence[Asked]) -> list[Sample]:
    """One question or conversation, or a list of them.

    ::

        {"image": "cat.jpg", "prompt": "What is this?"}                         what `vlm predict --questions` reads
        {"image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}]}
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"},
                                                   {"type": "text", "text": "What is this?"}]}]}

    An image is a path, an image of PIL, or the bytes of a file. Paths start at the working directory.

    Raises:
        SampleError: a record of another form, named by its `id` or its place in the list.
        UserError: neither records nor a list of them.
    """
    if isinstance(asked, Sample | Mapping):
        return [_as_sample(asked, 0)]
    if isinstance(asked, str) or not isinstance(asked, Sequence):
        raise UserError(
            f"asked {asked!r:.80}: a question is {{'image': 'cat.jpg', 'prompt': 'What is this?'}}, or a list of such"
        )
    return [_as_sample(record, at) for at, record in enumerate(asked)]


def _as_sample(record: Any, at: int) -> Sample:
    if isinstance(record, Sample):
        return record
    if not isinstance(record, Mapping):
        raise SampleError(f"expected a question, found {type(record).__name__}", sample_id=str(at), source="<memory>")
    if not any(record.get(key) is not None for key in TURN_KEYS):
        return read_question(record, record.get("id", at), source="<memory>")[1]
    error = partial(SampleError, sample_id=str(record.get("id", at)), source="<memory>")
    made = chat_record(record, at, error=error, max_pixels=MAX_PIXELS)
    return parse_sample(made, position=at)


def read_question(
    record: Mapping[str, Any], identity: Any, *, source: str, root: Path | None = None
) -> tuple[str, Sample]:
    """The prompt of a question and the sample that asks it.

    ::

        {"image": "a.png", "prompt": "What is this?"}             an image
        {"image": ["a.png", "b.png"], "prompt": "What differs?"}  several; or {"prompt": "<image> and <image>?"}
        {"prompt": "Hello"}                                       none
        {"image": "a.png", "prompt": "Read.", "ocr": ["Exit"]}    with texts found in it, as Mini-Gemini is told them

    Args:
        identity: of the sample.
        root: folder that paths start at and that none may leave; None: the working directory, which they may.

    Raises:
        SampleError: it is no question.
    """
    error = partial(SampleError, sample_id=str(identity), source=source)
    prompt = _one_of(record, _PROMPT_KEYS, error)
    if not isinstance(prompt, str) or not prompt.strip():
        keys = f"the record has the keys {sorted(map(str, record))}, a question is {{'image', 'prompt'}}"
        raise error(f"key 'prompt' must be a text, found {prompt!r}; {keys}")
    text = prompt if record.get("ocr") is None else _with_ocr(prompt, record["ocr"], error)
    image = _one_of(record, IMAGE_KEYS, error)
    files = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    check_record(record, read=_READ, has_images=bool(files), error=error)
    if IMAGE_MARK in text:
        content = content_parts(text)
    else:  # as the systems were trained: every image on a line of its own, in front
        content = [part for _ in files for part in ({"type": "image"}, {"type": "text", "text": "\n"})]
        content = [*content[:-1], {"type": "text", "text": f"\n{text}" if files else text}]
    sample = parse_sample(
        {"id": str(identity), "images": files, "messages": [{"role": "user", "content": content}]},
        source=source,
        image_root=root,
    )
    return prompt, sample


def _with_ocr(prompt: str, ocr: Any, error: Any) -> str:
    from vlm.prompts.mini_gemini import asked  # imports torch

    if not isinstance(ocr, list) or not all(isinstance(text, str) for text in ocr):
        raise error(f"'ocr' must be a list of texts, found {ocr!r}")
    return asked(prompt, ocr=ocr)


def _one_of(record: Mapping[str, Any], keys: Sequence[str], error: Any) -> Any:
    found = [key for key in keys if record.get(key) is not None]
    if len(found) > 1:
        raise error(f"has both {found[0]!r} and {found[1]!r}; keep one of them")
    return record[found[0]] if found else None
