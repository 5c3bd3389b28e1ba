"""Seconds of a device, and what was measured on."""

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch


def now(device: str) -> float:
    """Seconds, when all that a device was given is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def processor() -> str:
    """The processor's name, as the system has it."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def machine(device: str) -> dict[str, str]:
    """What numbers were measured on: processor or GPU, threads, versions, how busy it was with other things."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "load before": f"{os.getloadavg()[0]:.1f}",
        **{package: version(package) for package in ("torch", "transformers", "lightning")},
    }
