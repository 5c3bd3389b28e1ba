"""What `vlm predict` is asked: one prompt about images, or a file of questions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.sources.asked import IMAGE_KEYS, read_question
from vlm.data.sources.folder import SUFFIXES
from vlm.data.sources.json_records import RecordFile
from vlm.errors import SampleError, UserError
from vlm.sample import Sample

_ID_KEYS = ("id", "question_id")
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
    """The questions of a JSON list or JSONL file (`vlm.data.sources.asked`); a bad one as its error.

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
    prompt, sample = read_question(record, identity, source=source, root=root)
    image = next((record[key] for key in IMAGE_KEYS if record.get(key) is not None), None)
    return Question(identity, image, prompt, str(identity) if name is None else name, sample)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
