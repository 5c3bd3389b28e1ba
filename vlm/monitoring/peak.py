"""How fast a device multiplies matrices, measured: what utilization is a share of."""

import statistics
import time
from functools import cache

import torch

_ON_CPU, _ON_CUDA = 1024, (8192, 4096, 2048)
_REPEATS = {"cuda": 10}


@cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of square products, as the process is set up (threads, TF32).

    Measured once in a process, in a few tenths of a second; on CUDA with matrices of 8192, where three of them take no
    more than a quarter of the free memory. Draws from no generator that training draws from.
    """
    size = _ON_CPU if device.type != "cuda" else _largest(device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    # random numbers: a GPU is faster, because cooler, on constants
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = []
    for _ in range(1 + _REPEATS.get(device.type, 3)):  # the first one chooses a kernel
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:])


def _largest(device: torch.device, dtype: torch.dtype) -> int:
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + kept
    return next((n for n in _ON_CUDA if 3 * n * n * max(4, dtype.itemsize) <= free / 4), _ON_CUDA[-1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
