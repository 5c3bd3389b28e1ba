"""The steps from a title to an illustrated article; each is asked once and kept."""

import copy
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vlm.checkpoints.files.atomic import atomic_file
from vlm.errors import SampleError, UserError
from vlm.language import Decoding
from vlm.procedures.compose import requests
from vlm.procedures.compose.requests import Request
from vlm.prompts import ImageMark, get_template
from vlm.sample import ImageFile

STEPS = "compose.json"


class Index(Protocol):
    """Images that can be asked for by text."""

    def nearest(self, text: str, *, count: int, exclude: Collection[str]) -> list[Path]:
        """The images nearest to a text, the nearest first; fewer than `count` where there are no more.

        Args:
            exclude: paths that are not wanted.
        """


@dataclass(frozen=True)
class Illustration:
    """An image in an article.

    Attributes:
        section: that it stands behind.
        candidates: paths, A to D.
        chosen: which of them.
    """

    section: int
    caption: str
    candidates: tuple[Path, ...]
    chosen: int

    @property
    def image(self) -> Path:
        return self.candidates[self.chosen]


@dataclass(frozen=True)
class Article:
    """A finished article."""

    title: str
    sections: tuple[str, ...]
    illustrations: tuple[Illustration, ...]


@dataclass
class Steps:
    """What was asked and said for one title, in a file that grows with every answer.

    Attributes:
        facts: what the answers depend on besides their prompts.
    """

    path: Path
    facts: Mapping[str, Any]
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, facts: Mapping[str, Any]) -> "Steps":
        """The steps that an earlier start left.

        Raises:
            UserError: they are those of another title, model or index.
        """
        if not path.exists():
            return cls(path, facts)
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {name: value for name, value in content.items() if name != "steps"}
        if found != dict(facts):
            other = next(name for name in facts if found.get(name) != facts[name])
            raise UserError(f"{path}: was begun with {other} {found.get(other)!r}; give another --out, or remove it")
        return cls(path, facts, {step["name"]: step for step in content["steps"]})

    def earlier(self, name: str, asked: str) -> dict[str, Any] | None:
        """A step that is there already, if it was asked the same."""
        found = self.done.get(name)
        return found if found is not None and found["prompt"] == asked else None

    def keep(self, name: str, asked: str, **said: Any) -> None:
        self.done[name] = {"name": name, "prompt": asked, **said}
        content = {**self.facts, "steps": list(self.done.values())}
        with atomic_file(self.path) as file:
            file.write((json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "replace"))


