"""The command line of `vlm run compose`."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.options import OptionParser

_SEARCH = ("max_new_tokens", "num_beams", "repetition_penalty", "temperature")


def main(arguments: list[str]) -> int:
    """`vlm run compose --title ... --weights ... --index ... --out ...`; 1 where an article could not be finished.

    Raises:
        UserError: no titles, weights of another system, or an index that cannot be opened.
    """
    from vlm.loading import open_system
    from vlm.procedures.compose import free_form, requests
    from vlm.procedures.compose.composer import STEPS, Composer, Steps
    from vlm.procedures.compose.page import write_article
    from vlm.procedures.image_index import ImageIndex

    options = _parser().parse_args(arguments)
    folders = _folders(options)
    if (options.index is None) == (not options.images):
        raise UserError("vlm run compose: give --index, or --images of your own to choose from, and not both")
    index = None if options.index is None else ImageIndex.open(options.index, device=options.device)
    module = open_system(options.weights, device=options.device, dtype=options.dtype)
    dialects = {"xcomposer": requests, "xcomposer2": free_form}
    if module.system not in dialects:
        known = " and ".join(dialects)
        raise UserError(f"--weights {options.weights}: is {module.system}, and only {known} were taught to compose")
    words: Any = dialects[module.system]
    if options.images and words is requests:
        raise UserError("--images: xcomposer is shown no images of one's own; give --index, or weights of xcomposer2")
    if len(options.images) > len(free_form.LETTERS):
        raise UserError(f"--images: {len(options.images)} of them; at most {len(free_form.LETTERS)} can be chosen from")
    given = {name: getattr(options, name) for name in _SEARCH if getattr(options, name) is not None}
    if given.get("temperature", 0) > 0:
        given.setdefault("num_beams", 1)
    elif given.get("num_beams", 1) > 1:
        given |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
    article = replace(words.DECODINGS["article"], **given, seed=options.seed)
    composer = Composer(
        module, index, num_images=options.num_images, article=article, words=words, images=options.images
    )
    failed = 0
    for title, folder in folders.items():
        facts = {
            "title": title,
            "weights": str(options.weights),
            "index": str(options.index),
            "article": str(article),
            **({"images": [str(path) for path in options.images]} if options.images else {}),
        }
        try:
            made = composer.compose(title, Steps.open(folder / STEPS, facts))
            write_article(folder, made)
        except UserError as error:
            failed += 1
            print(f"{title}: {error}", file=sys.stderr)
            continue
        print(f"{folder / 'article.html'}: {len(made.sections)} lines, {len(made.illustrations)} images")
    return 1 if failed else 0


def _folders(options: argparse.Namespace) -> dict[str, Path]:
    """{title: where its article lies}.

    Raises:
        UserError: there is no title, or two have one name.
    """
    titles: list[str] = list(options.title)
    if options.titles is not None:
        try:
            titles += options.titles.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--titles {options.titles}: cannot be read as UTF-8 text ({error})") from error
    titles = list(dict.fromkeys(title.strip() for title in titles if title.strip()))
    if not titles:
        raise UserError("vlm run compose: no title; give --title TEXT, or --titles FILE with one on each line")
    folders = {title: options.out / _name(title) for title in titles}
    if len(set(folders.values())) < len(titles):
        raise UserError("vlm run compose: two titles make the same file name; give them to two runs")
    return folders


def _name(title: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in title).strip("_")[:60] or "article"


def _parser() -> argparse.ArgumentParser:
    parser: Any = OptionParser(
        command="vlm run compose",
        prog="vlm run compose",
        description="Writes an illustrated article of a title: text, places, captions, and images of an index.",
    )
    parser.add_argument(
        "--title", nargs="+", default=[], metavar="TEXT", help="titles, or instructions (InternLM-XComposer2)"
    )
    parser.add_argument("--titles", type=Path, help="a file with a title on each line")
    parser.add_argument("--weights", required=True, help="of InternLM-XComposer or -XComposer2, as in `vlm predict`")
    parser.add_argument("--index", type=Path, help="images to choose from: `vlm run index-images`")
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        default=[],
        help="instead: images of your own, shown with the instruction and each chosen once (InternLM-XComposer2)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the articles; one begun earlier goes on")
    parser.add_argument("--num_images", type=int, help="of an article; default: as many as the model likes")
    parser.add_argument("--max_new_tokens", type=int, help="of the text (default as published: 999, 1024)")
    parser.add_argument("--num_beams", type=int, help="of its search (default as published: 5, 1)")
    parser.add_argument("--repetition_penalty", type=float, help="of the text (default as published: 5, 1.005)")
    parser.add_argument("--temperature", type=float, help="above 0 samples the text (default as published: 0, 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")
    return parser
