"""Samples for `predict`, which makes its own packs."""

from torch.utils.data import Dataset

from vlm.data.loading.opaque import OpaqueBatch
from vlm.data.sources.base import Source


class PredictDataset(Dataset):
    """Samples of one rank in lists, undecoded."""

    def __init__(self, samples: Source, *, size: int, world: int, rank: int) -> None:
        self.samples = samples
        self.size = size
        self.mine = range(rank, len(samples), world)
        self.count = -(-len(samples) // (size * world))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> OpaqueBatch:
        return OpaqueBatch([self.samples[i] for i in self.mine[index * self.size : (index + 1) * self.size]])
