"""InternLM-XComposer2-4KHD for the contract test."""

from typing import Any

from tests.support.xcomposer2 import xcomposer2
from vlm.systems import XComposer2HD4K


def xcomposer2_4khd(**changes: Any) -> XComposer2HD4K:
    """6 tokens of the whole and one behind them, then 4 for each of up to 4 tiles and one behind each of their rows."""
    return XComposer2HD4K(**(xcomposer2().arguments | {"hd_num": 4} | changes))
