from vlm.connectors.glu import GLU
from vlm.connectors.mining import PatchMining
from vlm.connectors.projectors import (
    MLP,
    Connector,
    Downsample,
    FlaggedLinear,
    JoinedLinear,
    JoinNeighbours,
    Linear,
    Newline,
    Separators,
)
from vlm.connectors.qformer import QFormer
from vlm.connectors.resampler import Resampler

__all__ = [
    "GLU",
    "MLP",
    "Connector",
    "Downsample",
    "FlaggedLinear",
    "JoinNeighbours",
    "JoinedLinear",
    "Linear",
    "Newline",
    "PatchMining",
    "QFormer",
    "Resampler",
    "Separators",
]
