from vlm.vision.augment import RandAugment
from vlm.vision.feature_files import FeatureFiles, with_keys
from vlm.vision.patches import Patches
from vlm.vision.preprocess import RandomCropFlip
from vlm.vision.pyramid import ConvNeXtPyramid, Pyramid
from vlm.vision.towers import TimmTower, Tower, TowerDescription, TowerFacts, keep_features, see

__all__ = [
    "ConvNeXtPyramid",
    "FeatureFiles",
    "Patches",
    "Pyramid",
    "RandAugment",
    "RandomCropFlip",
    "TimmTower",
    "Tower",
    "TowerDescription",
    "TowerFacts",
    "keep_features",
    "see",
    "with_keys",
]
