"""Chats as Hugging Face and ShareGPT tools keep them, told by their keys and brought to the form of `vlm.sample`."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from vlm.data.sources.base import EXTRA_KEYS, JsonSource, content_of, turn_extras, with_system, without_turns
from vlm.errors import SampleError, quoted
from vlm.sample import ImageFile
from vlm.sample.keys import MakeError, check_record, check_turn, names_images

TURN_KEYS = ("messages", "conversations")
IMAGE_KEYS = ("images", "image")
_KEYS = frozenset({"id", "system", *TURN_KEYS, *IMAGE_KEYS, *EXTRA_KEYS})
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


class MessagesJson(JsonSource):
    """Chats in any of the usual spellings, told record by record.

    ::

        {"messages": [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": "A boat."}],
         "images": ["a.png"]}
        {"conversations": [{"from": "human", "value": "<image>What is this?"}, {"from": "gpt", "value": "A boat."}],
         "system": "Be brief.", "image": "a.png"}

    Content is a list of parts, as in `ChatJson`, or a string; in a string `<image>` is the place of an image. An
    image is a path, in the record or in its part (`{"type": "image", "image": "a.png"}`). Roles are `system`, `user` or
    `human`, `assistant` or `gpt`. A turn may say `weight` (or `loss`, `train`, `loss_weight`).
    """

    @staticmethod
    def _flag(record: Mapping[str, Any]) -> bool:
        listed = any(record.get(key) for key in IMAGE_KEYS)
        return listed or any(names_images(record.get(key)) for key in TURN_KEYS)

    def _schema(self, record: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        error = partial(SampleError, sample_id=str(record.get("id", index)), source=str(self.path))
        return chat_record(record, index, error=error, max_pixels=self.max_pixels)


def chat_record(record: Mapping[str, Any], index: int, *, error: MakeError, max_pixels: int) -> dict[str, Any]:
    """A record in the form of `vlm.sample`; see `MessagesJson`.

    An image may also be `{"bytes": ..., "path": ...}`, as in rows of the `datasets` library.

    Raises:
        SampleError: made by `error`.
    """
    turns = _one_of(record, TURN_KEYS, error)
    if turns is None:
        raise error(f"neither 'messages' nor 'conversations' is there; {without_turns(record)}")
    key = next(key for key in TURN_KEYS if record.get(key) is not None)
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise error(f"{key!r} must be a list of at least one turn")
    messages = [_message(turn, f"{key}[{at}]", error) for at, turn in enumerate(turns)]
    messages = with_system(messages, record.get("system"), error=error)
    images = _one_of(record, IMAGE_KEYS, error)
    images = [] if images is None else images if isinstance(images, list) else [images]
    check_record(record, read=_KEYS, has_images=bool(images) or names_images(turns), error=error)
    identity = record.get("id")
    return {
        "id": index if identity is None else identity,
        "messages": messages,
        "images": [_image(image, error, max_pixels) for image in images],
        **{key: record[key] for key in EXTRA_KEYS if record.get(key) is not None},
    }


def _one_of(record: Mapping[str, Any], keys: Sequence[str], error: MakeError) -> Any:
    found = [key for key in keys if record.get(key) is not None]
    if len(found) > 1:
        raise error(f"has both {found[0]!r} and {found[1]!r}; keep one of them")
    return record[found[0]] if found else None


def _message(turn: Any, key: str, error: MakeError) -> dict[str, Any]:
    if isinstance(turn, Mapping):
        check_turn(turn, read=("role", "content", "from", "value"), where=key, error=error)
    if not isinstance(turn, Mapping) or not ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys()):
        raise error(f"{key} must be an object with 'role' and 'content', or with 'from' and 'value'")
    names = ("role", "content") if "role" in turn and "content" in turn else ("from", "value")
    role, content = turn[names[0]], turn[names[1]]
    if not isinstance(role, str) or role not in _ROLES:
        raise error(f"{key}: unknown role {quoted(role)}; use one of {', '.join(_ROLES)}")
    return {
        "role": _ROLES[role],
        "content": content_of(content, f"{key}: {names[1]!r}", error),
        **turn_extras(turn),
    }


def _image(entry: Any, error: MakeError, max_pixels: int) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    data, path = entry.get("bytes"), entry.get("path")
    if data is None and path is None:
        raise error("an image has neither 'bytes' nor 'path'", kind="image")
    if data is None:
        return path
    if not isinstance(data, bytes):
        what = type(data).__name__
        raise error(
            f"the 'bytes' of image {quoted(path)} are a {what}; JSON cannot hold them, use a path", kind="image"
        )
    return ImageFile(name=path or "<bytes>", data=data, max_pixels=max_pixels)