class Composer:
    """Writes articles with an InternLM-XComposer and an index of images, or images of one's own.

    Args:
        module: the system.
        index: of images; None where there are `images`.
        num_images: of an article; None: as many as the model likes.
        article: how articles are searched for; None: as published.
        words: what the system is asked (`requests` or `free_form`).
        images: shown with the instruction and chosen from, each once (`free_form`).
    """

    def __init__(
        self,
        module: Any,
        index: Index | None,
        *,
        num_images: int | None = None,
        article: Decoding | None = None,
        words: Any = requests,
        images: Sequence[Path] = (),
    ) -> None:
        self.module = module
        self.index = index
        self.num_images = num_images
        self.words = words
        self.images = tuple(images)
        self.decodings = words.DECODINGS | ({} if article is None else {"article": article})

    def compose(self, title: str, steps: Steps) -> Article:
        """The article of a title.

        Raises:
            UserError: no article, no place in it, too few candidates, or an image that cannot be read; `steps` keeps
                what was said until then.
        """
        words, shown = self.words, {"images": [_file(path) for path in self.images]} if self.images else {}
        sections = requests.sections_of(self._ask(words.ask_article(title, **shown), title, steps))
        if not any(section.strip() for section in sections):
            raise UserError("the model wrote no article; try another title, or sample one (--temperature)")
        num_images = None if self.num_images is None else min(self.num_images, len(sections))
        answer = self._ask(words.ask_places(sections, num_images, **shown), title, steps)
        places = requests.read_places(answer, len(sections))
        if not places:
            raise UserError(
                f"the model names none of the {len(sections)} lines of its article as the place of an image (it said "
                f"{answer[:60]!r}); ask for a number of them (--num_images)"
            )
        captions: dict[int, str] = {}
        for place in [] if self.images else places:
            request = words.ask_caption(sections, place, list(captions.items()))
            captions[place] = requests.read_caption(self._ask(request, title, steps))
        candidates = self._candidates(captions, steps)
        illustrations: list[Illustration] = []
        for place in sorted(places):
            used = [made.image for made in illustrations]
            offered = candidates.get(place) or tuple(path for path in self.images if path not in used)
            if not offered:  # more lines than images
                break
            chosen = 0
            if len(offered) > 1:
                before = [(made.section, _file(made.image)) for made in illustrations]
                request = words.ask_choice(sections, place, before, [_file(path) for path in offered])
                answer = self._ask(self._fitted(request, title, count=len(offered)), title, steps)
                chosen = requests.read_choice(answer, count=len(offered))
            illustrations.append(Illustration(place, captions.get(place, ""), offered, chosen))
        return Article(title, tuple(sections), tuple(illustrations))

    def _candidates(self, captions: Mapping[int, str], steps: Steps) -> dict[int, tuple[Path, ...]]:
        """Four images for each caption, none of them twice."""
        found: dict[int, tuple[Path, ...]] = {}
        taken: set[str] = set()
        for place, caption in captions.items():
            name, asked = f"candidates {place}", caption[: requests.CAPTION_CHARACTERS]
            if (earlier := steps.earlier(name, asked)) is not None:
                paths = [Path(path) for path in earlier["answer"]]
            else:
                assert self.index is not None, "captions are asked for where there is an index"
                paths = self.index.nearest(asked, count=requests.NUM_CANDIDATES, exclude=taken)
            if len(paths) < requests.NUM_CANDIDATES:
                raise UserError(
                    f"the index has {len(paths)} images left for line {place}, and {requests.NUM_CANDIDATES} are "
                    f"chosen from at each of the {len(captions)} places; index more images, or ask for fewer of them "
                    "(--num_images)"
                )
            if earlier is None:
                steps.keep(name, asked, answer=[str(path) for path in paths])
            found[place] = tuple(paths)
            taken |= {str(path) for path in paths}
        return found

    def _ask(self, request: Request, title: str, steps: Steps) -> str:
        asked = shown(request)
        if (earlier := steps.earlier(request.name, asked)) is not None:
            return earlier["answer"]
        with speaking(self.module, request.template):
            sample = request.sample(title)
            for image in sample.images:
                image.read(sample)
            answer = self.module.generate(sample, decoding=self.decodings[request.name.split()[0]])
        steps.keep(request.name, asked, answer=answer)
        return answer

    def _fitted(self, request: Request, title: str, *, count: int = requests.NUM_CANDIDATES) -> Request:
        """A choice whose prompt is not too long: the beginning of the article goes.

        The published demo cuts off the end instead, with the candidates and the question.

        Args:
            count: of the candidates.
        """
        fixed, candidates, limit = 1, 2 * count + 1, self.words.MAX_TOKENS
        with speaking(self.module, request.template) as codec:
            while True:
                error = None
                try:
                    length = codec.encode(request.sample(title), generate=True).num_tokens
                    if length - (codec.tokenizer.bos_id is not None) <= limit:
                        return request
                except SampleError as found:
                    if found.kind != "too long":
                        raise
                    error = found
                if len(request.parts) <= fixed + candidates:
                    raise error or UserError(f"{count} images alone take more than {limit} tokens")
                request = request.without_first(fixed)


@contextmanager
def speaking(module: Any, template: str) -> Iterator[Any]:
    """Inside, a system is talked to by another template; gives its codec."""
    before = module.codec
    module.codec = copy.copy(before)
    module.codec.template = get_template(template)
    try:
        yield module.codec
    finally:
        module.codec = before


def shown(request: Request) -> str:
    """The whole prompt, with <ImageHere> in the places of images."""
    spans = get_template(request.template).render(request.sample("").messages, generate=True)
    return "".join("<ImageHere>" if isinstance(span, ImageMark) else span.text for span in spans)


def _file(path: Path) -> ImageFile:
    return ImageFile(name=str(path), path=path)
