"""What `vlm predict` is asked: one prompt about images, or a file of questions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vlm.data.sources.base import IMAGE_MARK, content_parts
from vlm.data.sources.folder import SUFFIXES
from vlm.data.sources.json_records import RecordFile
from vlm.errors import SampleError, UserError
from vlm.sample import ImageFile, Sample, parse_sample

_PROMPT_KEYS = ("prompt", "question", "text")
_ID_KEYS = ("id", "question_id")
_IMAGE_KEYS = ("image", "images")
_SHOWN = 5


@dataclass(frozen=True)
class Question:
    """A question that could be read.

    Attributes:
        id: as in the output.
        image: the same: a path, several, or None.
        name: for files about it.
    """

    id: Any
    image: str | list[str] | None
    prompt: str
    name: str
    sample: Sample


def about_pictures(paths: Sequence[str], prompt: str) -> tuple[list[Question | SampleError], list[str]]:
    """One prompt about each image of some files and folders, or about none.

    Returns:
        The questions, and a sentence for each folder that holds other files too.

    Raises:
        UserError: a folder without images.
    """
    if not paths:
        return [_question({"prompt": prompt}, "text", source="command line", root=None, name="text")], []
    names: dict[str, str] = {}
    notes: list[str] = []
    for path in paths:
        if not Path(path).is_dir():
            names.setdefault(path, Path(path).stem)
            continue
        inside = [file.relative_to(path) for file in sorted(Path(path).rglob("*")) if file.is_file()]
        visible = [file for file in inside if not any(part.startswith(".") for part in file.parts)]
        pictures = [file for file in visible if file.suffix.lower() in SUFFIXES]
        others = [str(file) for file in visible if file.suffix.lower() not in SUFFIXES]
        if not pictures:
            found = f" ({len(others)} other files: {_some(others)})" if others else ""
            raise UserError(f"{path}: holds no pictures{found}; they end in {', '.join(sorted(SUFFIXES))}")
        if others:
            notes.append(f"{path}: left out {len(others)} files that are no pictures by their names: {_some(others)}")
        for file in pictures:
            names.setdefault(str(Path(path) / file), str(file.with_suffix("")))
    made = [
        _try({"id": file, "image": file, "prompt": prompt}, file, source="command line", root=None, name=name)
        for file, name in names.items()
    ]
    return made, notes


def from_file(path: Path, image_root: Path | None) -> list[Question | SampleError]:
    """The questions of a JSON list or JSONL file; a bad one as its error.

    ::

        {"id": 7, "image": "a.png", "prompt": "What is this?"}    an image
        {"image": ["a.png", "b.png"], "prompt": "What differs?"}  several; or {"prompt": "<image> and <image>?"}
        {"prompt": "Hello"}                                       none
        {"image": "a.png", "prompt": "Read.", "ocr": ["Exit"]}    with texts found in it, as Mini-Gemini is told them

    `question_id` for `id`, `question` or `text` for `prompt`, and `images` for `image` are read as well.

    Raises:
        UserError: not such a file.
    """
    records = RecordFile(path, flag=lambda _: False)
    root = path.parent if image_root is None else image_root
    questions = [_try(records[at], at, source=str(path), root=root) for at in range(len(records))]
    if not any(isinstance(question, Question) for question in questions):
        raise UserError(f"{path}: none of its {len(questions)} records is a question; the first: {questions[0]}")
    return questions


def file_names(questions: Sequence[Question | SampleError]) -> dict[int, str]:
    """A file name without ending for each question, by position: its own, with a number where they are alike."""
    seen: Counter[str] = Counter()
    names = {}
    for at, question in enumerate(questions):
        if isinstance(question, SampleError):
            continue
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in question.name).strip("._")[-100:] or "picture"
        seen[name] += 1
        names[at] = name if seen[name] == 1 else f"{name}-{seen[name]}"
    return names


def _try(record: Mapping[str, Any], default: Any, **place: Any) -> Question | SampleError:
    try:
        return _question(record, default, **place)
    except SampleError as error:
        return error


def _question(
    record: Mapping[str, Any], default: Any, *, source: str, root: Path | None, name: str | None = None
) -> Question:
    identity = next((record[key] for key in _ID_KEYS if record.get(key) is not None), default)
    error = partial(SampleError, sample_id=str(identity), source=source)
    prompt = _one_of(record, _PROMPT_KEYS, error)
    if not isinstance(prompt, str) or not prompt.strip():
        keys = f"the record has the keys {sorted(record)}, a question is {{'image', 'prompt'}}"
        raise error(f"key 'prompt' must be a text, found {prompt!r}; {keys}")
    text = prompt if record.get("ocr") is None else _with_ocr(prompt, record["ocr"], error)
    image = _one_of(record, _IMAGE_KEYS, error)
    files = [] if image is None else image if isinstance(image, list) else [image]
    if IMAGE_MARK in text:
        content = content_parts(text)
    else:  # as the systems were trained: every image on a line of its own, in front
        content = [part for _ in files for part in ({"type": "image"}, {"type": "text", "text": "\n"})]
        content = [*content[:-1], {"type": "text", "text": f"\n{text}" if files else text}]
    pictures = [ImageFile(name=file, path=Path(file)) for file in files] if root is None else files
    sample = parse_sample(
        {"id": str(identity), "images": pictures, "messages": [{"role": "user", "content": content}]},
        source=source,
        image_root=root,
    )
    return Question(identity, image, prompt, str(identity) if name is None else name, sample)


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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
