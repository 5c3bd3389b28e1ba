"""Weights published as a difference: LLaVA's first releases are deltas over LLaMA (its `apply_delta`)."""

from pathlib import Path

from torch import Tensor

from vlm.checkpoints.files.locate import preview
from vlm.checkpoints.files.weights import WeightFiles
from vlm.errors import UserError

_PROJECTOR = ("model.mm_projector.weight", "model.mm_projector.bias")
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_BUFFER = ".rotary_emb.inv_freq"


class DeltaFiles(WeightFiles):
    """The sum of a delta and its base, tensor by tensor, with what `WeightFiles` offers.

    The projector is new and stands in the delta as it is. A vocabulary table of the delta may have more rows than the
    base's: those are new too. Sums are made in the delta's dtype, float16 as published. There is no way back that
    keeps the bits: (a - b) + b is not a in float16.

    Args:
        delta: folder, file or hub id of the delta.
        base: the same of the base, in the names of Hugging Face.

    Raises:
        UserError: the two do not belong together.
    """

    def __init__(self, delta: str | Path, base: str | Path) -> None:
        super().__init__(delta)
        self._base = WeightFiles(base)
        base_shapes = self._base.shapes()
        for name in [name for name in self.keys() if name.endswith(_BUFFER) and name not in base_shapes]:
            del self._file_of[name]  # the difference of two equal buffers: nothing, of a base that lists no buffers
        shapes = self.shapes()
        new = [name for name in shapes if name not in base_shapes]
        if unknown := [name for name in new if name not in _PROJECTOR]:
            raise UserError(f"{base}: lacks {preview(unknown)} of the delta {delta}; is it the right base?")
        if lost := [name for name in base_shapes if name not in shapes and not name.endswith(_BUFFER)]:
            raise UserError(f"{delta}: lacks {preview(lost)} of the base {base}; the delta is incomplete")
        for name, shape in shapes.items():
            theirs = base_shapes.get(name, shape)
            grown = name in _TABLES and shape[0] >= theirs[0] and shape[1:] == theirs[1:]
            if shape != theirs and not grown:
                raise UserError(
                    f"{delta}: {name} has shape {shape}, the base {base} has {theirs}; is it the right base?"
                )

    def get(self, name: str) -> Tensor:
        tensor = super().get(name)
        if name not in self._base:
            return tensor
        base = self._base.get(name).to(tensor.dtype)
        total = tensor.clone()
        total[: len(base)] += base
        return total
