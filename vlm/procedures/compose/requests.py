"""What the model is asked, step by step, and how its answers are read (`web_demo.py` of InternLM-XComposer).

The texts are what the model was trained on, so they are Chinese whatever language the title is in.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlm.language import Decoding
from vlm.sample import ImageFile, ImagePart, Message, Sample, TextPart

# `max_length` of the published calls counts the token that an answer starts behind, hence one less of each
DECODINGS = {
    "article": Decoding(max_new_tokens=999, num_beams=5, repetition_penalty=5.0),
    "places": Decoding(max_new_tokens=299, num_beams=5),
    "caption": Decoding(max_new_tokens=99, repetition_penalty=5.0),
    "choice": Decoding(max_new_tokens=9, num_beams=5),
}
"""How each kind of answer is searched for."""
MAX_TOKENS = 1678
"""Of a choice between images, without BOS: 1,680 in `web_demo.py`, of which its last two are cut off."""
MAX_SECTIONS = 60
NUM_CANDIDATES = 4
CAPTION_CHARACTERS = 53
"""Of a caption, what the index is asked for."""
_BLANK_LINES = re.compile(r"(\n[ \t]*)+")
_PLACE = re.compile(r"<Seg([0-9]+)>")


@dataclass(frozen=True)
class Request:
    """One question to the model.

    Attributes:
        name: of the step.
        parts: texts and images of what is asked.
        begun: how its answer begins.
        template: of `vlm.prompts`.
    """

    name: str
    parts: tuple[str | ImageFile, ...]
    begun: str = ""
    template: str = "xcomposer_plain"

    def sample(self, title: str) -> Sample:
        """The request as what a system is asked; errors name the article."""
        content = tuple(TextPart(part) if isinstance(part, str) else ImagePart() for part in self.parts)
        messages = [Message("user", content)]
        if self.begun:
            messages.append(Message("assistant", (TextPart(self.begun),), begun=True))
        images = tuple(part for part in self.parts if isinstance(part, ImageFile))
        return Sample(f"{title}: {self.name}", tuple(messages), images, source="vlm run compose")

    def without_first(self, fixed: int) -> "Request":
        """It without the first thing behind its first `fixed` parts."""
        return replace(self, parts=(*self.parts[:fixed], *self.parts[fixed + 1 :]))


def ask_article(title: str) -> Request:
    return Request("article", (f"根据给定标题写一个图文并茂，不重复的文章：{title}\n",))


def sections_of(article: str, *, limit: int = MAX_SECTIONS) -> list[str]:
    """The lines of an article, without blank ones; at most `limit`."""
    return _BLANK_LINES.sub("\n", article).strip("\n").split("\n")[:limit]


def numbered(sections: Sequence[str]) -> list[str]:
    """Sections as the model is shown them, each with its number, from 0."""
    return [f"<Seg{number}> {text}\n" for number, text in enumerate(sections)]


def ask_places(sections: Sequence[str], num_images: int | None = None) -> Request:
    """Which lines want an image behind them; None: as many as the model likes."""
    wanted = "" if num_images is None else str(num_images)
    article = "".join(numbered(sections))
    text = f'给定文章"{article}" 根据上述文章，选择适合插入图像的{wanted}行 \n'
    return Request("places", (text,), "适合插入图像的行是")


def read_places(answer: str, num_sections: int) -> list[int]:
    """The sections that an answer names, in its order, each once; one that the article does not have is left out."""
    named = (int(number) for number in _PLACE.findall(answer))
    return [place for place in dict.fromkeys(named) if place < num_sections]


def ask_caption(sections: Sequence[str], place: int, earlier: Sequence[tuple[int, str]]) -> Request:
    """What the image behind a section shows.

    Args:
        earlier: (section, caption) of the images before it, in the order of the answer that named them.
    """
    article = "".join(numbered(sections)[: place + 2])
    text = f' 给定文章"{article}" {told(earlier)}给出适合在<Seg{place}>后插入的图像对应的标题。 \n'
    return Request(f"caption {place}", (text,), ' 标题是"')


def told(earlier: Sequence[tuple[int, str]]) -> str:
    """The captions that images before have, by section; nothing where there are none."""
    said = "， ".join(f'<Seg{number}>后插入图像对应的标题是"{caption}"' for number, caption in earlier)
    return f"现在{said}。" if said else ""


def read_caption(answer: str) -> str:
    return answer.split('"')[0].strip()


def ask_choice(
    sections: Sequence[str], place: int, chosen: Sequence[tuple[int, ImageFile]], candidates: Sequence[ImageFile]
) -> Request:
    """Which of four images it is.

    Args:
        chosen: (section, image) of the places before it, in the order of the text.
        candidates: four images.
    """
    parts = [*illustrated(sections, place, chosen), "\n\n候选图像包括: A."]
    for candidate, behind in zip(candidates, ("\nB.", "\nC.", "\nD.", "\n\n"), strict=True):
        parts += [candidate, behind]
    return Request(f"choice {place}", tuple(parts), "最合适的图是", template="xcomposer_choose")


def illustrated(sections: Sequence[str], place: int, chosen: Sequence[tuple[int, ImageFile]]) -> list[str | ImageFile]:
    """The article up to a place, with the images that it has."""
    parts: list[str | ImageFile] = ["根据给定上下文和候选图像，选择合适的配图："]
    images = dict(chosen)
    for number, text in enumerate(sections[: place + 1]):
        parts.append(f"{text}\n")
        if number in images:
            parts.append(images[number])
    return parts


def read_choice(answer: str, *, count: int = NUM_CANDIDATES) -> int:
    """The place of the chosen one of `count` candidates; the first one where the answer names none."""
    place = ord(answer.strip()[:1] or "A") - ord("A")
    return place if 0 <= place < count else 0
