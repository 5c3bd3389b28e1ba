"""A page about what was found, made anew after each phase."""

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.speed import VARIANTS

HEAD = """# One GPU

Written by `python -m benchmarks.gpu` on {machine}.

"""
COLUMNS = (
    "tokens/s",
    "MFU",
    "beside padded",
    "GiB",
    "tokens a pack",
    "data",
    "vision",
    "language",
    "head",
    "optimizer",
)


def write_page(out: Path) -> None:
    """`report.md` from `results.jsonl`."""
    entries = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    machine = next(entry["value"] for entry in entries if entry["name"] == "machine")
    (out / "report.md").write_text(HEAD.format(machine=machine) + "\n".join(_lines(entries)) + "\n", encoding="utf-8")


def _lines(entries: list[dict[str, Any]]) -> list[str]:
    right, wrong = ([e for e in entries if e["ok"] is ok] for ok in (True, False))
    lines = ["## Right and wrong", "", f"{len(right)} right, {len(wrong)} wrong.", ""]
    lines += [f"- {entry['phase']}, {entry['name']}: {entry['value']}" for entry in wrong]
    lines += ["", "## Speed", ""]
    lines += [f"- {e['name']}: {e['value']}" for e in entries if "peak" in e]
    lines += ["", f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    speeds = {entry["phase"]: entry for entry in entries if "speed" in entry}
    padded = speeds.get("padded", {}).get("speed", {}).get("speed/tokens_per_s")
    lines += [_row(name, entry, padded) for name, entry in speeds.items()]
    losses = {name: e["first_loss"] for name, e in speeds.items() if name in VARIANTS and name.startswith("stage2")}
    lines += ["", "Losses of the first pack, whose weights are the same: "]
    lines[-1] += ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items())
    lines += ["", "## All", "", "| phase | | found |", "|---|---|---|"]
    return lines + [f"| {e['phase']} | {e['name']} | {e['value']} |" for e in entries]


def _row(name: str, entry: dict[str, Any], padded: float | None) -> str:
    found = entry["speed"]
    rate = found["speed/tokens_per_s"]
    shares = ("speed/data_wait", "time/vision", "time/language", "time/head", "time/optimizer")
    cells = [
        f"{rate:,.0f}",
        f"{found['mfu/total']:.1%}" if "mfu/total" in found else "",
        f"{rate / padded:.2f}" if padded and name.startswith("stage2") else "",
        f"{found['speed/peak_memory_gib']:.1f}" if "speed/peak_memory_gib" in found else "",
        f"{entry['tokens_of_a_pack']:,.0f}" if "tokens_of_a_pack" in entry else "",
        *(f"{found[share]:.0%}" if share in found else "" for share in shares),
    ]
    return f"| {name} | {' | '.join(cells)} |"
