"""Attention over a padding-free row: sequences lie one after another and never see each other.

Registered with transformers as the attention implementation `vlm_packed`. The layers receive `cu_seqlens` and `max_len`
as keywords of the model's forward (see `vlm.batch.Row`). On CUDA in half precision it is one variable-length kernel;
everywhere else it is SDPA per sequence, which gives exactly what separate forwards give, on a CPU always in float32.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

PACKED = "vlm_packed"
_HALF = (torch.float16, torch.bfloat16)
_planned: ContextVar[bool] = ContextVar("planned", default=False)


@torch.compiler.disable  # its lengths are another graph for every pack; a compiled block calls it as it is
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_len_k: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Block-diagonal attention.

    Args:
        query: float[1, heads, N, head_dim].
        key: float[1, kv_heads, M, head_dim]; fewer heads than `query` means grouped-query attention.
        value: like `key`.
        attention_mask: must be None; what may be seen is said by the bounds alone.
        cu_seqlens: int32[S + 1], bounds of the queries.
        max_len: longest sequence of queries; a plain int.
        cu_seqlens_k: int32[S + 1], bounds of the keys where they are other tokens than the queries (cross-attention,
            which is never causal). A sequence without any key gets zeros.
        max_len_k: longest sequence of keys; given with `cu_seqlens_k`.
        sliding_window: number of positions a token sees, itself included (Mistral v0.1, Qwen2).
        softcap: Gemma 2's soft cap on the scores.
        is_causal: by itself what `module.is_causal` says.

    Returns:
        float[1, N, heads, head_dim] and no attention weights. Under autocast it may be of autocast's dtype.

    Raises:
        ValueError: without `cu_seqlens`, or with a mask. Batched generation must switch to `sdpa`: with this
            implementation it would silently attend across the batch. Or order is asked for where there is none.
    """
    if cu_seqlens is None or max_len is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError(
            "packed attention takes one row with cu_seqlens and max_len and no attention mask; "
            "generate() switches to another implementation by itself"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if (cu_seqlens_k is None) != (max_len_k is None):
        raise ValueError("packed attention takes cu_seqlens_k and max_len_k together")
    if (causal and cu_seqlens_k is not None) or (sliding_window is not None and not causal):
        raise ValueError("causal attention is among the same tokens, and a sliding window belongs to causal attention")
    if cu_seqlens_k is None or max_len_k is None:
        cu_seqlens_k, max_len_k = cu_seqlens, max_len
    dtype = _kernel_dtype(query, value)
    if dtype is not None and softcap is None and dropout == 0.0 and key.shape[2]:
        # under autocast, rotary positions leave queries and keys in float32, and the kernel is none of its operators
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        bounds = (cu_seqlens.to(torch.int32), cu_seqlens_k.to(torch.int32), max_len, max_len_k)
        return _attend_in_kernel(query, key, value, bounds, scaling, causal, sliding_window), None
    # the lengths are read from the device, which has the host wait on a GPU; the kernel above reads nothing
    lengths, lengths_k = cu_seqlens.diff().tolist(), cu_seqlens_k.diff().tolist()
    wanted = _computes_in(query)
    in_float32 = query.device.type == "cpu" and wanted in _HALF
    if in_float32:
        # torch's backward pass in bfloat16 takes five times as long on a CPU for sequences of 70 tokens, and no less
        # for those of 800
        query, key, value = query.float(), key.float(), value.float()
    # `split` and not slices: the gradient of each slice would be a tensor of the whole row, mostly zeros
    splits = (query.split(lengths, dim=2), key.split(lengths_k, dim=2), value.split(lengths_k, dim=2))
    with torch.autocast("cpu", enabled=False) if in_float32 else nullcontext():
        pieces = [
            _attend_one_sequence(q, k, v, scaling, causal, dropout, sliding_window, softcap)
            for q, k, v in zip(*splits, strict=True)
        ]
    out = torch.cat(pieces, dim=2).transpose(1, 2)
    return out.to(wanted) if in_float32 else out, None


def _computes_in(query: Tensor) -> torch.dtype:
    """What attention is computed in: autocast's type, or that of the queries."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _kernel_dtype(query: Tensor, value: Tensor) -> torch.dtype | None:
    """What the variable-length kernel computes these in; None where it cannot."""
    head_dim, is_planned = query.shape[-1], _planned.get()
    if head_dim % 8 or head_dim > 256 or value.shape[-1] != head_dim:
        return None
    if not (is_planned or _has_kernel(query.device)):
        return None
    dtype = _computes_in(query)
    return dtype if is_planned or dtype in _HALF else None


@contextmanager
def planned_for_a_gpu() -> Iterator[None]:
    """Inside, tensors are fake ones (`vlm.planning`), and the path is the one that a GPU with the kernel takes.

    In float32 too, where SDPA does the same work and keeps the same tensors, but has to know the lengths.
    """
    before = _planned.set(True)
    try:
        yield
    finally:
        _planned.reset(before)


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _attend_in_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor, int, int],
    scaling: float | None,
    causal: bool,
    sliding_window: int | None,
) -> Tensor:
    from torch.nn.attention import varlen

    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    options: dict[str, Any] = {}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if _takes(varlen.varlen_attn, "enable_gqa"):
            options["enable_gqa"] = True
        else:  # torch 2.11
            keys, values = (tensor.repeat_interleave(groups, dim=1) for tensor in (keys, values))
    left = sliding_window - 1 if sliding_window is not None and sliding_window < bounds[2] else -1
    window = (left, 0) if causal else (-1, -1)
    out: Any = varlen.varlen_attn(queries, keys, values, *bounds, scale=scaling, window_size=window, **options)
    return out[None]


@functools.cache
def _takes(function: Callable, argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def _attend_one_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    causal: bool,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    length = query.shape[2]
    if key.shape[2] == 0:
        return query * (key.sum() + value.sum())  # zeros, and a gradient of zero for all three
    window = sliding_window if sliding_window is not None and length > sliding_window else None
    if softcap is None and window is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=causal,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        position = torch.arange(length, device=query.device)
        distance = position[:, None] - position[None, :]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value


# No mask function: transformers then makes no mask. With one it would look for packed sequences in the positions, and
# read a value of the device to know.
AttentionInterface.register(PACKED, packed_attention)
