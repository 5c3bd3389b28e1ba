"""What the demos know: every system's demo trained and asked about held-out images, as one page with machine and date.

    make demo-scores [SYSTEMS="llava_1_5 vila"]
    python -m benchmarks.demo_scores [SYSTEM ...] [--runs runs] [--out docs/demo_scores.md] [--option --KEY=VALUE ...]

Each system's demo data is written, its recipe is trained with the time of every stage, then the same recipe without its
first stage; the embedded world's test images are asked of the trained system, once more with the images shuffled among
the questions, of the one without its first stage, and of one that nobody trained. What is there already is not made
again, so a stopped command goes on and another system adds its section; a stage that was stopped on the way has no
time. The time of a stage is what the processor worked for it over two cores, so other work beside it counts little.
"""

import argparse
import datetime
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.clock import processor
from vlm.checkpoints.files.atomic import atomic_file
from vlm.errors import UserError
from vlm.evaluation.scores import read_scores
from vlm.recipes import Recipe, TrainingStage, find_recipe, load_recipe, systems
from vlm.recipes.configs import config_files
from vlm.recipes.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
DATA = {
    "runs/demo_data": (),
    "runs/demo_science_qa": ("--format", "science_qa"),
    "runs/demo_blip": ("--format", "blip", "--num", "4000"),
    "runs/demo_gui": ("--format", "gui", "--num", "4000"),
    "runs/demo_mmc4": ("--format", "mmc4", "--num", "2400"),
    "runs/demo_coyo": ("--format", "webdataset", "--num", "4000"),
    "runs/demo_articles": ("--format", "articles", "--num", "2000"),
    "runs/demo_large_pages": ("--format", "large_pages", "--num", "1600", "--size", "84"),
}
"""Folder that demo configurations name: options of `vlm demo-data`."""
ELSEWHERE = {
    *("blip/2_retrieval_coco", "blip/2_retrieval_flickr", "blip2/3_retrieval"),
    *("instructblip/2_science_qa", "llava/2_science_qa"),
    "cogvlm/3_generalist",
}
"""Stages whose answers have a benchmark of their own or that are asked in CogAgent, and not here."""
CORES = 2
LIMIT_S = 240.0
"""What the recipe of a demo may take on so many cores."""
TASKS = {
    "caption": "caption, CIDEr-D",
    "vqa": '"What is at the top left?"',
    "color": "colour",
    "position": "place",
    "count": "how many",
    "ocr": "read the sign",
    "page": "read a small sign on a large page",
    "refer": "describe a region",
    "ground": "find a region, IoU of at least 0.5",
    "agent": "find the element for a task, IoU of at least 0.5",
    "text": "small talk, no image",
}
"""Tasks of the demo data in words; others keep the name of their score."""
MIXED = {"vqa": "what is where, colours, places, how many"}
"""In the place of those: tasks of questions in BLIP's own files (`BlipQuestions`), which have all kinds in one."""
BLIND = {"text"}
"""Tasks that need no image."""
HEAD = """# What the demos know

Written by `make demo-scores`, a section per system, each with the machine and the day it was measured on. Questions are
about images that show things on a colour at a place where no training image has them; 36 to 96 each, so a difference of
0.1 means little. We want each task that needs the image at twice the score with shuffled images and 0.3 above it, and
the recipe in four minutes on two cores.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", default=systems(), metavar="SYSTEM", help="default: all")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are (default runs)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/demo_scores.md")
    parser.add_argument("--option", action="append", default=[], help="of every stage; the page says so")
    options = parser.parse_args()
    for system in options.systems:
        write_section(options.out, system, measured(system, options.runs, options.option))
    return 0


def measured(system: str, runs: Path, options: Sequence[str]) -> str:
    """Trains and asks a system, as far as that is not done yet; its section of the page."""
    recipe = load_recipe(find_recipe(system))
    for other, names in followed_elsewhere(recipe).items():
        train(load_recipe(find_recipe(other)), runs, options, names=names)
    run = runs / f"{system}_demo"
    times = train(recipe, runs, options, names=[node.name for node in recipe.nodes])
    first = first_stage(recipe)
    tables = [f"### {stage.name}\n\n{compared(recipe, stage, run, first, options)}" for stage in asked_stages(recipe)]
    known = [times.get(node.name) for node in recipe.nodes]
    total = None if None in known else sum(filter(None, known))
    late = "" if total is None or total <= LIMIT_S else f", over the limit of {LIMIT_S / 60:g}"
    took = "; ".join(f"{node.name} {_minutes(times.get(node.name))}" for node in recipe.nodes)
    shortened = f" Shortened, so the scores say nothing: `{' '.join(options)}`." if options else ""
    how = f"{_minutes(total)} of processor time over {CORES} cores"
    about = f"{machine()}, {datetime.date.today():%Y-%m-%d}. Training took {how}{late} ({took}).{shortened}"
    return "\n\n".join([f"## {system}", about, *tables])


def followed_elsewhere(recipe: Recipe) -> dict[str, list[str]]:
    """{another system: its stages that this recipe starts from, and those that they start from}."""
    follows = [item for node in recipe.nodes if isinstance(node, TrainingStage) for item in node.follows]
    found: dict[str, list[str]] = {}
    for item in follows:
        if item.system != recipe.system:
            found.setdefault(item.system, []).extend(lineage(load_recipe(find_recipe(item.system)), item.stage))
    return {system: list(dict.fromkeys(names)) for system, names in found.items()}


def demo_data(recipe: Recipe) -> list[str]:
    """Folders of the demo data that a recipe's demo reads, and those of the test images."""
    texts = [(ROOT / judge_config(recipe.system, stage.name)).read_text() for stage in asked_stages(recipe)]
    for node in recipe.nodes:
        files = node.overlays if isinstance(node, TrainingStage) else ()
        texts += [file.read_text() for file in files] or [" ".join(getattr(node, "demo", None) or ())]
    found = [folder for text in texts for folder in re.findall(r"runs/demo_\w+", text)]
    return list(dict.fromkeys([*[*DATA][:1], *found]))


