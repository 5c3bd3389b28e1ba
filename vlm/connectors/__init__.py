from vlm.connectors.mining import PatchMining
from vlm.connectors.projectors import MLP, Connector, Downsample, Linear, Newline

__all__ = ["MLP", "Connector", "Downsample", "Linear", "Newline", "PatchMining"]
