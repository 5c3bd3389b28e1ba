"""Networks of timm before they have values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DRAWS = frozenset({"normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"})


def empty_trunk(name: str, **options: Any) -> nn.Module:
    """A network of timm whose parameters on the meta device are not drawn.

    timm draws every tensor in its constructor; on the meta device this changes nothing and took half of the time.
    """
    with _NothingDrawn():
        return timm.create_model(name, pretrained=False, **options)


class _NothingDrawn(TorchFunctionMode):
    """Operations that change the values of a tensor do nothing to one that has none."""

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta and func.__name__ in _DRAWS:
            return args[0]
        return func(*args, **(kwargs or {}))
