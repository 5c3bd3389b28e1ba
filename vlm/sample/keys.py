"""Keys of records and turns: obeyed by whoever reads them, refused if they mean something, else the user's own.

Data of other tools brings keys that mean something there (`tools`, `videos`, an image under another name). What they
say would be lost in silence; so they are an error by name. All others (`source`, `license`, `height`, ...) pass.
"""

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from PIL import Image

from vlm.errors import SampleError, quoted

MakeError = Callable[..., SampleError]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Endings of files that count as images."""
FLAGS, NUMBERS = ("train", "loss"), ("weight", "loss_weight", "loss_scale")
"""Keys of a turn that say whether, or how much, it is trained: true or false, and factors."""
TURN_EXTRAS = (*FLAGS, *NUMBERS, "begun")
"""Keys of a turn that every form of a conversation hands on."""

_IMAGES = ("image", "images")
_OTHER_NAMES = frozenset(
    {"img", "imgs", "image_path", "image_paths", "image_file", "image_files", "image_url", "image_urls", "img_path"}
    | {"picture", "pictures", "photo", "photos", "file_name", "filename", "imgname", "image_name"}
)
_TURNS = ("messages", "conversations")
_NO_SOUND = "nothing here reads it; leave the record out, or remove the key to train on the text without it"
_NO_TOOLS = "no system here is told of tools; write them into the text, or remove the key"
_NO_PREFERENCE = "preferences are not trained on; keep the answer that is to be trained as a turn, and remove the key"
_REFUSED = {
    **dict.fromkeys(("video", "videos", "audio", "audios"), _NO_SOUND),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), _NO_TOOLS),
    **dict.fromkeys(("chosen", "rejected", "rejected_response"), _NO_PREFERENCE),
    **dict.fromkeys(("loss_weight", "sample_weight"), "weights stand in the assistant's turns; write it there"),
}
_REFUSED_IN_TURNS = {
    **{key: remedy for key, remedy in _REFUSED.items() if key not in TURN_EXTRAS},
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"), "write it into the answer's text if it is to be trained"
    ),
}
_OWN_IMAGE = ("image", "path", "url", "image_url", "images")
"""Where an image part may name its image, as transformers, OpenAI and LLaMA-Factory write it."""


def is_empty(value: Any) -> bool:
    return value is None or value in ("[]", "{}") or (isinstance(value, Sequence | Mapping) and not value)


def check_record(record: Mapping[str, Any], *, read: Collection[str], has_images: bool, error: MakeError) -> None:
    """Refuses a key that means something and that nobody reads.

    Args:
        read: keys that the reader looks at.
        has_images: the sample got images, so that others may be noted beside them (`image_url`).
        error: makes the exception.

    Raises:
        SampleError: names the key and says what to do.
    """
    for key, value in record.items():
        if key in read or is_empty(value):
            continue
        name = str(key).casefold()
        if name in _REFUSED:
            raise error(f"key {quoted(key)}: {_REFUSED[name]}")
        if name in (*_IMAGES, *_TURNS, "system"):
            raise error(f"key {quoted(key)} is not read in this form; {_known(name, read, key)}")
        if not has_images and _looks_like_image(value) and (name in _OTHER_NAMES or _near(name, _IMAGES)):
            raise error(f"key {quoted(key)}: {_did_you_mean(_one_of(_IMAGES, read))}")
        if isinstance(value, list) and isinstance(value[0], Mapping) and (near := _near(name, _TURNS)):
            raise error(f"key {quoted(key)}: {_did_you_mean(_one_of((near, *_TURNS), read))}")
        if isinstance(value, str) and (name == "system_prompt" or _near(name, ("system",))):
            raise error(f"key {quoted(key)}: {_did_you_mean(_one_of(('system',), read))}")


def check_turn(turn: Mapping[str, Any], *, read: Collection[str], where: str, error: MakeError) -> None:
    """The same for a turn of a conversation."""
    for key, value in turn.items():
        if key in read or key in TURN_EXTRAS or is_empty(value):
            continue
        name = str(key).casefold()
        if name in _REFUSED_IN_TURNS:
            raise error(f"{where}: key {quoted(key)}: {_REFUSED_IN_TURNS[name]}")
        if (name in _IMAGES or name in _OTHER_NAMES) and _looks_like_image(value):
            raise error(
                f"{where}: key {quoted(key)}: images are named in the record or in a part of the turn "
                "({'type': 'image', 'image': path}); move it there",
                kind="image",
            )
        near = _near(name, (*FLAGS, *NUMBERS))
        if near and near[0] == name[0] and isinstance(value, bool | int | float):
            raise error(f"{where}: key {quoted(key)}: {_did_you_mean(near)}")


def turn_weight(turn: Mapping[str, Any], *, where: str, error: MakeError) -> float:
    """How much a turn is trained: 1 unless it says otherwise, 0 for not at all.

    Raises:
        SampleError: no number, two that differ, or a turn of the user that is to be trained.
    """
    given = {key: turn[key] for key in (*FLAGS, *NUMBERS) if turn.get(key) is not None}
    factors: dict[float, str] = {}
    off = False
    for key, value in given.items():
        if isinstance(value, bool) or value in (0, 1):
            off |= not value
            continue
        if key in FLAGS:
            raise error(f"{where}: {key!r} must be true or false, found {quoted(value)}; a factor is called 'weight'")
        if not isinstance(value, int | float) or not _is_finite(value) or value < 0:
            raise error(f"{where}: {key!r} must be a number of at least 0, found {quoted(value)}")
        factors[float(value)] = key
    if len(factors) > 1:
        names = " and ".join(map(repr, factors.values()))
        raise error(f"{where}: {names} differ; keep one of them")
    if turn.get("role") != "assistant":
        asks = next((key for key, value in given.items() if value is True or value not in (0, 1)), None)
        if asks is not None:
            raise error(
                f"{where}: {asks!r} asks to train on a turn of the {turn.get('role')}; answers alone are trained, "
                "remove it"
            )
        return 1.0
    return 0.0 if off else next(iter(factors), 1.0)


def own_image(part: Mapping[str, Any]) -> Any:
    """The image that an image part names itself; None where the record's list does."""
    for key in _OWN_IMAGE:
        value = part.get(key)
        if isinstance(value, Mapping):
            value = next((value[inner] for inner in ("url", "path", "bytes") if not is_empty(value.get(inner))), None)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if not is_empty(value):
            return value
    return None


