"""Pixels against the published pipelines, bytes exact before normalisation."""

import vlm  # noqa: F401

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlm.errors import UserError
from vlm.levels import level_table, levels_again, look_up
from vlm.vision import preprocess
from vlm.vision.preprocess import CLIP_MEAN, CLIP_STD, ImageTransform, RandomCropFlip, pad_to_square

GOLDEN = Path(__file__).parents[1] / "golden/llava_pixels__a/tensors.safetensors"
SIZE = 28


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("index", [0, 1])
def test_golden_pixels(index):
    tensors = load_file(GOLDEN)
    image = Image.fromarray(tensors[f"inputs/image_{index}"].numpy())
    color = tuple(int(channel * 255) for channel in CLIP_MEAN)
    assert np.array_equal(pad_to_square(image, color=color), tensors[f"outputs/expand2square_{index}"].numpy())
    for mode, expected in (
        ("pad", tensors[f"outputs/pad_pixels_{index}"]),
        ("crop", tensors[f"outputs/square_pixels_{index}"]),
        ("squash", tensors[f"outputs/anyres_pixels_{index}"][0]),
    ):
        transform = ImageTransform(SIZE, mode=mode)
        pixels = look_up(transform(image), transform.table)
        assert pixels.dtype == torch.float32
        torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def test_the_table_is_the_published_arithmetic():
    """Bit-equal: what the loader made of each byte before pixels travelled as bytes."""
    levels = torch.arange(256, dtype=torch.uint8).expand(2, 3, 1, 256)
    for mean, std in ((CLIP_MEAN, CLIP_STD), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))):
        wide_mean, wide_std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        table = level_table(mean, std)
        pixels = look_up(levels, table)
        assert torch.equal(pixels, (levels.double().div(255).float() - wide_mean) / wide_std)
        assert torch.equal(levels_again(pixels, table), levels)


@pytest.mark.parametrize("size", [(1, 1), (61, 37), (40, 41), (3, 200), (200, 3), (333, 1), (28, 28), (1000, 999)])
@pytest.mark.parametrize("mode", ["pad", "crop", "squash"])
def test_every_shape_agrees_with_the_clip_processor(size, mode):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = picture(*size)
    source = pad_to_square(image, color=(122, 116, 104)) if mode == "pad" else image
    target = {"height": SIZE, "width": SIZE} if mode == "squash" else {"shortest_edge": SIZE}
    theirs = CLIPImageProcessorPil(size=target, crop_size={"height": SIZE, "width": SIZE})
    expected = theirs(source, return_tensors="pt")["pixel_values"][0]
    transform = ImageTransform(SIZE, mode=mode)
    torch.testing.assert_close(look_up(transform(image), transform.table), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(90, 31), (31, 90), (2, 91)])
def test_a_square_too_large_to_hold_gives_the_same_bytes(size, monkeypatch):
    transform, image = ImageTransform(SIZE), picture(*size)
    whole = transform.square(image)
    monkeypatch.setattr(preprocess, "_MAX_SQUARE", 1000)
    assert np.array_equal(transform.square(image), whole)


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_a_line_of_pixels_does_not_fill_the_memory(mode):
    pixels = ImageTransform(SIZE, mode=mode)(Image.new("RGB", (1, 9_000), (10, 20, 30)))
    assert pixels.shape == (3, SIZE, SIZE)


def test_wrong_words_are_refused():
    with pytest.raises(UserError, match="image mode 'stretch'"):
        ImageTransform(SIZE, mode="stretch")
    with pytest.raises(UserError, match="interpolation 'cubic'"):
        ImageTransform(SIZE, interpolation="cubic")


def test_augmentation_is_a_function_of_the_seed():
    image, augment = picture(60, 40), RandomCropFlip(SIZE)
    torch.manual_seed(1)
    first = [np.asarray(augment(image, seed=seed)) for seed in range(20)]
    torch.manual_seed(2)
    assert all(np.array_equal(augment(image, seed=seed), first[seed]) for seed in range(20))
    assert len({array.tobytes() for array in first}) == 20
    assert all(array.shape == (SIZE, SIZE, 3) for array in first)


def test_augmentation_keeps_the_share_it_says_and_mirrors_half():
    # the horizontal ramp tells the kept width and the direction
    ramp = Image.fromarray(np.repeat(np.linspace(0, 255, 256, dtype=np.uint8)[None, :, None], 3, 2).repeat(256, 0))
    shares, mirrored = [], 0
    for seed in range(200):
        row = np.asarray(RandomCropFlip(SIZE, scale=(0.3, 0.6))(ramp, seed=seed))[0, :, 0].astype(int)
        shares.append(abs(row[-1] - row[0]) / 255 * SIZE / (SIZE - 1))
        mirrored += row[0] > row[-1]
    # width share is sqrt(area x ratio), ratio within 3/4 .. 4/3
    assert min(shares) > 0.3**0.5 * 0.75**0.5 - 0.02
    assert max(shares) < 0.6**0.5 * (4 / 3) ** 0.5 + 0.02
    assert 70 < mirrored < 130
    whole = RandomCropFlip(SIZE, scale=(1.0, 1.0), flip=False)
    assert np.array_equal(
        whole(picture(2, 400), seed=0),
        picture(2, 400).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(0, 198, 2, 201)),
    )