def asked_stages(recipe: Recipe) -> list[TrainingStage]:
    """The stages that no other one that is asked starts from, and those with questions of their own."""
    stages = [node for node in recipe.nodes if isinstance(node, TrainingStage)]
    stages = [stage for stage in stages if f"{recipe.system}/{stage.name}" not in ELSEWHERE]
    used = {followed.stage for stage in stages for followed in stage.follows} | {stage.continues for stage in stages}
    return [stage for stage in stages if stage.name not in used or own_questions(recipe.system, stage.name).is_file()]


def lineage(recipe: Recipe, name: str) -> list[str]:
    """A stage and those of its recipe that it starts from, the first one first."""
    stage = recipe.node(name)
    assert isinstance(stage, TrainingStage)
    before = [item.stage for item in stage.follows if item.system == recipe.system]
    before += [stage.continues] if stage.continues else []
    return list(dict.fromkeys([*(one for other in before for one in lineage(recipe, other)), name]))


def own_questions(*names: str) -> Path:
    """Of a stage or a system, where there are any."""
    return ROOT / "configs/eval" / f"{'_'.join(('demo', *names))}.yaml"


def judge_config(system: str, stage: str) -> str:
    """The questions: of the stage, of the system, or of all."""
    files = (own_questions(system, stage), own_questions(system), own_questions())
    return str(next(file for file in files if file.is_file()).relative_to(ROOT))


def first_stage(recipe: Recipe) -> str | None:
    """The first stage, where the others can be trained without it."""
    try:
        recipe.without(recipe.nodes[0].name)
    except UserError:
        return None
    return recipe.nodes[0].name


