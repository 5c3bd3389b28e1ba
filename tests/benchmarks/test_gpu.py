"""The benchmark of a GPU does what it says, in small, where there is none."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import PHASES, main
from benchmarks.gpu.speed import VARIANTS


@pytest.mark.slow
def test_every_phase_runs_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants of one network begin with the same loss, and none gives the page a gap."""
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--cpu-smoke", f"--out={tmp_path}"])
    assert main() == 0
    entries = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {entry["phase"] for entry in entries if entry["name"] == "ran"} == set(PHASES)
    assert not any(entry["ok"] is False for entry in entries)
    speeds = {entry["phase"]: entry for entry in entries if "speed" in entry}
    assert speeds.keys() == {*VARIANTS, "padded"}
    losses = [speeds[name]["first_loss"] for name in VARIANTS if name.startswith("stage2")]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3)  # 2e-5 measured
    page = (tmp_path / "report.md").read_text()
    assert "0 wrong" in page
    assert all(f"| {name} | " in page for name in speeds)
