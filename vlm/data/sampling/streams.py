"""Sources that are read in streams: a rank has some of them, and the files that they lie in, to itself."""

from collections.abc import Mapping, Sequence

import numpy as np

from vlm.data.sampling.order import Blocks
from vlm.errors import UserError


class Streams:
    """Those of several sources, if any.

    Args:
        blocks: of each source, by its name; None where its samples are read one by one.
        ends: number of samples up to and with each source.

    Attributes:
        by_name: how many there are, of each source that has more than one.
    """

    def __init__(self, blocks: Mapping[str, Blocks | None], ends: Sequence[int]) -> None:
        self.by_name = {name: own.streams for name, own in blocks.items() if own is not None and own.streams > 1}
        self._blocks = list(blocks.values())
        self._ends = list(ends)

    def parts(self, world: int) -> int:
        """Into how many parts a step is cut before it is dealt: one for each rank where some source has streams.

        Raises:
            UserError: a source has too few of them.
        """
        for name, streams in self.by_name.items():
            if streams < world:
                raise UserError(f"source {name!r} has {streams} streams, less than the {world} ranks; raise 'streams'")
        return world if self.by_name else 1

    def in_order(self, steps: list[list[int]]) -> list[list[int]]:
        """The draws of each step in the order of the streams that they come from; those of no stream evenly among them.

        So a part of a step that is cut out at the same place always comes from the same streams, or their neighbours.
        Without streams the steps are as they were.
        """
        if not self.by_name or not steps:
            return steps
        sizes = [len(step) for step in steps]
        draws = np.concatenate([np.asarray(step, dtype=np.int64) for step in steps])
        number, samples = np.repeat(np.arange(len(sizes)), sizes), draws % self._ends[-1]
        place, elsewhere = np.zeros(len(draws)), np.ones(len(draws), dtype=bool)
        for start, end, own in zip([0, *self._ends[:-1]], self._ends, self._blocks, strict=True):
            if own is not None and own.streams > 1:
                here = np.flatnonzero((samples >= start) & (samples < end))
                stream = np.searchsorted(own.stream_ends, samples[here] - start, side="right")
                place[here], elsewhere[here] = (stream + 0.5) / own.streams, False
        counts = np.bincount(number[elsewhere], minlength=len(sizes))
        turn = np.arange(elsewhere.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        place[elsewhere] = (turn + 0.5) / np.repeat(counts, counts)
        ordered = draws[np.lexsort((place, number))]
        return [step.tolist() for step in np.split(ordered, np.cumsum(sizes)[:-1])]
