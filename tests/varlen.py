"""A stand-in for CUDA's variable-length attention: its signatures and checks, on any device.

What it computes is written out, in float32, and rounded to the dtype of its inputs as the kernel's result is.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import vlm.language.attention

SIGNATURES = ("torch 2.11", "torch 2.13")


class StandIn:
    """Takes the place of the kernel: `StandIn(monkeypatch, "torch 2.13")`. `calls` counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, signature: str) -> None:
        self.calls = 0
        kernel = {"torch 2.11": self._of_2_11, "torch 2.13": self._of_2_13}[signature]
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        monkeypatch.setattr(vlm.language.attention, "_has_kernel", lambda device: True)

    def _of_2_11(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        seqused_k: Tensor | None = None,
    ) -> Tensor:
        assert query.shape[1] == key.shape[1]
        return self._run(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale, window_size)

    def _of_2_13(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        seqused_k: Tensor | None = None,
        block_table: Tensor | None = None,
        num_splits: int | None = None,
    ) -> Tensor:
        if not enable_gqa and query.shape[1] != key.shape[1]:
            raise ValueError("Expect query and key/value to have the same number of heads")
        if enable_gqa and query.shape[1] % key.shape[1]:
            raise ValueError("Expect number of query heads to be a multiple of kv heads for GQA")
        assert cu_seq_k is not None
        return self._run(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale, window_size)

    def _run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        scale: float | None,
        window: tuple[int, int],
    ) -> Tensor:
        self.calls += 1
        assert query.dtype in (torch.float16, torch.bfloat16)
        assert query.dtype == key.dtype == value.dtype
        assert query.ndim == key.ndim == value.ndim == 3
        assert query.shape[2] == key.shape[2] <= 256
        assert query.shape[2] % 8 == 0
        assert key.shape == value.shape
        assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
        with torch._C.DisableTorchFunction():  # a kernel reads its bounds where they are
            for tensor, of, most in zip(bounds, (query, key), longest, strict=True):
                assert tensor.dtype == torch.int32
                assert tensor.is_contiguous()
                assert type(most) is int
                assert tensor[0] == 0
                assert tensor[-1] == len(of)
                assert tensor.diff().max() <= most
            ends, ends_k = (tensor.tolist() for tensor in bounds)
        pairs = zip(itertools.pairwise(ends), itertools.pairwise(ends_k), strict=True)
        pieces = [
            _attend(query[a:b], key[c:d], value[c:d], scale or query.shape[2] ** -0.5, window)
            for (a, b), (c, d) in pairs
        ]
        return torch.cat(pieces).to(query.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: tuple[int, int]) -> Tensor:
    """float32[n, heads, head_dim] of one sequence; positions are counted from the ends, as the kernel does."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.float().repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * scale
    ahead = torch.arange(len(key)) - (torch.arange(len(query)) + len(key) - len(query))[:, None]
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    for side, reach in zip((-ahead, ahead), window, strict=True):
        hidden |= (side > reach) if reach >= 0 else False
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value)


class _Waiting(TorchFunctionMode):
    """Raises where Python asks for a value, which on a GPU makes the host wait for the device."""

    READS = {
        getattr(torch.Tensor, name)
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy")
    } | {torch.nonzero, torch.equal, torch.unique}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.READS, f"the host waits for {func.__name__}"
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = [i for i in index if isinstance(i, Tensor) and i.dtype == torch.bool]
            assert not masks, "the host waits to count a mask"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Inside, a value that Python reads from a tensor fails the test."""
    with _Waiting():
        yield
