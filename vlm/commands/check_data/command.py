"""`vlm check-data`: everything that can be wrong with the data of a stage, before it is trained on."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from vlm.checkpoints.files.atomic import atomic_file
from vlm.commands.check_data.page import write_report
from vlm.commands.check_data.parts import parts_of
from vlm.commands.check_data.report import Report
from vlm.commands.check_data.scan import scan
from vlm.commands.check_data.stage_view import StageParser
from vlm.data.wrappers.quarantine import as_lines
from vlm.errors import UserError
from vlm.options import OptionParser
from vlm.recipes.configs import add_stage_options, stage_options


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        command="check-data",
        remedy="; `vlm check-data --help` lists the options",
        prog="vlm check-data",
        description="Looks at every sample of training and validation as `vlm fit` with the same options would: "
        "reads it, encodes it, decodes its pictures. Builds no network. Exit status: 0 if all samples can be trained "
        "on, 1 if some are bad, 2 if the check itself was not possible.",
        epilog="All other options, -c FILE above all, are those of `vlm fit`. The folder gets report.html, "
        "report.json and quarantine.jsonl, the list that data.init_args.quarantine takes.",
    )
    add_stage_options(parser)
    parser.add_argument("--out", type=Path, help="folder of the report; runs/check_data/SYSTEM_STAGE by default")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes; %(default)s")
    parser.add_argument("--limit", type=int, help="at most so many samples of each source, evenly spread")
    parser.add_argument("--epochs", type=int, default=1, help="encode training samples as in the first N epochs")
    parser.add_argument("--headers-only", "--headers_only", action="store_true", help="do not decode pictures")
    parser.add_argument("--duplicates", action="store_true", help="a copy of an earlier sample is bad, too")
    return parser


def main(arguments: Sequence[str], *, describe: StageParser) -> int:
    """Runs the check.

    Args:
        describe: from options of `vlm fit` to a stage.

    Returns:
        1 if a sample is bad, else 0.
    """
    own, others = _parser().parse_known_args(list(arguments))
    for name, least in (("workers", 0), ("limit", 1), ("epochs", 1)):
        if getattr(own, name) is not None and getattr(own, name) < least:
            raise UserError(f"--{name} must be at least {least}, found {getattr(own, name)}")
    # everything is looked at: a list that is made anew replaces the one that is in use
    stage = describe([*stage_options(own), *others, "--data.init_args.quarantine=null"])
    parts = parts_of(stage.data, stage.codec, limit=own.limit)
    if not parts:
        raise UserError("data.sources is empty; list at least one source")
    found = scan(
        parts,
        workers=own.workers,
        epochs=own.epochs,
        max_tokens=stage.data.max_tokens,
        headers_only=own.headers_only,
    )
    report = Report.of(found, title=f"{stage.system} {stage.stage}", refuse_copies=own.duplicates)
    folder = own.out or Path("runs") / "check_data" / f"{stage.system}_{stage.stage}"
    with atomic_file(folder / "quarantine.jsonl") as file:
        file.write(as_lines(report.quarantine()))
    with atomic_file(folder / "report.json") as file:
        file.write(json.dumps(report.as_json(), indent=1, ensure_ascii=False).encode("utf-8", "replace"))
    write_report(folder / "report.html", report)
    print(*report.lines(), "", f"report: {folder / 'report.html'}", sep="\n")
    if report.bad:
        print(f"leave the bad ones out with --data.init_args.quarantine={folder / 'quarantine.jsonl'}")
    return 1 if report.bad else 0
