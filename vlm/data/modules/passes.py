"""Which samples go through which pass of an evaluation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlm.data.sources.base import Concat
from vlm.errors import UserError

if TYPE_CHECKING:
    from vlm.evaluation.judges import Judges


def split(samples: Concat, judges: Judges) -> dict[str | None, Sequence[int]]:
    """Indices of the samples that go through each pass of an evaluation.

    None: those whose loss is wanted, which is every sample that ends with an answer. A name: those whose answers its
    metrics judge. A sample can be in both.

    Raises:
        UserError: a sample in neither, or metrics that no sample belongs to.
    """
    if not judges.by_name:
        return {None: range(len(samples))}
    parts: defaultdict[str | None, list[int]] = defaultdict(list)
    names: set[str] = set()
    index = 0
    for source in samples.sources:
        for local in range(len(source)):
            sample = source[local]
            name = judges.of(source=source.name, task=sample.task)
            has_answer = sample.messages[-1].role == "assistant"
            names |= {source.name, sample.task or source.name}
            if name is None and not has_answer:
                raise sample.error(
                    f"has no answer to score, and evaluation.metrics names neither its source {source.name!r} nor its "
                    f"task {sample.task!r}; name metrics for one of them"
                )
            if name is not None:
                parts[name].append(index)
            if has_answer:
                parts[None].append(index)
            index += 1
    if unused := sorted(judges.by_name.keys() - parts.keys()):
        there = ", ".join(sorted(names))
        raise UserError(f"evaluation.metrics: no sample is of the source or task {unused[0]!r}; there are {there}")
    return {name: parts[name] for name in (None, *judges.by_name) if name in parts}
