"""Peak memory of a process."""

from pathlib import Path


def peak_rss_gib() -> float:
    """GiB of this process since it started; not `ru_maxrss`, which a process inherits from the one that started it."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20
