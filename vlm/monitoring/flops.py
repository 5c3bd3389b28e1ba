"""Floating-point operations of a system as it runs: frozen parts, recomputation, label positions and all."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlm.planning.operators import count_flops, kernel_work
from vlm.planning.regions import Pass, Regions, pass_of


class CountedFlops(TorchDispatchMode):
    """Inside, the operators that run are counted, by the formulas of a plan; a multiplication and an addition are two.

    Compiled blocks run uncompiled meanwhile: what is inside of them is not seen.

    Nothing is read from the device meanwhile: `flops` does.

    Attributes:
        dtypes: {dtype of the operands: number} so far, without the kernel of attention.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.dtypes: Counter[torch.dtype] = Counter()
        self._known: Counter[tuple[str, Pass]] = Counter()
        self._on_device: list[tuple[tuple[str, Pass], int, Tensor]] = []  # where, factor, int64[] other factor
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
        if (work := kernel_work(func, args)) is not None:
            self._on_device.append(((self._regions.now(), pass_of(func)), *work))
        elif count := count_flops(func, args, kwargs or {}, out):
            self._known[self._regions.now(), pass_of(func)] += count
            self.dtypes[next(a.dtype for a in args if isinstance(a, Tensor))] += count
        return out

    @property
    def flops(self) -> Counter[tuple[str, Pass]]:
        """{(region, pass): number}; waits for the device."""
        if self._on_device:
            others = torch.stack([other for _, _, other in self._on_device]).tolist()
            for (where, factor, _), other in zip(self._on_device, others, strict=True):
                self._known[where] += factor * other
            self._on_device = []
        return self._known


class FlopRates:
    """What packs cost, by packs that were counted: the work of a region in proportion to what its networks are given.

    What lies between the parts goes with the tokens of the pack.
    """

    def __init__(self) -> None:
        self._packs: list[CountedFlops] = []
        self._units: Counter[str] = Counter()

    def add(self, counted: CountedFlops, units: Mapping[str, int]) -> None:
        """A pack that was counted, and what it gave to each region."""
        self._packs.append(counted)
        self._units.update(units)

    def knows(self, units: Mapping[str, int]) -> bool:
        """Whether every region that is given something has been counted."""
        return all(self._units[region] for region, count in units.items() if count)

    @property
    def dtype(self) -> torch.dtype | None:
        """In which most is computed; None: nothing is counted yet."""
        dtypes = sum((counted.dtypes for counted in self._packs), Counter[torch.dtype]())
        return max(dtypes, key=dtypes.__getitem__, default=None)

    def of(self, units: Mapping[str, int]) -> dict[tuple[str, Pass], float]:
        """{(region, pass): number} of packs that give so much; waits for the device the first time."""
        flops = sum((counted.flops for counted in self._packs), Counter[tuple[str, Pass]]())
        return {
            (region, when): count * units.get(region, 0) / self._units[region]
            for (region, when), count in flops.items()
            if self._units[region]
        }


def is_compiled(module: Any) -> bool:
    """Whether blocks of it are compiled (`callbacks.CompiledBlocks`)."""
    return module.compile_network is not None