def names_images(turns: Any) -> bool:
    """Whether parts of some turns name their images."""
    return isinstance(turns, list) and any(
        isinstance(part, Mapping) and part.get("type") in ("image", "image_url") and own_image(part) is not None
        for turn in turns
        if isinstance(turn, Mapping)
        for content in (turn.get("content"), turn.get("value"))
        if isinstance(content, list)
        for part in content
    )


def _looks_like_image(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and _looks_like_image(value[0])
    if isinstance(value, Mapping):
        return any(not is_empty(value.get(key)) for key in ("bytes", "path", "url"))
    if isinstance(value, str):
        return value.startswith("data:image") or PurePosixPath(value[-8:].casefold()).suffix in SUFFIXES
    return isinstance(value, bytes | Image.Image)


def _near(name: str, known: Sequence[str]) -> str | None:
    """The known key that this one misspells. `image_id` and `image_size` are none."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return found[0] if found else None


def _one_of(wanted: Sequence[str], read: Collection[str]) -> str | None:
    return next((key for key in wanted if key in read), None)


def _did_you_mean(key: str | None) -> str:
    return f"did you mean {key!r}?" if key else "nothing here reads it; remove it, or read the file with another class"


def _known(name: str, read: Collection[str], key: str) -> str:
    same = _one_of(_IMAGES if name in _IMAGES else _TURNS if name in _TURNS else ("system",), read)
    return f"did you mean {same!r}?" if same else f"remove {quoted(key)}, or read the file with the class for its form"


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False
