"""What can be said of one sample."""

import hashlib
import re
from typing import Any

from vlm.batch import IGNORE
from vlm.codec import Encoded
from vlm.data.loading.encoder import Encoder
from vlm.sample import ImageFile, ImagePart, Message, TextPart

KINDS = {
    "schema": "not a sample",
    "marks": "image marks and images differ",
    "region": "box, quad or point outside of its image",
    "image": "image missing, broken or too large",
    "too long": "over the limit of tokens",
    "no label": "nothing to train on",
    "encoding": "cannot be encoded",
    "copy": "a copy of an earlier sample",
}
"""What can be wrong with a sample: `vlm.errors.Fault`, or where it was met, or a copy."""
SCRIPTS = ("latin", "han", "other", "none")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")


def encode(encoder: Encoder, index: int, *, epoch: int) -> Encoded:
    """A sample as it is trained or judged: a question without an answer is encoded up to where the answer begins."""
    if not encoder.training and encoder.samples[index].messages[-1].role == "user":
        return encoder.codec.encode(encoder.samples[index], generate=True)
    return encoder(index, epoch=epoch)


def sizes_of(item: Encoded) -> tuple[int, int, int]:
    """Tokens, trained tokens, and tokens of images."""
    sequences = [*item.text, *(sequence for row in item.rows.values() for sequence in row)]
    labels = sum(int((sequence.targets != IGNORE).sum()) for sequence in sequences)
    visual = sum(len(positions) for sequence in sequences for positions in sequence.slots.values())
    return item.num_tokens, labels, visual


def script_of(text: str) -> int:
    """Index of `SCRIPTS`: what most letters of a text are."""
    latin, han = len(_LATIN.findall(text)), len(_HAN.findall(text))
    other = sum(character.isalpha() for character in text) - latin - han if not text.isascii() else 0
    counts = [latin, han, other]
    return counts.index(max(counts)) if max(counts) > 0 else SCRIPTS.index("none")


def hashed(*values: str | bytes) -> int:
    """64 bits that depend on all values; never 0."""
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "big") or 1


def content_of(message: Message) -> str:
    """All of a message, for a hash."""
    return repr((message.role, [_part(part) for part in message.content]))


def _part(part: Any) -> Any:
    if isinstance(part, TextPart):
        return part.text
    return "<image>" if isinstance(part, ImagePart) else (type(part).__name__, repr(part))


def file_key(file: ImageFile, *owner: int) -> int:
    """A hash that images have in common that are one file; else one of the picture's `owner` and its place there."""
    if type(file) is ImageFile and file.path is not None:  # others lie inside of a larger file
        return hashed("path", str(file.path))
    if type(file) is ImageFile and file.data is not None:
        return hashed("data", file.data)
    return hashed("part", *map(str, owner))
