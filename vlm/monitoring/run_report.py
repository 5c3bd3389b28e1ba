"""A page about how a run went, for people."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning
import torch

from vlm.monitoring.figures import PASSES, figures_of, regions_in

FILE = "report.md"


def write_report(folder: Path, *, title: str, facts: Sequence[tuple[str, str]], speed: Sequence[str]) -> None:
    """Adds one start of a run to `report.md` of its folder.

    Args:
        title: which steps it took, and when.
        facts: lines of its table.
        speed: what follows it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    head = "" if file.exists() else "# How this run went, start by start\n"
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts)]
    with open(file, "a", encoding="utf-8") as stream:
        stream.write("\n".join([head, f"## {title}", "", *table, "", *speed, ""]))


def machine_of(device: torch.device) -> str:
    """The device, and the versions that decide how fast it is."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    return f"{name}; torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"


def speed_table(sums: Mapping[str, float], *, world: int) -> list[str]:
    """Of each region: its share of the time, operations of a step by pass, speed and utilization of a rank."""
    if not sums.get("steps"):
        return [
            "No step was measured: the first one of a start, in which workers begin and kernels are chosen, is not."
        ]
    figures, steps = figures_of(sums, world=world), sums["steps"] / world
    lines = [
        "| part | time | TFLOP a step: forward | recomputed | backward | TFLOP/s | MFU |",
        "|---|---|---|---|---|---|---|",
    ]
    for region in regions_in(sums):
        flops = [sums[f"flops/{region}/{when}"] for when in PASSES]
        cells = [f"{count / steps / 1e12:,.3g}" if count else "" for count in flops]
        speed = f"{sum(flops) / sums[f'time/{region}'] / 1e12:,.3g}" if any(flops) else ""
        lines.append(
            f"| {region} | {figures[f'time/{region}']:.1%} | {' | '.join(cells)} | {speed} | "
            f"{_percent(figures.get(f'mfu/{region}'))} |"
        )
    every = [sum(sums[f"flops/{region}/{when}"] for region in regions_in(sums)) for when in PASSES]
    cells = [f"{count / steps / 1e12:,.3g}" if count else "" for count in every]
    speed = f"{sum(every) / sums['wall'] / 1e12:,.3g}"
    lines.append(f"| all | 100% | {' | '.join(cells)} | {speed} | {_percent(figures.get('mfu/total'))} |")
    return [
        *lines,
        "",
        "TFLOP/s and MFU are of one device. MFU leaves out what was recomputed, and is a share of the measured product "
        "of square matrices; causal attention counts in full. `row` is what lies between the parts, `loss` what is "
        "behind the vocabulary projection; what no part took is waiting, logging and saving.",
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
