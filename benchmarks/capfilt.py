"""Whether CapFilt's set teaches more than the noisy one, at laptop size: one page.

    vlm demo-data runs/demo_blip --format blip --num 4000
    python -m benchmarks.capfilt [--seeds 0 1 2] [--run runs/blip_capfilt_demo] [--out docs/capfilt.md]

The demo of the recipe `blip_capfilt` is run up to its bootstrapped set. What the filter kept is held against what is
known of the pairs: `belongs` says which of the web's texts are right, and a synthetic text is right if it says what
the caption says. BLIP is then pre-trained anew with every seed, which decides new weights and the order of samples,
on three sets of the same images, in equally many steps: the web's pairs and people's (`noisy`), those without what
the filter dropped (`filtered`), and the bootstrapped one with its synthetic texts. The embedded world's test images
and texts then find each other by embeddings. What is there already is not made again.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.demo_scores import ask, machine, vlm
from benchmarks.seeds import spread
from vlm.checkpoints.files.atomic import atomic_file
from vlm.recipes import TrainingStage, find_recipe, load_recipe
from vlm.recipes.configs import config_files

DATA = Path("runs/demo_blip")
SETS = ("noisy", "filtered", "bootstrapped")
RANKS = ("TR@1", "TR@5", "IR@1", "IR@5")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--run", type=Path, default=Path("runs/blip_capfilt_demo"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs/capfilt.md")
    parser.add_argument("--option", action="append", default=[], help="of every pre-training; the page says so")
    options = parser.parse_args()
    recipe = load_recipe(find_recipe("blip_capfilt"))
    for node in recipe.nodes[:-1]:
        given = options.option if node.name == recipe.nodes[0].name else []
        vlm("fit", "--recipe", recipe.system, "--demo", "--run", str(options.run), "--stage", node.name, "--", *given)
    rows = read_rows(options.run / "4_filtered/filtered")
    found = {name: [trained(name, seed, rows, options) for seed in options.seeds] for name in SETS}
    with atomic_file(options.out) as file:
        file.write(page(kept(rows), sizes(rows), found, options).encode())
    return 0


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of `filter-pairs`."""
    files = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def kept(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each kind of text: how many, which share is right, which of those kept, and the share kept of the right."""
    captions = {record["image"]: record["caption"] for record in captions_of("captions_train.json")}
    found: dict[str, list[tuple[bool, bool]]] = {"web": [], "synthetic": []}
    for row in rows:
        for text in row["texts"]:
            right = row["belongs"] if text["source"] == "web" else text["text"] == captions[row["image"]]
            found[text["source"]].append((right, text["kept"]))
    return {source: figures(pairs) for source, pairs in found.items()}


def figures(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Of (is right, was kept)."""
    right, stayed = (sum(pair[at] for pair in pairs) for at in (0, 1))
    both = sum(is_right and was_kept for is_right, was_kept in pairs)
    return {
        "texts": len(pairs),
        "right": right / len(pairs),
        "kept": stayed / len(pairs),
        "right of those kept (precision)": both / stayed if stayed else 0.0,
        "kept of the right (recall)": both / right if right else 0.0,
    }


def captions_of(name: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads((DATA / name).read_text(encoding="utf-8"))
    return records


def pairs_of(name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The pairs of a set: those of the web first, then people's."""
    web = [
        {"image": row["image"], "caption": text["text"]}
        for row in rows
        for text in row["texts"]
        if (text["source"] == "web" or name == "bootstrapped") and (text["kept"] or name == "noisy")
    ]
    return web + [{key: record[key] for key in ("image", "caption")} for record in captions_of("human_train.json")]


def sizes(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {name: len(pairs_of(name, rows)) for name in SETS}


def trained(name: str, seed: int, rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> dict[str, float]:
    """Recalls of a BLIP that was pre-trained on a set."""
    folder: Path = options.run / "capfilt" / name / str(seed)
    if not (folder / "evaluation/retrieval/scores.json").is_file():
        files = pretraining_files(name, rows, options.run / "capfilt" / name)
        seeds = [f"--model.init_args.seed={seed}", f"--data.init_args.seed={seed}"]
        words = [word for file in files for word in ("-c", str(file))]
        vlm("fit", *words, "--trainer.default_root_dir", str(folder), *seeds, *options.option)
    test = ["test", "-c", "configs/eval/demo_blip_1_pretrain.yaml"]
    found = ask(folder, "retrieval", *test, "--evaluation.metrics.captions.init_args.rerank=0")["scores"]
    return {key.partition("/")[2]: value for key, value in found.items() if "@" in key}


def pretraining_files(name: str, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Those of the recipe's first stage, and one that names the set."""
    recipe = load_recipe(find_recipe("blip_capfilt"))
    stage = recipe.nodes[0]
    assert isinstance(stage, TrainingStage)
    data, overlay = folder / "pairs.json", folder / "data.yaml"
    with atomic_file(data) as file:
        file.write(json.dumps(pairs_of(name, rows)).encode())
    source = {
        "class_path": "vlm.data.CaptionList",
        "init_args": {"path": str(data), "image_root": str(DATA / "images")},
    }
    with atomic_file(overlay) as file:
        file.write(yaml.safe_dump({"data": {"init_args": {"sources": [source]}}}).encode())
    return [*config_files(recipe, stage, demo=True), overlay]


def page(
    texts: Mapping[str, Mapping[str, float]],
    pairs: Mapping[str, int],
    found: Mapping[str, Sequence[Mapping[str, float]]],
    options: argparse.Namespace,
) -> str:
    columns = list(texts["web"])
    lines = [
        "# CapFilt at laptop size",
        "",
        f"Written by `python -m benchmarks.capfilt --seeds {' '.join(map(str, options.seeds))}` on {machine()}."
        + (f" Pre-training with `{' '.join(options.option)}`." if options.option else ""),
        "",
        "## The filter",
        "",
        f"| | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for source, own in texts.items():
        lines.append(f"| {source} | {own['texts']:,} | {' | '.join(f'{own[name]:.2f}' for name in columns[1:])} |")
    lines += [
        "",
        "A web text is right if it came with its image; a synthetic one if it is the image's caption word for word.",
        "",
        "## Pre-training on what came of it",
        "",
        "Held-out images and texts find each other by embeddings: mean over seeds (lowest to highest).",
        "",
        f"| set | pairs | seeds | {' | '.join(RANKS)} |",
        f"|---|---|---|{'---|' * len(RANKS)}",
    ]
    for name, runs in found.items():
        cells = [spread([run[rank] for run in runs], digits=3) for rank in RANKS]
        lines.append(f"| {name} | {pairs[name]:,} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
