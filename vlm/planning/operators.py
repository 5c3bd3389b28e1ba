"""What an operator costs: torch's own formulas, and those of the operators that they leave out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn.attention import varlen  # noqa: F401  (registers the kernel)
from torch.utils.flop_counter import flop_registry

_aten: Any = torch.ops.aten
_kernel: Any = torch.ops.torch_attn


def count_flops(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of a call; a multiplication and an addition are two.

    Causal attention counts as if every token saw every other one of its sequence, as torch counts it.
    """
    packet = func._overloadpacket
    if (
        packet is _aten._grouped_mm
    ):  # tokens sorted by expert, of experts and, backward, of tokens as the inner dimension
        return int(2 * args[0].numel() * args[1].shape[-1])
    if packet in ATTENTION:
        return ATTENTION[packet](*args)
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def is_cast(func: Any) -> bool:
    """Whether the result is the first argument in another dtype."""
    return func._overloadpacket is _aten._to_copy


def adds_in_place(func: Any, args: Sequence[Any]) -> bool:
    """Whether gradients meet here, which autograd adds in place unless somebody watches it.

    Not those that are views, as a gradient of a linear layer's weight is: their memory belongs to two tensors.
    """
    if func._overloadpacket is not _aten.add or not all(isinstance(arg, Tensor) for arg in args[:2]):
        return False
    first, second = args[:2]
    holders = torch._C._storage_Use_Count(first.untyped_storage()._cdata)  # type: ignore[attr-defined]
    is_own = holders <= _OWN and first.is_contiguous()
    return is_own and first.shape == second.shape and first.dtype == second.dtype


_OWN = 2
"""Holders of the memory of a tensor that shares it with none, while a mode looks at it."""


def is_choice(func: Any) -> bool:
    """Whether scores become logarithms of probabilities."""
    return func._overloadpacket is _aten._log_softmax


def is_forward_attention(func: Any) -> bool:
    return func._overloadpacket is _kernel._varlen_attn


def _attend(products: int, query: Tensor, key: Tensor, value: Tensor) -> int:
    """Of tensors float[..., heads, tokens, width]; `products` of queries with keys count as such."""
    batch, (heads, n, width) = query.shape[:-3].numel(), query.shape[-3:]
    values = value.shape[-1]
    return 2 * batch * heads * n * key.shape[-2] * _widths(products, width, values)


def kernel_work(func: Any, args: Sequence[Any]) -> tuple[int, Tensor] | None:
    """Of a call of the variable-length kernel, the two factors of its operations: those of a query with a key, and how
    many such pairs there are, int64[] on the device, so that nobody waits for it; None: it is another operator."""
    place = _KERNELS.get(func._overloadpacket)
    if place is None:
        return None
    products, (query, value, bounds, bounds_k) = place[0], (args[i] for i in place[1])
    pairs = (bounds.diff().long() * bounds_k.diff().long()).sum()
    return 2 * query.shape[1] * _widths(products, query.shape[2], value.shape[2]), pairs


def _widths(products: int, width: int, values: int) -> int:
    """Backward has the scores again, and four gradients."""
    return {2: width + values, 5: 3 * width + 2 * values}[products]


_KERNELS: dict[Any, tuple[int, tuple[int, ...]]] = {
    _kernel._varlen_attn: (2, (0, 2, 3, 4)),
    _kernel._varlen_attn_backward: (5, (1, 3, 6, 7)),
}
"""{operator: products of queries with keys, places of queries, values and both bounds among its arguments}."""


def _attend_in_kernel(products: int, query: Tensor, value: Tensor, bounds: tuple, longest: tuple[int, int]) -> int:
    """Of tensors float[tokens, heads, width], by the true length of each sequence."""
    pairs = sum(
        n * k for n, k in zip(*(_lengths(b, most) for b, most in zip(bounds, longest, strict=True)), strict=True)
    )
    return 2 * query.shape[1] * pairs * _widths(products, query.shape[2], value.shape[2])


def _lengths(bounds: Tensor, longest: int) -> list[int]:
    if isinstance(bounds, FakeTensor):  # made on the way, so that nobody knows its values: as long as may be
        return [longest] * (len(bounds) - 1)
    with unset_fake_temporarily():
        return bounds.diff().tolist()


ATTENTION: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_: _attend(2, q, k, v),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_: _attend(5, q, k, v),
    _kernel._varlen_attn: lambda q, k, v, bq, bk, mq, mk, *_: _attend_in_kernel(2, q, v, (bq, bk), (mq, mk)),
    _kernel._varlen_attn_backward: lambda grad, q, k, v, out, lse, bq, bk, mq, mk, *_: _attend_in_kernel(
        5, q, v, (bq, bk), (mq, mk)
    ),
}
"""Attention of which torch's counter knows nothing (that of the CPU), or the true lengths of no fake tensor."""
