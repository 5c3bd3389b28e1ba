from vlm.vision.augment import RandAugment
from vlm.vision.patches import Patches
from vlm.vision.preprocess import RandomCropFlip
from vlm.vision.pyramid import ConvNeXtPyramid, Pyramid
from vlm.vision.towers import TimmTower, Tower, TowerDescription, TowerFacts, see

__all__ = [
    "ConvNeXtPyramid",
    "Patches",
    "Pyramid",
    "RandAugment",
    "RandomCropFlip",
    "TimmTower",
    "Tower",
    "TowerDescription",
    "TowerFacts",
    "see",
]
