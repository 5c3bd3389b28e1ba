"""An illustrated article as files: Markdown with its images beside it, and a page that is one file."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from vlm.checkpoints.files.atomic import atomic_file
from vlm.drawing.html import chip, escape, figure, write_page
from vlm.procedures.compose.composer import Article, Illustration

_WIDE, _SMALL = 560, 150


def write_article(folder: Path, article: Article) -> None:
    """Writes `article.md`, `images/` and `article.html`."""
    names = {}
    for illustration in article.illustrations:
        name = f"images/{illustration.section}{illustration.image.suffix.lower()}"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / name) as target, open(illustration.image, "rb") as source:
            shutil.copyfileobj(source, target)
        names[illustration.section] = name
    with atomic_file(folder / "article.md") as file:
        file.write("\n\n".join(_markdown(article, names)).encode("utf-8", "replace") + b"\n")
    write_page(folder / "article.html", title=article.title, body=_body(article))


def _markdown(article: Article, names: dict[int, str]) -> Iterator[str]:
    captions = {illustration.section: illustration.caption for illustration in article.illustrations}
    yield f"# {article.title}"
    for number, text in enumerate(article.sections):
        yield text
        if number in names:
            caption = captions[number].replace("[", r"\[").replace("]", r"\]")
            yield f"![{caption}]({names[number]})"


def _body(article: Article) -> Iterator[str]:
    illustrations = {illustration.section: illustration for illustration in article.illustrations}
    yield f"<h1>{escape(article.title)}</h1>\n"
    for number, text in enumerate(article.sections):
        heading = text.lstrip("#").strip() if text.startswith("#") else None
        yield f"<p>{escape(text)}</p>\n" if heading is None else f"<h2>{escape(heading)}</h2>\n"
        if number in illustrations:
            yield _picture(illustrations[number])
    yield "<h2>What was chosen from</h2>\n"
    for illustration in article.illustrations:
        yield _candidates(illustration)


def _picture(illustration: Illustration) -> str:
    with Image.open(illustration.image) as image:
        return figure(image, illustration.caption, side=_WIDE) + "\n"


def _candidates(illustration: Illustration) -> str:
    shown = []
    for at, path in enumerate(illustration.candidates):
        with Image.open(path) as image:
            mark = "chosen" if at == illustration.chosen else ""
            drawn = figure(image, f"{chr(ord('A') + at)}. {path.name}", side=_SMALL)
        shown.append(f"<div>{drawn}{chip(mark, kind='good') if mark else ''}</div>")
    head = f'<div class="head"><b>line {illustration.section}</b><span>{escape(illustration.caption)}</span></div>'
    return f'<div class="card">{head}<div class="pictures">{"".join(shown)}</div></div>\n'
