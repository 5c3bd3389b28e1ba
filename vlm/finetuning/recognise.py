"""Data told by looking at it: which reader it is for, and where its images are."""

import inspect
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import vlm.data
from vlm.checkpoints.published.open import is_hub_id
from vlm.data.sources.base import JsonSource, Source
from vlm.data.sources.folder import METADATA, SUFFIXES
from vlm.data.sources.forms import readers_of
from vlm.data.sources.hub import is_saved
from vlm.data.sources.json_records import first_records
from vlm.errors import SampleError, UserError

_LOOKED_AT = 16
_FIRST_RECORDS = 64
_IMAGE_FOLDERS = (".", "images", "image", "imgs", "pictures", "photos", "..")


@dataclass(frozen=True)
class Recognised:
    """Sources as they stand in a YAML file, and what was found out.

    Attributes:
        sources: `class_path` and `init_args` each.
        val_sources: the same, of a YAML that names some.
        num_samples: of all sources.
        said: lines for a person.
    """

    sources: list[dict[str, Any]]
    num_samples: int
    said: list[str]
    val_sources: list[dict[str, Any]] = field(default_factory=list)


def _records_of(path: Path) -> list[str]:
    """Readers of a JSON file, by its first records."""
    if path.is_dir():
        files = sorted([*path.glob("*.json"), *path.glob("*.jsonl")])
        files = [file for file in files if file.name not in (METADATA, "dataset_info.json", "state.json")]
        return _records_of(files[0]) if len(files) == 1 else []
    if path.suffix.lower() not in (".json", ".jsonl"):
        return []
    counted: Counter[str] = Counter()
    if not (beginning := first_records(path, _FIRST_RECORDS)):
        raise UserError(f"{path}: holds no samples; fill it")
    records = [record for record in beginning if readers_of(record)]
    for record in records:
        counted.update(name for name in readers_of(record) if name != "Parquet" and name != "ImageFolder")
    fitting = [name for name, count in counted.items() if count == len(records)]
    if not fitting and counted:
        first, second = [name for name, _ in counted.most_common(2)]
        raise UserError(
            f"{path}: has records of two forms, of vlm.data.{first} and of vlm.data.{second}; split it, or say which "
            f"with --data {first}={path}"
        )
    return fitting[:1]


def _has(pattern: str, *, suffix: str) -> Callable[[Path], bool]:
    def fits(path: Path) -> bool:
        return path.suffix.lower() == suffix or (path.is_dir() and any(path.glob(pattern)))

    return fits


def _has_captions(path: Path) -> bool:
    if not path.is_dir():
        return False
    if (path / METADATA).is_file():
        return True
    images = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    return any(file.with_suffix(".txt").is_file() for file in images)


LOOKS: tuple[tuple[str, Callable[[Path], bool]], ...] = (
    ("HubDataset", lambda path: is_saved(str(path))),
    ("Parquet", _has("*.parquet", suffix=".parquet")),
    ("WebDataset", _has("*.tar", suffix=".tar")),
    ("ImageFolder", _has_captions),
    ("PlainText", lambda path: path.suffix.lower() == ".txt"),
)
"""Readers of what is no JSON, and how their data looks. JSON is told by its records (`vlm.data.sources.forms`)."""


def recognise(word: str, *, images: Path | None, options: dict[str, dict[str, Any]]) -> Recognised:
    """A value of `--data`: a file, a folder, a pattern of files, a dataset's id on the hub, a YAML of sources, or
    `READER=` before one of these.

    Args:
        images: image root, where it is not found by itself.
        options: {reader: further arguments}.

    Raises:
        UserError: nothing there, of no known form or of several, images that are missing, or nothing that can be read.
    """
    reader, path = _split(word)
    if reader is None and path.suffix in (".yaml", ".yml"):
        return _from_yaml(path)
    if reader is None and not path.exists() and is_hub_id(path):
        reader = "HubDataset"
    if not _exists(path) and reader != "HubDataset":
        raise UserError(f"--data {word}: no such file or folder")
    if reader is None:
        reader = _reader_of(word, path)
    return _opened(word, reader, path, images=images, arguments=options.get(reader, {}))


def _split(word: str) -> tuple[str | None, Path]:
    reader, equals, path = word.partition("=")
    if equals and isinstance(getattr(vlm.data, reader, None), type):
        return reader, Path(path).expanduser()
    return None, Path(word).expanduser()


def _exists(path: Path) -> bool:
    return path.exists() or any(mark in path.name for mark in "*?[{") or "://" in str(path)


def _reader_of(word: str, path: Path) -> str:
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"--data {word}: is empty")
    found = [name for name, fits in LOOKS if fits(path)] + _records_of(path)
    if len(found) == 1:
        return found[0]
    if found:
        ways = " or ".join(f"--data {name}={path}" for name in found[:2])
        raise UserError(f"--data {word}: may be for {found[0]} or for {found[1]}; say which with {ways}")
    raise UserError(
        f"--data {word}: has no form that is known: LLaVA's, Qwen-VL's or messages as JSON, parquet, "
        f"folders of images with {METADATA} or captions beside, tars of WebDataset, folders that `datasets` saved, "
        "its ids on the hub, and a YAML of sources (docs/data.md)"
    )


