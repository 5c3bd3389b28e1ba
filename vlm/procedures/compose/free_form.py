"""What InternLM-XComposer2 is asked, step by step (`examples/gradio_demo_composition.py` of InternLM-XComposer-2.0).

An instruction may be any text, and pictures may come with it: they are shown to the author, and then they are the ones
that are chosen from, each once. Every answer is sampled, as in the demo.
"""

from collections.abc import Sequence
from typing import Any

from vlm.language import Decoding
from vlm.procedures.compose.requests import Request, illustrated, numbered, told
from vlm.sample import ImageFile

TEMPLATE = "xcomposer2_compose"
_SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.8, "top_k": 40, "repetition_penalty": 1.005}
DECODINGS = {
    "article": Decoding(max_new_tokens=1024, **_SAMPLED),  # the length is the user's choice in the demo
    "places": Decoding(max_new_tokens=200, **_SAMPLED),
    "caption": Decoding(max_new_tokens=200, **_SAMPLED),
    "choice": Decoding(max_new_tokens=10, **_SAMPLED),
}
MAX_TOKENS = 4095
"""Of a choice between images, without BOS: the demo cuts at 4,096."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def ask_article(instruction: str, images: Sequence[ImageFile] = ()) -> Request:
    shown = _shown(images)
    return Request("article", (*shown[:-1], instruction) if shown else (instruction,), template=TEMPLATE)


def ask_places(sections: Sequence[str], num_images: int | None = None, images: Sequence[ImageFile] = ()) -> Request:
    """Which lines want an image behind them; None: as many as the model likes."""
    wanted = "" if num_images is None else str(num_images)
    text = f'给定文章"{"".join(numbered(sections))}" 根据上述文章，选择适合插入图像的{wanted}行'
    return Request("places", (*_shown(images), text), "适合插入图像的行是", TEMPLATE)


def ask_caption(sections: Sequence[str], place: int, earlier: Sequence[tuple[int, str]]) -> Request:
    """What the image behind a section shows.

    Args:
        earlier: (section, caption) of the images before it, in the order of the answer that named them.
    """
    article = "".join(numbered(sections)[: place + 2])
    text = f'给定文章"{article}" {told(earlier)}给出适合在<Seg{place}>后插入的图像对应的标题。'
    return Request(f"caption {place}", (text,), '标题是"', TEMPLATE)


def ask_choice(
    sections: Sequence[str], place: int, chosen: Sequence[tuple[int, ImageFile]], candidates: Sequence[ImageFile]
) -> Request:
    """Which of some images it is.

    Args:
        chosen: (section, image) of the places before it, in the order of the text.
        candidates: at most 26.
    """
    parts = illustrated(sections, place, chosen)
    for letter, candidate in zip(LETTERS, candidates, strict=False):
        parts += [f"候选图像包括: {letter}." if letter == "A" else f"\n{letter}.", candidate]
    return Request(f"choice {place}", tuple(parts), "最合适的图是", TEMPLATE)


def _shown(images: Sequence[ImageFile]) -> list[str | ImageFile]:
    """Each image with a blank behind it."""
    return [part for image in images for part in (image, " ")]
