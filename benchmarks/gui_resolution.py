"""What CogAgent's fine view is for: its demo trained with both branches, and with the coarse one alone.

    vlm demo-data runs/demo_data
    vlm demo-data runs/demo_gui --format gui --num 4000
    python -m benchmarks.gui_resolution [--seeds 0 1 2] [--run runs/gui_resolution] [--option --KEY=VALUE ...]

`both` is the demo's recipe. `coarse` is the same network, data and steps without stage 1a: the fine tower, its places
and the cross-attention of all layers stay as they begin, and that is the identity. Both start from the generalist of
CogVLM's demo, and are asked about elements that no training screen shows in that place. `shuffled` asks the trained
network of both branches about other screens. Columns are means over seeds with their range: a box with an IoU of at
least 0.5, an element told in HTML, the box of the element that a task needs. `vlm fit` skips what is finished, so the
same command goes on.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks import seeds
from benchmarks.demo_scores import ask, vlm

ROOT = Path(__file__).parents[1]
COGAGENT = ROOT / "configs/cogagent"
FIRST, LAST = "1a_cross", "3_agent"
TASKS = {"ground": "find an element", "refer": "tell an element", "agent": "find it for a task"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--run", type=Path, default=Path("runs/gui_resolution"))
    parser.add_argument("--option", action="append", default=[], help="of every stage, such as --trainer.max_steps=50")
    options = parser.parse_args()
    vlm("fit", "--recipe", "cogvlm", "--demo", "--", *options.option)
    recipes = {"both": COGAGENT / "recipe.yaml", "coarse": write_coarse(options.run / "coarse_recipe")}
    found: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        seeded = [f"--model.init_args.seed={seed}", f"--data.init_args.seed={seed}"]
        for name, recipe in recipes.items():
            run = options.run / name / str(seed)
            vlm("fit", "--recipe", str(recipe), "--demo", "--run", str(run), "--", *seeded, *options.option)
            found.setdefault(name, []).append(asked(run / LAST, "trained"))
            if name == "both":
                found.setdefault("shuffled", []).append(asked(run / LAST, "shuffled"))
        print(json.dumps({"seed": seed, **{name: runs[-1] for name, runs in found.items()}}), flush=True)
    print(table(found))
    return 0


def write_coarse(folder: Path) -> Path:
    """The recipe without the fine view; returns its file."""
    base = yaml.safe_load((COGAGENT / "recipe.yaml").read_text())["stages"]
    (folder / "demo").mkdir(parents=True, exist_ok=True)
    stages: dict[str, Any] = {FIRST: None}
    first = base.pop(FIRST)["follows"]
    trained = {}
    for name, stage in base.items():
        demo = yaml.safe_load((COGAGENT / "demo" / stage["configs"][-1]).read_text())
        trained[name] = coarse(demo["stage"]["train"])
        change: dict[str, Any] = {"stage": {"train": trained[name]}}
        stages[name] = {"add": [f"{name}_coarse.yaml"]}
        if "continues" in stage:
            change["stage"]["schedule"] = {"total_steps": None}
            stages[name] |= {"continues": None, "follows": first}
        else:
            [before] = stage["follows"]
            parts = _coarse_parts(before["parts"], trained[before["artefact"].rpartition("/")[2]])
            stages[name]["follows"] = [{**before, "parts": parts, "fresh": first[0]["fresh"]}]
        for place in (folder, folder / "demo"):
            (place / f"{name}_coarse.yaml").write_text(yaml.safe_dump(change))
    content = {"base": os.path.relpath(COGAGENT / "recipe.yaml", folder), "stages": stages}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def _coarse_parts(parts: Mapping[str, str], trained: Mapping[str, Any]) -> dict[str, str]:
    """The parts that a stage takes from one that trained this; what was never trained is in no artefact."""
    kept = {ours: theirs for ours, theirs in parts.items() if ours not in ("vision_high", "places")}
    return kept | ({"places.low": "places.low"} if "places.low" in trained else {})


def coarse(train: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage trains, without the fine view."""
    found: dict[str, Any] = {}
    for pattern, how in train.items():
        if pattern == "places":
            found["places.low"] = how
        elif not pattern.startswith(("vision_high", "places.high")) and "cross_att" not in pattern:
            found[pattern] = how
    return found


def asked(stage: Path, name: str) -> dict[str, float]:
    """Scores of a trained stage, {task: score}, asked where they are not there."""
    shuffle = ["--data.init_args.shuffle_images=true"] if name == "shuffled" else []
    scores = ask(stage, name, "test", "-c", "configs/eval/demo_cogagent.yaml", *shuffle)["scores"]
    return {task: next(value for key, value in scores.items() if key.startswith(f"{task}/")) for task in TASKS}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a line per arm, mean (lowest to highest)."""
    return seeds.table(
        {name: [{words: run[task] for task, words in TASKS.items()} for run in runs] for name, runs in found.items()}
    )


if __name__ == "__main__":
    sys.exit(main())
