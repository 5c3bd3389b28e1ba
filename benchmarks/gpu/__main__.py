"""Is the CUDA path right, and how fast are systems of 7B shape on one GPU? Unattended, within ten minutes of an H200.

    python -m benchmarks.gpu --out gpu_results [--budget 560] [--only checks,peak]
    python -m benchmarks.gpu --cpu-smoke --out FOLDER     every phase, tiny, on the CPU

Nothing is downloaded: weights are random and made on the device. Every phase is a process of its own, so that a crash,
a hang or a lack of memory takes nothing else along (a phase without memory runs once more with packs of half the size),
and has a share of the budget. Results are written as they come: `results.jsonl`, and at the end `report.md`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import vlm  # noqa: F401  (before lightning)
import torch

from benchmarks.clock import machine
from benchmarks.gpu.checks import check_packs, check_resume, check_systems
from benchmarks.gpu.peer import run_padded
from benchmarks.gpu.report import write_page
from benchmarks.gpu.results import Results
from benchmarks.gpu.speed import VARIANTS, measure_peak, run_variant

ROOT = Path(__file__).parents[2]
PHASES = {  # name: (what it does, seconds it may take)
    "checks": (lambda at: (check_systems(at), check_packs(at)), 120),
    "resume": (check_resume, 80),
    "peak": (measure_peak, 40),
    **{name: (lambda at, name=name: run_variant(at, name), 100) for name in VARIANTS},
    "padded": (run_padded, 90),
}
"""In the order of what matters most."""
OUT_OF_MEMORY = 3
"""Exit status of a phase whose packs were too large."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("--only", help="phases, with commas between them")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny and on the CPU: does the benchmark itself work?")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    parser.add_argument("--shrink", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(PHASES)
    if unknown := [name for name in chosen if name not in PHASES]:
        parser.error(f"no phase {unknown[0]!r}; there are {', '.join(PHASES)}")
    device = torch.device("cpu" if options.cpu_smoke else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --cpu-smoke tries the benchmark without one")
    if options.phase:
        return run_phase(Results(options.out, options.phase, device, options.shrink))
    options.out.mkdir(parents=True, exist_ok=True)
    return run_all(chosen, options, device)


def run_all(chosen: list[str], options: argparse.Namespace, device: torch.device) -> int:
    """Runs phases one after another while there is time, and writes the page about them.

    Returns:
        1 where a check or a phase has failed, else 0.
    """
    whole = Results(options.out, "all", device)
    whole.file.write_text("")
    whole.note("machine", None, ", ".join(f"{name} {value}" for name, value in machine(device.type).items()))
    end = time.monotonic() + options.budget
    for name in chosen:
        print(f"\n== {name}, {end - time.monotonic():.0f} s left", flush=True)
        phase = Results(options.out, name, device)
        for shrink in (1, 2):
            left = min(PHASES[name][1], end - time.monotonic())
            if left < 20:
                phase.note("left out", None, "no time was left")
                break
            start = time.monotonic()
            status = run_phase(phase) if options.cpu_smoke else _in_process(name, options, shrink, left)
            said = {0: "done", OUT_OF_MEMORY: "out of memory", 124: "stopped, too long"}.get(status, f"status {status}")
            phase.note("ran", status == 0, f"{said}, {time.monotonic() - start:.0f} s, packs of 1/{shrink}")
            if status != OUT_OF_MEMORY:
                break
        write_page(options.out)
    entries = [json.loads(line) for line in whole.file.read_text().splitlines()]
    failed = [entry for entry in entries if entry["ok"] is False]
    print(f"\n{sum(entry['ok'] is True for entry in entries)} right, {len(failed)} wrong; {options.out / 'report.md'}")
    return 1 if failed else 0


def _in_process(name: str, options: argparse.Namespace, shrink: int, limit: float) -> int:
    command = [sys.executable, "-m", "benchmarks.gpu", f"--out={options.out}", f"--phase={name}", f"--shrink={shrink}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return 124


def run_phase(results: Results) -> int:
    """One phase, in this process."""
    work: Any = PHASES[results.phase][0]
    try:
        work(results)
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    except Exception as error:
        traceback.print_exc()
        results.note("failed", False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
