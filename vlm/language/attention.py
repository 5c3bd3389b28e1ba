"""Attention over a padding-free row: sequences lie one after another and never see each other.

Registered with transformers as the attention implementation `vlm_packed`. The layers receive `cu_seqlens` and `max_len`
as keywords of the model's forward (see `vlm.batch.Row`). On CUDA it is one variable-length kernel; on the CPU it is
SDPA per sequence, which gives exactly what separate forwards give.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

PACKED = "vlm_packed"


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
        key: float[1, kv_heads, N, head_dim]; fewer heads than `query` means grouped-query attention.
        value: like `key`.
        attention_mask: must be None; what may be seen is said by `cu_seqlens` alone.
        cu_seqlens: int32[S + 1].
        max_len: longest sequence; a plain int.
        cu_seqlens_k: bounds of the keys where they are not those of the queries (cross-attention, never causal). A
            sequence without any key finds zeros.
        max_len_k: most keys of a sequence.
        sliding_window: number of positions a token sees, itself included (Mistral v0.1, Qwen2).
        softcap: Gemma 2's soft cap on the scores.

    Returns:
        float[1, N, heads, head_dim] and no attention weights.

    Raises:
        ValueError: without `cu_seqlens`, or with a mask. Batched generation must switch to `sdpa`: with this
            implementation it would silently attend across the batch.
    """
    if cu_seqlens is None or max_len is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError(
            "packed attention takes one row with cu_seqlens and max_len and no attention mask; "
            "generate() switches to another implementation by itself"
        )
    if cu_seqlens_k is None or max_len_k is None:
        cu_seqlens_k, max_len_k = cu_seqlens, max_len
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if query.is_cuda and softcap is None and dropout == 0.0:
        return _varlen(
            query, key, value, cu_seqlens, max_len, cu_seqlens_k, max_len_k, scaling, causal, sliding_window
        ), None
    # on the CPU; the CUDA path above never reads values
    bounds = zip((query, key, value), (cu_seqlens, cu_seqlens_k, cu_seqlens_k), strict=True)
    # `split` and not slices: the gradient of each slice would be a tensor of the whole row, mostly zeros
    sequences = zip(*(tensor.split(cu.diff().tolist(), dim=2) for tensor, cu in bounds), strict=True)
    pieces = [_one_sequence(q, k, v, scaling, causal, dropout, sliding_window, softcap) for q, k, v in sequences]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _varlen(query, key, value, cu_seqlens, max_len, cu_seqlens_k, max_len_k, scaling, causal, sliding_window):
    from torch.nn.attention.varlen import varlen_attn

    left = sliding_window - 1 if sliding_window is not None and sliding_window < max_len else -1
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out: Any = varlen_attn(
        queries,
        keys,
        values,
        cu_seqlens,
        cu_seqlens_k,
        max_len,
        max_len_k,
        scale=scaling,
        window_size=(left, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None]


def _one_sequence(query, key, value, scaling, causal, dropout, sliding_window, softcap):
    length = query.shape[2]
    if key.shape[2] == 0:
        return query * 0.0
    windowed = sliding_window is not None and length > sliding_window
    if softcap is None and not windowed:
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
    distance = torch.arange(length, device=query.device)
    distance = distance[:, None] - distance[None, :]
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if windowed:
        hidden = hidden | (distance >= sliding_window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def _no_mask(*args: object, **kwargs: object) -> None:
    return None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)
