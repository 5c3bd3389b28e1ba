"""The scores of an evaluation: written by `vlm validate` and `vlm test`, put side by side by `vlm scores`."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.checkpoints.files.atomic import atomic_file
from vlm.errors import UserError

FILE = "scores.json"


def write_scores(folder: Path, *, scores: Mapping[str, float], counts: Mapping[str, int], weights: str) -> Path:
    """Writes what an evaluation found.

    Args:
        scores: by `<source or task>/<metric>`, and the loss terms.
        counts: number of answers by source or task.
        weights: what was evaluated.
    """
    # JSON has no nan
    finite = {name: value if math.isfinite(value) else None for name, value in scores.items()}
    with atomic_file(folder / FILE) as file:
        file.write((json.dumps({"weights": weights, "scores": finite, "counts": counts}, indent=1) + "\n").encode())
    return folder / FILE


def read_scores(path: Path) -> dict[str, Any]:
    """What `write_scores` wrote, from its file or folder."""
    file = path / FILE if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {"weights": str(content["weights"]), "scores": dict(content["scores"]), "counts": content["counts"]}
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); `vlm validate` and `vlm test` write it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: holds no scores; give a file that `vlm validate` or `vlm test` wrote") from error


def table(columns: Mapping[str, Mapping[str, float | None]], counts: Mapping[str, int]) -> str:
    """One line per score, one column per evaluation."""
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    head = ["", *columns, "answers" if counts else ""]
    rows = [
        [name, *(_number(scores.get(name)) for scores in columns.values()), str(counts.get(name.split("/")[0], ""))]
        for name in names
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = (
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in [head, *rows]
    )
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: Sequence[str]) -> int:
    """`vlm scores NAME=FILE ...`."""
    parser = argparse.ArgumentParser(prog="vlm scores", description="Scores of several evaluations side by side.")
    parser.add_argument("evaluation", nargs="+", help="NAME=FOLDER (or its scores.json); the name heads the column")
    found: dict[str, dict[str, Any]] = {}
    for item in parser.parse_args(list(arguments)).evaluation:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise UserError(f"scores: {item!r} is not NAME=FOLDER, such as trained=runs/llava_1_5/evaluation/pope")
        found[name] = read_scores(Path(path))
    counts = {task: count for content in found.values() for task, count in content["counts"].items()}
    print(table({name: content["scores"] for name, content in found.items()}, counts))
    return 0


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"
