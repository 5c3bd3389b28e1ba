from vlm.vision.pyramid import ConvNeXtPyramid, Pyramid
from vlm.vision.towers import TimmTower, Tower, TowerFacts, VisionTower

__all__ = ["ConvNeXtPyramid", "Pyramid", "TimmTower", "Tower", "TowerFacts", "VisionTower"]
