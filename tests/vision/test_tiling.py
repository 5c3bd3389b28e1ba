"""AnyRes against the official tables, pixels and splice."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import GOLDEN
from vlm.errors import UserError
from vlm.levels import level_table, levels_of, look_up
from vlm.vision.preprocess import CLIP_MEAN, CLIP_STD
from vlm.vision.tiling import NEWLINE, AnyRes

NEXT = AnyRes(336, 24)
ROWS = json.loads((GOLDEN / "llava_anyres_table__a" / "rows.json").read_text())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['width']}x{row['height']}")
def test_the_official_table(row: dict) -> None:
    size = row["width"], row["height"]
    assert NEXT.grid(*size) == (row["grid_w"], row["grid_h"])
    assert NEXT.num_views(*size) == row["n_views"]
    assert list(NEXT.content(*size)) == row["content_box_xyxy"]
    layout = NEXT.layout(*size)
    assert len(layout) == NEXT.num_tokens(*size) == row["image_tokens"]
    assert int((layout == NEWLINE).sum()) == row["unpadded_rows"]


def test_the_official_pixels() -> None:
    folder = GOLDEN / "llava_pixels__a"
    tensors = load_file(folder / "tensors.safetensors")
    sizes = json.loads((folder / "meta.json").read_text())["sizes"]
    table = level_table(CLIP_MEAN, CLIP_STD)
    for index in range(len(sizes)):
        image = Image.fromarray(tensors[f"inputs/image_{index}"].numpy())
        pixels = look_up(torch.stack([levels_of(view) for view in AnyRes(28, 2).views(image)]), table)
        torch.testing.assert_close(pixels, tensors[f"outputs/anyres_pixels_{index}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "merge"), [("llava_splice_anyres__a", "spatial_unpad"), ("llava_splice_spatial_nounpad__a", "spatial")]
)
def test_the_official_order_of_features(case: str, merge: str) -> None:
    """The golden embeddings hold the connected features of each picture in a row, newlines among them."""
    folder = GOLDEN / case
    tensors = load_file(folder / "tensors.safetensors")
    config = (meta := json.loads((folder / "meta.json").read_text()))["config"]
    tiles = AnyRes(config["view_px"], config["patches_per_side"], merge=merge)
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    newline = next((v for k, v in weights.items() if k.endswith("image_newline")), None)
    assert (newline is not None) == (merge == "spatial_unpad")
    embeds = tensors["outputs/inputs_embeds"]
    checked = 0
    for index, (width, height) in enumerate(meta["image_sizes_width_height"]):
        ids = tensors["inputs/input_ids"]
        holders = [row for row in range(len(ids)) if (ids[row] == config.get("image_token_index", -200)).any()]
        if index not in holders:  # the dummy picture of a sample without one
            continue
        features = tensors[f"inputs/tower_features_{index}"]
        assert features.shape[0] == tiles.num_views(width, height)
        start = int((ids[index] == config.get("image_token_index", -200)).nonzero()[0])
        flat = _connect(features, weights).flatten(0, 1)
        made = (flat if newline is None else torch.cat([flat, newline[None]]))[tiles.layout(width, height)]
        torch.testing.assert_close(embeds[index, start : start + len(made)], made, rtol=0, atol=1e-5)
        checked += 1
    assert checked == 2


def _connect(features: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    layers = sorted({k.rsplit(".", 1)[0] for k in weights if "mm_projector" in k})
    assert layers
    for number, layer in enumerate(layers):
        if number:
            features = torch.nn.functional.gelu(features)
        features = torch.nn.functional.linear(features, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
    return features


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from(["spatial_unpad", "spatial", "flat"]))
def test_every_token_shows_a_feature_once(width: int, height: int, merge: str) -> None:
    tiles = AnyRes(28, 2, merge=merge)
    layout = tiles.layout(width, height)
    assert len(layout) == tiles.num_tokens(width, height)
    shown = layout[layout != NEWLINE]
    assert len(shown.unique()) == len(shown)
    assert shown.max() < tiles.num_views(width, height) * 4
    assert shown[:4].tolist() == [0, 1, 2, 3]
    left, top, right, bottom = tiles.content(width, height)
    columns, rows = tiles.grid(width, height)
    assert 0 <= left < right <= columns * 28
    assert 0 <= top < bottom <= rows * 28


def test_a_tile_shows_its_part_of_the_picture() -> None:
    image = Image.new("RGB", (112, 112))
    for x, y, color in ((0, 0, (255, 0, 0)), (56, 0, (0, 255, 0)), (0, 56, (0, 0, 255)), (56, 56, (255, 255, 255))):
        image.paste(color, (x, y, x + 56, y + 56))
    _, *parts = AnyRes(56, 4).views(image)
    middles = [tuple(np.asarray(part)[28, 28].tolist()) for part in parts]
    assert middles == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def test_wrong_settings() -> None:
    with pytest.raises(UserError, match="at least one"):
        AnyRes(336, 24, grids=[])
    with pytest.raises(UserError, match="of 1 or more"):
        AnyRes(336, 24, grids=[(0, 2)])
    with pytest.raises(UserError, match="spatial_unpad, spatial, flat"):
        AnyRes(336, 24, merge="tiles")
