"""`vlm run mind2web-screens`: Multimodal-Mind2Web's published tables as screenshots and tasks.

    data/mind2web/images/8f62-f3ae.jpg        the page before each action, by task and action
    data/mind2web/mind2web_data_train.json    what `vlm.data.Mind2Web` reads

The tables are those of osunlp/Multimodal-Mind2Web: parquet, a row for each action, with the whole page as an image and
the elements that a person may have meant as candidates with their boxes.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm.checkpoints.files.atomic import atomic_file
from vlm.errors import UserError

_COLUMNS = (
    *("annotation_id", "action_uid", "confirmed_task", "action_reprs", "target_action_index"),
    *("operation", "pos_candidates", "screenshot", "website", "domain", "subdomain"),
)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table, a row group at a time.

    Raises:
        UserError: pyarrow is missing, it is no parquet file, or columns are missing.
    """
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise UserError("mind2web-screens needs pyarrow; pip install 'vlm[data]'") from error
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ArrowInvalid) as error:
        raise UserError(f"{path}: is no parquet file ({error}); fetch it again") from error
    if missing := sorted({*_COLUMNS} - {*file.schema_arrow.names}):
        raise UserError(f"{path}: has no column {missing[0]!r}; it is no table of Multimodal-Mind2Web")
    for group in range(file.num_row_groups):
        yield from file.read_row_group(group, columns=list(_COLUMNS)).to_pylist()


def read_action(row: dict[str, Any], *, path: Path) -> dict[str, Any]:
    """An action as `vlm.data.Mind2Web` has it; without `bbox` where no candidate is the person's element.

    Raises:
        UserError: what should be JSON is none.
    """
    where = f"{path}: action {row['action_uid']!r}"
    try:
        candidates = [json.loads(candidate) for candidate in row["pos_candidates"] or []]
        found = {"action_uid": row["action_uid"], "operation": json.loads(row["operation"])}
        # of several that contain each other, the outermost one that the person's click still meant
        candidates.sort(key=lambda candidate: not candidate.get("is_top_level_target"))
        if candidates:
            attributes = json.loads(candidates[0]["attributes"])
            numbers = [float(number) for number in attributes["bounding_box_rect"].split(",")]
            found["bbox"] = dict(zip(("x", "y", "width", "height"), numbers, strict=True))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where}: operation or candidates cannot be read ({error!r}); fetch the table again"
        ) from error
    place = found.get("bbox")
    if place is not None and min(place["width"], place["height"]) <= 0:  # an element that is not shown
        del found["bbox"]
    return found


def write_tasks(files: Sequence[Path], out: Path, *, name: str) -> tuple[int, int]:
    """Writes screenshots and `mind2web_data_NAME.json`; returns the number of tasks and of actions with a box.

    Actions that the tables leave out, and those without a screenshot, stand among a task's actions without a box.
    """
    tasks: dict[str, dict[str, Any]] = {}
    (out / "images").mkdir(parents=True, exist_ok=True)
    for path in files:
        for row in read_rows(path):
            identity, at = str(row["annotation_id"]), int(row["target_action_index"])
            told = list(row["action_reprs"])
            facts = {key: row[key] for key in ("website", "domain", "subdomain", "annotation_id", "confirmed_task")}
            task = tasks.setdefault(identity, {**facts, "action_reprs": told, "actions": [{} for _ in told]})
            if not 0 <= at < len(task["actions"]):
                raise UserError(
                    f"{path}: task {identity!r} has {len(told)} actions, and none is number {at}; fetch it again"
                )
            action = read_action(row, path=path)
            shot = (row["screenshot"] or {}).get("bytes")
            if shot:
                (out / f"images/{identity}-{action['action_uid']}.jpg").write_bytes(shot)
            else:
                action.pop("bbox", None)
            task["actions"][at] = action
    with atomic_file(out / f"mind2web_data_{name}.json") as written:
        written.write(json.dumps(list(tasks.values())).encode())
    return len(tasks), sum("bbox" in action for task in tasks.values() for action in task["actions"])


def main(arguments: list[str]) -> int:
    """`vlm run mind2web-screens FILE ... --name NAME --out FOLDER`."""
    parser = argparse.ArgumentParser(
        prog="vlm run mind2web-screens", description="Multimodal-Mind2Web's tables as screenshots and tasks."
    )
    parser.add_argument("files", nargs="+", type=Path, help="of one split, as published: train-00000-of-....parquet")
    parser.add_argument("--name", required=True, help="train, test_task, test_website or test_domain")
    parser.add_argument("--out", type=Path, required=True, help="folder; other splits may lie there already")
    options = parser.parse_args(arguments)
    tasks, actions = write_tasks(options.files, options.out, name=options.name)
    print(f"{options.out}: {tasks:,} tasks, {actions:,} actions with a screenshot and a box")
    return 0
