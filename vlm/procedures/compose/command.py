"""The command line of `vlm run compose`."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.options import OptionParser


def main(arguments: list[str]) -> int:
    """`vlm run compose --title ... --weights ... --index ... --out ...`; 1 where an article could not be finished.

    Raises:
        UserError: no titles, weights of another system, or an index that cannot be opened.
    """
    from vlm.loading import open_system
    from vlm.procedures.compose.composer import DECODINGS, STEPS, Composer, Steps
    from vlm.procedures.compose.page import write_article
    from vlm.procedures.image_index import ImageIndex

    options = _parser().parse_args(arguments)
    folders = _folders(options)
    index = ImageIndex.open(options.index, device=options.device)
    module = open_system(options.weights, device=options.device, dtype=options.dtype)
    if module.system != "xcomposer":
        raise UserError(f"--weights {options.weights}: is {module.system}, and only xcomposer was taught to compose")
    article = replace(
        DECODINGS["article"],
        max_new_tokens=options.max_new_tokens,
        num_beams=1 if options.temperature > 0 else options.num_beams,
        repetition_penalty=options.repetition_penalty,
        temperature=options.temperature,
        seed=options.seed,
    )
    composer = Composer(module, index, num_images=options.num_images, article=article)
    failed = 0
    for title, folder in folders.items():
        facts = {
            "title": title,
            "weights": str(options.weights),
            "index": str(options.index),
            "article": str(article),
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
    parser.add_argument("--title", nargs="+", default=[], metavar="TEXT", help="titles; the model knows Chinese best")
    parser.add_argument("--titles", type=Path, help="a file with a title on each line")
    parser.add_argument("--weights", required=True, help="of InternLM-XComposer, as in `vlm predict`")
    parser.add_argument("--index", type=Path, required=True, help="images to choose from: `vlm run index-images`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the articles; one begun earlier goes on")
    parser.add_argument("--num_images", type=int, help="of an article; default: as many as the model likes")
    parser.add_argument("--max_new_tokens", type=int, default=999, help="of the text (default %(default)s)")
    parser.add_argument("--num_beams", type=int, default=5, help="of its search (default %(default)s)")
    parser.add_argument("--repetition_penalty", type=float, default=5.0, help="of the text (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0 samples the text (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")
    return parser
