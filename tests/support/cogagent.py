"""CogAgent for the contract test."""

from typing import Any

from tests.support.cogvlm import cogvlm
from vlm.systems import CogAgent
from vlm.vision import TimmTower

EVA_L = {"img_size": 42, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 4, "ref_feat_shape": [2, 2]}


def cogagent(**changes: Any) -> CogAgent:
    """18 image tokens per picture, 16 of them patches, and 36 finer places to look at."""
    high = TimmTower("eva02_large_patch14_clip_336", layer=-2, options=EVA_L)
    fine = {"vision_high": high, "cross_width": 16, "cross_heads": 2, "template": "cogvlm_chat"}
    return CogAgent(**(cogvlm().arguments | fine | changes))
