"""Shared by all tests. `vlm` is imported first: it repairs torchvision on CPU builds of torch."""

import json
import os
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import vlm  # noqa: F401
import hypothesis
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
# how long an example takes says something about the machine and what else it does
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

GOLDEN = Path(__file__).parent / "golden"


PATIENCE = 300.0
"""Seconds that nothing takes on the slowest machine: a bound on what hangs."""


def golden(case: str) -> dict[str, Tensor]:
    """Tensors of a golden case; a missing file fails the test."""
    return load_file(GOLDEN / case / "tensors.safetensors")


def golden_json(case: str, name: str = "meta.json") -> Any:
    return json.loads((GOLDEN / case / name).read_text())


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> None:
    # A process has one. Started by a test with loader workers, it would know what those need alone, and every rank of
    # every later test would import torch and lightning anew.
    if "tests.support.ranks" in sys.modules:
        forkserver.ensure_running()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Time of `vlm run instruct`, which costs none: a `FakeClock`; and no proxy on the way."""
    from tests.support.chat_server import FakeClock
    from vlm.procedures.instruct import command

    made = FakeClock()
    monkeypatch.setattr(command, "Clock", made.again)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return made
