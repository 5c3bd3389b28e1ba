"""VILA's findings at laptop size: each of its ablations trained and tested with several seeds, as one table.

    vlm demo-data runs/demo_data
    vlm demo-data runs/demo_mmc4 --format mmc4 --num 2400
    vlm demo-data runs/demo_coyo --format webdataset --num 4000
    python -m benchmarks.vila_findings [--findings recipe no_text ...] [--seeds 0 1 2] [--run runs/vila_findings]

A finding is a recipe of configs/vila/findings/; `recipe` is the recipe itself. All stages of it are trained for each
seed, which decides new weights and the order of samples; `vlm fit` skips what is finished, so the same command goes on.
The embedded world's test images are then asked about without and with four solved examples. Columns are means over
seeds, with the range in brackets: `seeing`, the mean accuracy over the tasks of short answers about an image; the
captions' CIDEr-D; talk without an image; and `seeing` behind four examples.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from benchmarks.demo_scores import vlm
from benchmarks.seeds import table
from vlm.evaluation.scores import read_scores

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs/vila/findings"
NAMES = ("recipe", *sorted(path.stem for path in FOLDER.glob("*.yaml")))
SEEING = ("vqa", "color", "position", "count", "ocr", "refer", "ground")
TESTS = {"0_shot": "demo", "4_shot": "demo_4_shot"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--findings", nargs="+", default=NAMES, choices=NAMES, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--run", type=Path, default=Path("runs/vila_findings"))
    parser.add_argument("--option", action="append", default=[], help="of every stage, such as --trainer.max_steps=50")
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for name in options.findings:
        for seed in options.seeds:
            found.setdefault(name, []).append(measured(name, seed, run=options.run, options=options.option))
            print(json.dumps({"finding": name, "seed": seed, **found[name][-1]}), flush=True)
    print(table(found))
    return 0


def measured(name: str, seed: int, *, run: Path, options: list[str]) -> dict[str, float]:
    """Trains and tests a finding with one seed, as far as that is not done yet; {column: score}."""
    recipe = ROOT / "configs/vila/recipe.yaml" if name == "recipe" else FOLDER / f"{name}.yaml"
    folder = run / name / str(seed)
    seeds = [f"--model.init_args.seed={seed}", f"--data.init_args.seed={seed}"]
    vlm("fit", "--recipe", str(recipe), "--demo", "--run", str(folder), "--", *seeds, *options)
    scores: dict[str, dict[str, float]] = {}
    for test, config in TESTS.items():
        evaluation = folder / "2_sft/evaluation" / test
        if not (evaluation / "scores.json").is_file():
            vlm("test", "-c", f"configs/eval/{config}.yaml", "--weights", str(folder), "--evaluation.name", test)
        scores[test] = read_scores(evaluation)["scores"]
    return {
        "seeing": seeing(scores["0_shot"]),
        "captions": only(scores["0_shot"], "caption"),
        "talk": only(scores["0_shot"], "text"),
        "seeing, 4 examples": seeing(scores["4_shot"]),
    }


def seeing(scores: dict[str, float]) -> float:
    return statistics.fmean(only(scores, task) for task in SEEING)


def only(scores: dict[str, float], task: str) -> float:
    """The one metric of a task."""
    [value] = [value for key, value in scores.items() if key.startswith(f"{task}/")]
    return value


if __name__ == "__main__":
    sys.exit(main())
