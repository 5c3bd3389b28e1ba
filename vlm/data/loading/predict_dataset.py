"""Samples for `predict`, which makes its own packs."""

from collections.abc import Set

from torch.utils.data import Dataset

from vlm.data.loading.opaque import OpaqueBatch
from vlm.data.sources.base import Source
from vlm.errors import SampleError
from vlm.sample import Sample


class PredictDataset(Dataset):
    """Samples of one rank in lists, undecoded; one that cannot be read is there as its error.

    Args:
        size: of a list.
        answered: positions of samples that nobody asks about again.
    """

    def __init__(self, samples: Source, *, size: int, world: int, rank: int, answered: Set[int] = frozenset()) -> None:
        self.samples = samples
        self.size = size
        asked = [position for position in range(len(samples)) if position not in answered]
        self.mine = asked[rank::world]
        # one list at least, an empty one if it has to be: Lightning runs no hooks where there is nothing to run
        self.count = max(1, -(-len(asked) // (size * world)))

    def __len__(self) -> int:
        return self.count

    def positions(self, index: int) -> list[int]:
        """Where the samples of a list stand among all."""
        return self.mine[index * self.size : (index + 1) * self.size]

    def __getitem__(self, index: int) -> OpaqueBatch:
        return OpaqueBatch([self._read(position) for position in self.positions(index)])

    def _read(self, position: int) -> Sample | SampleError:
        try:
            return self.samples[position]
        except SampleError as error:
            return error
