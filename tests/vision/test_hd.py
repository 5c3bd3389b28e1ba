"""The tiles of InternLM-XComposer2-4KHD against the official sizes, pixels and order of tokens."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import golden, golden_json
from vlm.connectors import JoinNeighbours, Separators
from vlm.errors import UserError
from vlm.vision.hd import ROW_END, SEPARATOR, HDTiles
from vlm.levels import level_table, levels_of, look_up
from vlm.vision.preprocess import CLIP_MEAN, CLIP_STD

CASE = "xc2_4khd_transform__a"
IMAGES = golden_json(CASE)["images"]


def test_the_official_sizes() -> None:
    for width, height, num, long, short, *wanted in golden_json(CASE)["geometry"]:
        tiles = HDTiles(336, 12, num=num)
        resized = tiles.resized(width, height)
        columns, rows = tiles.grid(width, height)
        assert (max(resized), min(resized)) == (long, short), (width, height, num)
        assert [columns * 336, rows * 336, columns, rows, tiles.num_tokens(width, height)] == wanted
        assert len(tiles.layout(width, height)) == wanted[-1]


@pytest.mark.parametrize("facts", IMAGES, ids=lambda facts: f"{facts['width']}x{facts['height']}_{facts['hd_num']}")
def test_the_official_pixels(facts: dict) -> None:
    """Bytes are equal; normalised pixels and the view of the whole, which is not antialiased, were too."""
    tensors, index = golden(CASE), facts["index"]
    tiles = HDTiles(336, 12, num=facts["hd_num"])
    canvas = tiles.canvas(Image.fromarray(tensors[f"inputs/img{index}"].numpy()))
    pixels = np.asarray(canvas)
    assert pixels.shape == (facts["out_h"], facts["out_w"], 3)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == facts["sha256_uint8_hwc"]
    table, levels = level_table(CLIP_MEAN, CLIP_STD), levels_of(canvas)
    whole, found = tiles.whole(look_up(levels, table)), look_up(tiles.tiles(levels), table)
    assert found.shape == (facts["tiles_h"] * facts["tiles_w"], 3, 336, 336)
    near = {"atol": 2e-5, "rtol": 0.0}
    torch.testing.assert_close(whole[:, 7::14, 7::14], tensors[f"outputs/img{index}_global_s14"], **near)
    torch.testing.assert_close(found.mean((2, 3)), tensors[f"outputs/img{index}_tile_mean"], **near)
    corners = torch.stack([found[:, :, 0, 0], found[:, :, -1, -1]], 1)
    torch.testing.assert_close(corners, tensors[f"outputs/img{index}_tile_first_last_px"], **near)
    assert len(tiles.layout(facts["width"], facts["height"])) == facts["n_tokens"]


def test_the_official_order_of_tokens() -> None:
    """2 x 2 to a token, separators, then the connector; 1e-6 seen."""
    tensors, config = golden("xc2_4khd_assembly__a"), golden_json("xc2_4khd_assembly__a")["config"]
    (rows, columns), dim = tensors["inputs/tile_hw"][0].tolist(), config["proj_in"]
    separators = Separators(dim)
    connector = torch.nn.Sequential(
        torch.nn.Linear(dim, config["proj_mid"]),
        torch.nn.GELU(),
        torch.nn.Linear(config["proj_mid"], config["proj_out"]),
    )
    separators.load_state_dict(
        {
            "row_end": tensors["weights/plora_sub_GN"].flatten(),
            "between": tensors["weights/plora_glb_GN"].flatten(),
        }
    )
    connector.load_state_dict(
        {f"{n}.{p}": tensors[f"weights/vision_proj.{n}.{p}"] for n in (0, 2) for p in ("weight", "bias")}
    )
    joined = separators(JoinNeighbours(by_rows=True)(tensors["inputs/clip_hidden"][:, 1:]).flatten(0, 1))
    layout = HDTiles(336, 12, num=rows * columns).layout(336 * columns, 336 * rows)
    layout = torch.where(layout == ROW_END, len(joined) - 2, torch.where(layout == SEPARATOR, len(joined) - 1, layout))
    before = joined[layout]
    torch.testing.assert_close(before.sum(1), tensors["outputs/pre_proj_rowsum"], atol=2e-5, rtol=0)
    torch.testing.assert_close(before[:30], tensors["outputs/pre_proj_head"], atol=0, rtol=0)
    torch.testing.assert_close(before[150:175], tensors["outputs/pre_proj_around_glb"], atol=0, rtol=0)
    with torch.no_grad():
        made = connector(joined)[layout]
    torch.testing.assert_close(made, tensors["outputs/tokens"][0], atol=2e-5, rtol=0)
    assert [len(made)] == tensors["outputs/lengths"].tolist()


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([1, 4, 9, 25, 55]))
def test_every_token_shows_a_feature_once(width: int, height: int, num: int) -> None:
    tiles = HDTiles(28, 2, num=num)
    if max(width, height) > 28 * num * min(width, height):
        return
    columns, rows = tiles.grid(width, height)
    layout = tiles.layout(width, height)
    assert len(layout) == tiles.num_tokens(width, height)
    assert layout[layout >= 0].sort().values.tolist() == list(range(4 * tiles.num_views(width, height)))
    assert int((layout == ROW_END).sum()) == 2 * (1 + rows)
    assert (layout == SEPARATOR).nonzero().flatten().tolist() == [6]
    # the largest grid: one more tile along the longer side would be too many
    assert columns * rows <= num
    ratio = max(columns, rows) + 1, max(width, height) / min(width, height)
    assert ratio[0] * -(-ratio[0] // ratio[1]) > num
    left, top, right, bottom = tiles.content(width, height)
    assert 0 <= left < right <= columns * 28
    assert 0 <= top < bottom <= rows * 28
    assert (left, right) == (0, columns * 28) or (top, bottom) == (0, rows * 28)  # white beside one side alone
    assert 1 <= tiles.num_own(width, height) <= num


def test_a_tile_shows_its_part_of_the_image() -> None:
    image = Image.new("RGB", (60, 120))
    image.paste((255, 0, 0), (0, 60, 60, 120))
    tiles = HDTiles(28, 2, num=2)
    upper, lower = tiles.tiles(levels_of(tiles.canvas(image)))
    assert upper[:, 14, 14].tolist() == [0, 0, 0]
    assert lower[:, 14, 14].tolist() == [255, 0, 0]


def test_largest_images() -> None:
    tiles = HDTiles(336, 12, num=55)
    assert (tiles.grid(3840, 1600), tiles.num_tokens(3840, 1600)) == ((11, 5), 8137)
    assert (tiles.grid(100, 5500), tiles.num_tokens(100, 5500)) == ((1, 55), 8737)
    assert [HDTiles(336, 12, num=num).num_tokens(10, 10 * num) for num in (9, 16, 25)] == [1561, 2653, 4057]


def test_what_cannot_be_cut() -> None:
    with pytest.raises(UserError, match="hd_num must be at least 1, found 0"):
        HDTiles(336, 12, num=0)
    with pytest.raises(
        UserError, match=r"1 x 20000 pixels is too thin: beside 18480 pixels its shorter side would have none"
    ):
        HDTiles(336, 12, num=55).grid(1, 20000)
    assert HDTiles(336, 12, num=55).resized(1, 18480) == (1, 18480)
