"""Small text on large pages: InternLM-XComposer2-4KHD's demo with its tiles, and with one view of the whole alone.

    python -m benchmarks.small_text [--runs runs] [--out docs/small_text.md] [--option --KEY=VALUE ...]

The second stage of the demo is trained twice behind the same first one: on pages in up to 16 tiles as its file says,
and on pages in one, which then are seen at 84 px as a whole. Both are asked what small signs of held-out pages say, and
once more with the pages shuffled among the questions.
"""

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.demo_scores import DATA, ROOT, ask, machine, vlm
from vlm.checkpoints.files.atomic import atomic_file
from vlm.evaluation.scores import read_scores
from vlm.recipes.run_folder import RunFolder
from vlm.vision.hd import HDTiles

SYSTEM, FIRST, SECOND = "xcomposer2_4khd", "1_pretrain", "2_sft"
WAYS = {
    "up to 16 tiles": ("xcomposer2_4khd_demo", "hd_16", 16),
    "one view of the whole": ("xcomposer2_4khd_demo_one_view", "hd_1", 1),
}
"""{in words: run folder, resolution of the pages in training, tiles of an answer}"""
PAGES = ("runs/demo_data", "runs/demo_large_pages")
TEXT = """# Small text on large pages

Written by `python -m benchmarks.small_text` on {machine}, {date}. The second stage of InternLM-XComposer2-4KHD's demo
behind the same first one, with pages in up to 16 tiles of 84 px, and in one; {questions} questions about signs that are
a quarter to a third as wide as the page, on a colour at a place where no training page has their word. Share of right
answers:

| pages seen in | trained | shuffled pages | tokens of 336 x 336 px |
|---|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are (default runs)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/small_text.md")
    parser.add_argument("--option", action="append", default=[], help="of both stages; the page says so")
    options = parser.parse_args()
    for folder in PAGES:
        vlm("demo-data", folder, *DATA[folder])
    first = options.runs / WAYS["up to 16 tiles"][0] / FIRST
    if not RunFolder(first).finished:
        vlm("fit", "--recipe", SYSTEM, "--demo", "--run", str(first.parent), "--stage", FIRST, "--", *options.option)
    rows, questions = [], 0
    for words, (name, resolution, num) in WAYS.items():
        run = train(options.runs / name, first, resolution, num, options.option)
        test = ["test", "-c", f"configs/eval/demo_{SYSTEM}.yaml", f"--model.init_args.hd_num={num}"]
        found = ask(run, "pages", *test)
        shuffled = ask(run, "pages_shuffled", *test, "--data.init_args.shuffle_images=true")
        questions = int(read_scores(run / "evaluation/pages")["counts"]["page"])
        scores = [scored["scores"]["page/exact_match"] for scored in (found, shuffled)]
        tokens = HDTiles(84, 3, num=num).num_tokens(336, 336)
        rows.append(f"| {words} | {scores[0]:.2f} | {scores[1]:.2f} | {tokens} |")
    text = TEXT.format(machine=machine(), date=f"{datetime.date.today():%Y-%m-%d}", questions=questions)
    short = f"\n\nShortened, so the scores say nothing: `{' '.join(options.option)}`." if options.option else ""
    with atomic_file(options.out) as file:
        file.write(f"{text}{chr(10).join(rows)}{short}\n".encode())
    return 0


def train(run: Path, first: Path, resolution: str, num: int, options: Sequence[str]) -> Path:
    """The second stage behind a finished first one, where it is not there yet; its folder."""
    folder = run / SECOND
    if not RunFolder(folder).finished:
        parts = "{vision: vision, connector: connector, separators: separators, language: language}"
        vlm(
            *("fit", "--recipe", SYSTEM, "--demo", "--run", str(run), "--stage", SECOND, "--"),
            f"--data.init_args.resolution={{pages: {resolution}, scenes: random_hd_4}}",
            f"--model.init_args.hd_num={num}",
            f"--stage.follows=[{{artefact: {first}, parts: {parts}}}]",
            *options,
        )
    return folder


if __name__ == "__main__":
    sys.exit(main())
