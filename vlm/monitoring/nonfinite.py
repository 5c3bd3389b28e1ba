"""Which packs of a run a loss that is not finite came from."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlm.batch import Batch, SampleInfo


@dataclass(frozen=True)
class MicroBatchRecord:
    """One micro-batch of this rank; its tensors stay where they are until somebody asks.

    Attributes:
        losses: per term, shares of the step's mean, summed over its micro-batches so far.
    """

    step: int
    samples: tuple[SampleInfo, ...]
    cu_seqlens: Tensor
    owner: Tensor
    losses: Mapping[str, Tensor]

    @classmethod
    def of(cls, batch: Batch, *, step: int, losses: Mapping[str, Tensor]) -> "MicroBatchRecord":
        return cls(step, batch.samples, batch.text.cu_seqlens, batch.text.owner, dict(losses))


@dataclass(frozen=True)
class NonFiniteReport:
    """The first step at which something was not finite.

    Attributes:
        packs: all of that step, as JSON (see `as_json`).
        terms: loss terms that are not finite; none if it was something else.
        sample_ids: of the packs where it began.
    """

    step: int
    packs: list[dict[str, Any]]
    terms: list[str]
    sample_ids: list[str]


def as_json(packs: Iterable[MicroBatchRecord], *, rank: int) -> list[dict[str, Any]]:
    """Packs in their order; numbers that JSON has not are strings, lengths are counted in tokens."""
    described: list[dict[str, Any]] = []
    before: MicroBatchRecord | None = None
    for pack in packs:
        tokens = [0] * len(pack.samples)
        for owner, length in zip(pack.owner.tolist(), pack.cu_seqlens.diff().tolist(), strict=True):
            tokens[owner] += length
        earlier = before.losses if before is not None and before.step == pack.step else {}
        losses = {term: float(value) - float(earlier.get(term, 0.0)) for term, value in pack.losses.items()}
        described.append(
            {
                "rank": rank,
                "step": pack.step,
                "losses": {term: value if math.isfinite(value) else str(value) for term, value in losses.items()},
                "samples": [
                    {"id": sample.id, "source": sample.source, "tokens": length, "filler": sample.filler}
                    for sample, length in zip(pack.samples, tokens, strict=True)
                ],
            }
        )
        before = pack
    return described


def find_culprits(packs: Sequence[dict[str, Any]], *, looked: int) -> NonFiniteReport:
    """Where it began, among the described packs of all ranks up to the step `looked` at."""
    packs = [pack for pack in packs if pack["step"] <= looked]
    bad = [pack for pack in packs if any(isinstance(value, str) for value in pack["losses"].values())]
    step = min((pack["step"] for pack in bad), default=looked)
    of_step = [pack for pack in packs if pack["step"] == step]
    guilty = [pack for pack in bad if pack["step"] == step]
    terms = [term for pack in guilty for term, value in pack["losses"].items() if isinstance(value, str)]
    ids = [sample["id"] for pack in guilty or of_step for sample in pack["samples"]]
    return NonFiniteReport(step, of_step, list(dict.fromkeys(terms)), ids)
