"""Mini-Gemini against the official numbers (dvlab-research/MGM@769820c)."""

import vlm  # noqa: F401  (first: repairs torchvision)
import pytest
import torch
from torch import Tensor

from tests.conftest import golden, golden_json
from tests.systems import mini_gemini
from vlm.connectors import MLP, PatchMining
from vlm.connectors.mining import mine_views, windows
from vlm.errors import UserError
from vlm.vision import ConvNeXtPyramid
from vlm.vision.tiling import low_views

UNI = {"query": "query", "aux": "key", "val": "value"}


def mining_of(tensors: dict[str, Tensor]) -> tuple[PatchMining, torch.nn.Module]:
    """Mining and projector with the weights of a golden case."""
    weight = "weights/model.vlm_uni_{}_projector.{}.{}".format
    dim, high_dim = tensors[weight("aux", 1, "weight")].shape
    mining = PatchMining(dim, high_dim)
    mining.load_state_dict(
        {
            f"{ours}.{layer}.{kind}": tensors[weight(theirs, layer, kind)]
            for theirs, ours in UNI.items()
            for layer in (0, 1)
            for kind in ("weight", "bias")
        }
    )
    projector = MLP().build(dim, len(tensors["weights/model.mm_projector.0.weight"]))
    prefix = "weights/model.mm_projector."
    projector.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    return mining, projector


def rows(image: Tensor) -> Tensor:
    """float[V, A, H, W] -> float[V, H * W, A]."""
    return image.flatten(2).transpose(1, 2)


@torch.no_grad()
def test_mining_equals_the_official_numbers() -> None:
    """2e-6 seen."""
    tensors = golden("mgm_mining__a")
    mining, projector = mining_of(tensors)
    low, high = tensors["inputs/lr"], rows(tensors["inputs/hr"])
    found = mining(low, high)
    torch.testing.assert_close(found, tensors["outputs/mined"], atol=2e-5, rtol=0)
    torch.testing.assert_close(projector(low + found), tensors["outputs/tokens"], atol=2e-5, rtol=0)
    assert torch.equal(mine_views(mining, low[:, None], high, grid=1)[:, 0], found)

    crops, high = tensors["inputs/lr_hd"], rows(tensors["inputs/hr_hd"])
    views = torch.cat([crops[:, -1:], crops[:, :-1]], dim=1)  # the official input has the whole last
    tokens = projector((views + mine_views(mining, views, high, grid=2)).flatten(1, 2))
    torch.testing.assert_close(tokens, tensors["outputs/tokens_hd"], atol=2e-5, rtol=0)
    parts = crops[:, :-1]
    tokens = projector((parts + mine_views(mining, parts, high, grid=2)).flatten(1, 2))
    torch.testing.assert_close(tokens, tensors["outputs/tokens_grid_no_global"], atol=2e-5, rtol=0)


def test_windows_lie_where_their_feature_does() -> None:
    places = torch.arange(36.0)[None, :, None]
    cut = windows(places, 4)[0, :, :, 0]
    assert cut[1].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    with pytest.raises(ValueError, match="36 places cannot be cut into 16"):
        windows(places, 16)


@torch.no_grad()
def test_the_fine_map_equals_the_official_numbers() -> None:
    tensors, meta = golden("mgm_hr_tower__a"), golden_json("mgm_hr_tower__a")
    config = meta["config"]
    options = {"depths": config["depths"], "dims": config["dims"]}
    tower = ConvNeXtPyramid("convnext_large_mlp", image_size=config["hr_size"], options=options).build().eval()
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    tower.load_state_dict({f"trunk.{name.removeprefix('vision_')}": tensor for name, tensor in weights.items()})
    features = tower(tensors["inputs/image_hr"][None])
    assert features.shape[1:] == (tower.facts.num_tokens, tower.facts.dim)
    torch.testing.assert_close(features, rows(tensors["outputs/features"]), atol=3e-5, rtol=0)


def test_low_views_equal_the_official_ones() -> None:
    """The whole of HD is made from the view of twice the size, not from the picture."""
    tensors, meta = golden("mgm_hr_tower__a"), golden_json("mgm_hr_tower__a")
    pixels, size = tensors["inputs/image_hr"][None], meta["config"]["lr_size"]
    assert torch.equal(low_views(pixels, size=size)[0, 0], tensors["outputs/lr_plain"])
    views = low_views(pixels, size=size, grid=2, whole=True)[0]
    assert torch.equal(torch.cat([views[1:], views[:1]]), tensors["outputs/lr_hd_crops_global"])
    assert torch.equal(low_views(pixels, size=size, grid=2)[0], tensors["outputs/lr_hd_crops_only"])


def test_sizes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UserError, match="cannot be shared out among 4 x 4"):
        mini_gemini(vision_high=ConvNeXtPyramid("convnext_atto", 40))
    with pytest.raises(UserError, match="needs parts beside it"):
        mini_gemini(whole=True)
    with pytest.raises(UserError, match="is no ConvNeXt"):
        mini_gemini(vision_high=ConvNeXtPyramid("resnet18", 64))
