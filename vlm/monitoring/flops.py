"""Floating-point operations of a system as it runs: frozen parts, recomputation, label positions and all."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlm.planning.operators import count_flops
from vlm.planning.regions import Pass, Regions, pass_of


class CountedFlops(TorchDispatchMode):
    """Inside, the operators that run are counted, by the formulas of a plan; a multiplication and an addition are two.

    Compiled blocks run uncompiled meanwhile: what is inside of them is not seen.

    Attributes:
        flops: {(region, pass): number} so far.
        dtypes: {dtype of the operands: number} so far.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.flops: Counter[tuple[str, Pass]] = Counter()
        self.dtypes: Counter[torch.dtype] = Counter()
        self._regions = Regions(module)
        self._compiles = is_compiled(module)

    def __enter__(self) -> "CountedFlops":
        self._stance = torch.compiler.set_stance("force_eager") if self._compiles else None
        self._regions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._regions.__exit__()
        if self._stance is not None:
            self._stance.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := count_flops(func, args, kwargs or {}, out):
            self.flops[self._regions.now(), pass_of(func)] += count
            self.dtypes[next(a.dtype for a in args if isinstance(a, Tensor))] += count
        return out


class FlopRates:
    """What packs cost, by packs that were counted: the work of a region in proportion to what its networks are given.

    What lies between the parts goes with the tokens of the pack.
    """

    def __init__(self) -> None:
        self._flops: Counter[tuple[str, Pass]] = Counter()
        self._units: Counter[str] = Counter()
        self.dtypes: Counter[torch.dtype] = Counter()

    def add(self, counted: CountedFlops, units: Mapping[str, int]) -> None:
        """A pack that was counted, and what it gave to each region (`units_of`)."""
        self._flops.update(counted.flops)
        self._units.update(units)
        self.dtypes.update(counted.dtypes)

    def knows(self, units: Mapping[str, int]) -> bool:
        """Whether every region that is given something has been counted."""
        return all(self._units[region] for region, count in units.items() if count)

    @property
    def dtype(self) -> torch.dtype | None:
        """In which most is computed; None: nothing is counted yet."""
        return max(self.dtypes, key=self.dtypes.__getitem__, default=None)

    def of(self, units: Mapping[str, int]) -> dict[tuple[str, Pass], float]:
        """{(region, pass): number} of packs that give so much."""
        return {
            (region, when): count * units.get(region, 0) / self._units[region]
            for (region, when), count in self._flops.items()
            if self._units[region]
        }


def is_compiled(module: nn.Module) -> bool:
    """Whether blocks of it are compiled."""
    return any(child._compiled_call_impl is not None for child in module.modules())
