"""Where the images of a document stand in its text, where a data set tells sentences and images apart."""

from collections.abc import Sequence
from typing import Any, TypeVar

from vlm.errors import UserError

MAX_IMAGES = 6
"""VILA's limit on the images of an MMC4 document."""

T = TypeVar("T")


def interleave(
    sentences: Sequence[str], images: Sequence[tuple[T, int]], *, max_images: int = MAX_IMAGES
) -> tuple[list[dict[str, Any]], list[T]]:
    """A document of MMC4 as VILA reads it: each image stands before the sentence that matches it.

    Of the images the first `max_images` are kept, in the order of the file, and then take the order of their
    sentences. Sentences are joined by a blank; of the blanks beside an image one on each side goes.

    Args:
        images: each with the index of its sentence.

    Returns:
        Content of the one message of a document (see `vlm.sample`), and the images that it shows in their order.

    Raises:
        UserError: an image belongs to a sentence that is not there.
    """
    for number, (_, index) in enumerate(images):
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(sentences):
            raise UserError(
                f"image {number} stands before sentence {index!r}, but the document has {len(sentences)} sentences, "
                "counted from 0; correct matched_text_index or remove the image"
            )
    kept = sorted(images[:max_images], key=lambda image: image[1])
    texts = [""]  # before the first image, and behind each one
    at = 0
    for index, sentence in enumerate(sentences):
        texts[-1] += " " if index else ""
        while at < len(kept) and kept[at][1] == index:
            texts.append("")
            at += 1
        texts[-1] += sentence
    content: list[dict[str, Any]] = []
    for number, words in enumerate(texts):
        if number:
            content.append({"type": "image"})
            words = words.removeprefix(" ")
        if number < len(texts) - 1:
            words = words.removesuffix(" ")
        if words:
            content.append({"type": "text", "text": words})
    return content, [image for image, _ in kept]
