from vlm.connectors.mining import PatchMining
from vlm.connectors.projectors import MLP, Connector, Linear, Newline

__all__ = ["MLP", "Connector", "Linear", "Newline", "PatchMining"]