def train(recipe: Recipe, runs: Path, options: Sequence[str], *, names: Sequence[str]) -> dict[str, float]:
    """Writes the demo's data and trains the named nodes, as far as that is not done yet.

    Returns:
        Seconds on `CORES` of each node that was trained here without a stop; kept in a file beside the runs.
    """
    for folder in demo_data(recipe):
        vlm("demo-data", folder, *DATA[folder])
    run, note = runs / f"{recipe.system}_demo", runs / "demo_scores" / f"{recipe.system}.json"
    times: dict[str, float] = json.loads(note.read_text()) if note.is_file() else {}
    for name in names:
        begun = (run / name).exists()
        start = worked()
        vlm("fit", "--recipe", recipe.system, "--demo", "--run", str(run), "--stage", name, "--", *options)
        if not begun:
            times[name] = (worked() - start) / CORES
            with atomic_file(note) as file:
                file.write(json.dumps(times).encode())
    return times


def worked() -> float:
    """Seconds of the processor in all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compared(recipe: Recipe, stage: TrainingStage, run: Path, first: str | None, options: Sequence[str]) -> str:
    """The table of a stage's scores."""
    test = ["test", "-c", judge_config(recipe.system, stage.name)]
    found = {
        "trained": ask(run / stage.name, "trained", *test),
        "shuffled images": ask(run / stage.name, "shuffled", *test, "--data.init_args.shuffle_images=true"),
    }
    if first is not None and first != stage.name:
        without = run.with_name(f"{run.name}_without_{first}")
        if not RunFolder(without / stage.name).finished:
            skip = ["--skip", first, "--run", str(without)]
            for name in lineage(recipe.without(first), stage.name):
                vlm("fit", "--recipe", recipe.system, "--demo", *skip, "--stage", name, "--", *options)
        found[f"without {first}"] = ask(without / stage.name, "trained", *test)
    files = [word for file in config_files(recipe, stage, demo=True) for word in ("-c", str(file))]
    found["untrained"] = ask(run / stage.name, "untrained", "test", *files, *test[1:], weights="untrained")
    asks_mixed = "BlipQuestions" in (ROOT / test[-1]).read_text(encoding="utf-8")
    return table(found, words=TASKS | MIXED if asks_mixed else TASKS)


def ask(folder: Path, name: str, *command: str, weights: str | None = None) -> dict[str, dict[str, float]]:
    """Scores and counts of one evaluation, made where it is not there."""
    evaluation = folder / "evaluation" / name
    if not (evaluation / "scores.json").is_file():
        where = ["--trainer.default_root_dir", str(folder)] if weights else []
        vlm(*command, "--weights", weights or str(folder), "--evaluation.name", name, *where)
    return read_scores(evaluation)


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]], *, words: Mapping[str, str]) -> str:
    """Markdown: a line per task, named by `words`, a column per evaluation, and which tasks fall short."""
    counts = found["trained"]["counts"]
    lines = [f"| held-out | {' | '.join(found)} | questions |", f"|---|{'---|' * len(found)}---|"]
    short = []
    for score in found["trained"]["scores"]:
        task = score.split("/")[0]
        if task not in counts:
            continue
        name = words.get(task, score)
        values = [column["scores"].get(score) for column in found.values()]
        lines.append(f"| {name} | {' | '.join(map(_number, values))} | {counts[task]} |")
        seen, shuffled = (value or 0.0 for value in values[:2])
        if task not in BLIND and (seen < 2 * shuffled or seen < shuffled + 0.3):
            short.append(name)
    verdict = f"Short of what we want: {', '.join(short)}." if short else "Every task is where we want it."
    return "\n".join([*lines, "", verdict])


def write_section(page: Path, system: str, text: str) -> None:
    """Puts the section in the place of the system's older one, in the order of the systems' names."""
    old = page.read_text(encoding="utf-8") if page.is_file() else HEAD
    head, *sections = re.split(r"(?m)^(?=## )", old)
    kept = {section.split("\n", 1)[0].removeprefix("## ").strip(): section.strip() for section in sections}
    kept[system] = text.strip()
    with atomic_file(page) as file:
        file.write("\n\n".join([head.strip(), *(kept[name] for name in sorted(kept))]).encode() + b"\n")


def machine() -> str:
    return f"{processor()}, {os.cpu_count()} cores, torch {version('torch')}"


def vlm(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "cli", *arguments], check=True, stdout=sys.stderr)


def _minutes(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else f"{int(seconds // 60)} min {int(seconds % 60):02} s"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
