"""A stand-in for CUDA's variable-length attention: its signatures and checks, on any device; and what to ask of both.

What it computes is written out, in float32, and rounded to the dtype of its inputs as the kernel's result is.
"""

import itertools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlm.language.attention
from vlm.batch import Batch
from vlm.language.attention import packed_attention

SIGNATURES = ("torch 2.11", "torch 2.13")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


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
        with torch._C.DisableTorchFunction():  # a kernel reads its bounds where they are: `tests.support.host_reads`
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


LENGTHS = (7, 1, 12, 3)
CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "one sequence": {"lengths": (23,)},
    "grouped queries": {"kv_heads": 2},
    "one key head": {"kv_heads": 1, "head_dim": 64},
    "sliding window": {"sliding_window": 4, "kv_heads": 2},
    "window longer than any sequence": {"sliding_window": 30},
    "own scale": {"scaling": 0.5},
    "both directions": {"is_causal": False},
    "keys of another row": {"is_causal": False, "lengths_k": (5, 0, 16, 1), "kv_heads": 2},
    "no keys at all": {"is_causal": False, "lengths_k": (0, 0, 0, 0)},
    "float16": {"dtype": torch.float16},
    "autocast": {"autocast": True},
}
"""What the kernel has to be right at: `inputs` and `attend` read them."""


def inputs(case: dict[str, Any]) -> list[Tensor]:
    """Queries, keys and values; under autocast queries and keys are float32, as rotary positions leave them."""
    head_dim, kv_heads = case.get("head_dim", 16), case.get("kv_heads", 4)
    lengths = case.get("lengths", LENGTHS)
    n, m = sum(lengths), sum(case.get("lengths_k", lengths))
    made = [torch.randn(1, heads, length, head_dim) for heads, length in ((4, n), (kv_heads, m), (kv_heads, m))]
    dtype = case.get("dtype", torch.bfloat16)
    return [tensor if case.get("autocast") and i < 2 else tensor.to(dtype) for i, tensor in enumerate(made)]


def attend(inputs: list[Tensor], case: dict[str, Any], *, device: str = "cpu", exact: bool = False) -> list[Tensor]:
    """Output and gradients in float32 on the CPU; `exact` computes in float32."""
    options = {
        name: case[name] for name in ("scaling", "dropout", "sliding_window", "softcap", "is_causal") if name in case
    }
    for name, lengths in (("", case.get("lengths", LENGTHS)), ("_k", case.get("lengths_k"))):
        if lengths is not None:
            options[f"cu_seqlens{name}"] = torch.tensor((0, *lengths), device=device).cumsum(0)
            options[f"max_len{name}"] = max(lengths)
    leaves = [(t.float() if exact else t).to(device, copy=True).requires_grad_() for t in inputs]
    with torch.autocast(device, torch.bfloat16, enabled=case.get("autocast", False) and not exact):
        out, _ = packed_attention(nn.Identity(), *leaves, None, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    (out.float() * weights).sum().backward()
    return [tensor.float().cpu() for tensor in (out.detach(), *(leaf.grad for leaf in leaves))]


def gradients(
    module: Any, batch: Batch, precision: str, *, guard: AbstractContextManager | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a pack, in float32 on the CPU; the forward pass runs inside of `guard`."""
    module.zero_grad()
    with torch.autocast(module.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"), guard or nullcontext():
        loss = sum(module.losses(batch).values())
    loss.backward()
    return loss.item(), {n: p.grad.float().cpu() for n, p in module.named_parameters() if p.requires_grad}
