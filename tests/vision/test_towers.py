"""Vision towers: what must hold whatever a trainer does with their weights."""

import pytest
import torch

from vlm.vision import TimmTower


@pytest.mark.parametrize("name", ["eva_giant_patch14_clip_224", "vit_large_patch14_clip_quickgelu_336"])
def test_towers_run_where_parameters_alone_are_rounded(name: str) -> None:
    """As under sharded mixed precision, which leaves buffers in float32."""
    options = {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2}
    tower = TimmTower(name, layer=-2, class_token=True, options=options).build()
    for parameter in tower.parameters():
        parameter.data = parameter.data.bfloat16()
    features = tower(torch.zeros(1, 3, 28, 28, dtype=torch.bfloat16))
    assert features.dtype == torch.bfloat16
    features.sum().backward()