def _from_yaml(path: Path) -> Recognised:
    """Sources as a configuration file has them, as a list or under `sources` (and `val_sources`)."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--data {path}: cannot be read ({' '.join(str(error).split())})") from error
    content = {"sources": content} if isinstance(content, list) else content
    sources = content.get("sources") if isinstance(content, dict) else None
    if not sources or not isinstance(sources, list) or content.keys() - {"sources", "val_sources"}:
        raise UserError(f"--data {path}: must be a list of sources, or hold `sources` and `val_sources` alone")
    made = [_make(entry, path) for entry in sources]
    said = [f"{path}: {len(made)} sources, {sum(map(len, made)):,} records"]
    return Recognised(sources, sum(map(len, made)), said, list(content.get("val_sources") or []))


def _make(entry: Any, path: Path) -> Source:
    if not isinstance(entry, dict) or not isinstance(entry.get("class_path"), str):
        raise UserError(f"--data {path}: a source is {{class_path, init_args}}, found {entry!r}")
    kind = getattr(vlm.data, entry["class_path"].removeprefix("vlm.data."), None)
    if kind is None:
        raise UserError(f"--data {path}: there is no {entry['class_path']}; docs/data.md lists the readers")
    try:
        source: Source = kind(**entry.get("init_args", {}))
    except TypeError as error:
        raise UserError(f"--data {path}: {entry['class_path']}: {error}") from error
    return source


def _opened(word: str, reader: str, path: Path, *, images: Path | None, arguments: dict[str, Any]) -> Recognised:
    kind = getattr(vlm.data, reader)
    parameters = inspect.signature(kind).parameters
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if lacking := [name for name in needed if name != "path"]:
        raise UserError(
            f"--data {word}: is for vlm.data.{reader}, which needs {', '.join(lacking)}; name it in a YAML of sources"
        )
    if path.is_dir() and issubclass(kind, JsonSource):
        (path,) = [f for f in sorted([*path.glob("*.json"), *path.glob("*.jsonl")]) if f.name != METADATA]
    if path.is_dir() and reader == "WebDataset":
        path = path / "*.tar"
    init: dict[str, Any] = {"path": str(path), **arguments}
    takes_root = issubclass(kind, JsonSource) or "image_root" in parameters
    if images is not None and not images.is_dir():
        raise UserError(f"--images {images}: no such folder")
    source = kind(**init)
    tried: list[tuple[Path | None, _Look]] = []
    for root in ([images] if images is not None else _roots(path)) if takes_root else [None]:
        if root is not None:
            source.image_root = root
        tried.append((root, _look(source)))
        if not tried[-1][1].missing:
            break
    root, look = min(tried, key=lambda pair: len(pair[1].missing))
    if look.pictured and len(look.missing) == look.pictured:
        where = ", ".join(str(root) for root, _ in tried)
        raise UserError(
            f"--data {word}: its images are missing: {look.missing[0]}; looked in {where}; say where "
            "they are with --images DIR"
        )
    if len(look.bad) == look.seen:
        raise UserError(f"--data {word}: none of {look.seen} records can be read; the first: {look.bad[0]}")
    if root is not None and look.pictured:
        init["image_root"] = str(root)
    said = f"{path}: vlm.data.{reader}, {look.num:,} records"
    said += f", images in {root}" if "image_root" in init else "" if look.pictured else ", text alone"
    lines = [said]
    for kind_of, found in (("an image that is missing or broken", look.missing), ("a fault", look.bad)):
        if found:
            lines.append(
                f"  {len(found)} of {look.seen} that were looked at have {kind_of} ({found[0]}); `vlm check-data` "
                "finds all"
            )
    return Recognised([{"class_path": f"vlm.data.{reader}", "init_args": init}], look.num, lines)


def _roots(path: Path) -> list[Path | None]:
    """Where image paths may start: by the file, in usual folders beside it, here, or at the root of the disk."""
    if "://" in str(path):
        return [None]
    folder = path if path.is_dir() else path.parent
    beside = [Path(os.path.normpath(folder / name)) for name in _IMAGE_FOLDERS]
    return [root for root in dict.fromkeys([*beside, Path(), Path("/")]) if root.is_dir()]


@dataclass(frozen=True)
class _Look:
    """A look at some samples of a source.

    Attributes:
        num: samples of the source.
        seen: of those looked at.
        pictured: of these, those with images.
        missing: what is wrong with images, a reason for each such sample.
        bad: what else is wrong.
    """

    num: int
    seen: int
    pictured: int
    missing: list[str]
    bad: list[str]


def _look(source: Source) -> _Look:
    num = len(source)
    if not num:
        raise UserError(f"{source.name}: holds no samples; fill it")
    chosen = sorted({num * at // _LOOKED_AT for at in range(_LOOKED_AT)})
    missing, bad, pictured = [], [], 0
    for index in chosen:
        try:
            sample = source[index]
            pictured += bool(sample.images)
            for image in sample.images:
                image.size(sample)
        except SampleError as error:
            if error.kind == "image":
                pictured += not _reads(source, index)
                missing.append(f"sample {error.sample_id!r}: {error.reason}")
            else:
                bad.append(f"sample {error.sample_id!r}: {error.reason}")
    return _Look(num, len(chosen), pictured, missing, bad)


def _reads(source: Source, index: int) -> bool:
    """Whether the record itself can be read; an image outside of its root is found on the way."""
    try:
        source[index]
    except SampleError:
        return False
    return True
