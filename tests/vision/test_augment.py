"""What happens to pictures in training: the published operations to the byte, and what a sample forbids."""

import vlm  # noqa: F401

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import golden
from tests.support.systems import RATE, build
from vlm.errors import UserError
from vlm.geometry import bounds, corners
from vlm.sample import ImageFile, parse_sample
from vlm.vision.augment import MOVING, OPERATIONS, RandAugment
from vlm.sample.places import places_named
from vlm.vision.preprocess import RandomCropFlip


def picture(width, height, seed=0):
    noise = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


# RandAugment --------------------------------------------------------------------------------------------------------


def test_every_operation_is_the_published_one():
    tensors = golden("blip_randaugment__a")
    compared = Counter()
    for key, expected in tensors.items():
        kind, picture_number, *rest = key.split("/")
        if kind == "outputs":
            level, name, sign = rest
            found = OPERATIONS[name](tensors[f"inputs/{picture_number}"].numpy(), int(sign) * int(level) / 10)
            assert np.array_equal(found, expected.numpy()), key
            compared[name] += 1
    assert compared.keys() == OPERATIONS.keys()
    assert {name for name, count in compared.items() if count == 6} == MOVING


def test_a_picture_without_black_keeps_its_contrast():
    """Where the published operation whitens it."""
    pixels = np.array([[[10, 0, 7], [110, 255, 7]], [[60, 51, 7], [35, 5, 7]]], dtype=np.uint8)
    stretched = OPERATIONS["AutoContrast"](pixels, 0.5)
    assert stretched[..., 0].tolist() == [[0, 255], [127, 63]]
    assert np.array_equal(stretched[..., 1:], pixels[..., 1:])


def test_it_is_a_function_of_the_seed_and_does_each_operation_as_often_as_said(monkeypatch):
    image, augment = picture(24, 18), RandAugment()
    first = [np.asarray(augment(image, seed=seed)) for seed in range(40)]
    torch.manual_seed(1)
    assert all(np.array_equal(augment(image, seed=seed), first[seed]) for seed in range(40))
    assert len({array.tobytes() for array in first}) > 10
    done = Counter()
    signs = Counter()
    for name in OPERATIONS:

        def count(pixels, strength, name=name):
            done[name] += 1
            signs[strength] += 1
            return pixels

        monkeypatch.setitem(OPERATIONS, name, count)
    for seed in range(4000):
        augment(image, seed=seed)
    assert all(330 < done[name] < 470 for name in OPERATIONS)  # 4000 * 2 / 10 / 2 = 400, standard deviation 19
    assert signs.keys() == {0.5, -0.5}
    assert abs(signs[0.5] - signs[-0.5]) < 5 * 4000**0.5
    done.clear()
    for seed in range(200):
        augment(image, seed=seed, places="regions")
    assert set(done) == OPERATIONS.keys() - MOVING


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 9),
    height=st.integers(1, 9),
    seed=st.integers(0, 50),
    magnitude=st.floats(0, 10),
    num_ops=st.integers(1, 4),
)
def test_any_picture_keeps_its_size(width, height, seed, magnitude, num_ops):
    image = picture(width, height, seed)
    done = RandAugment(num_ops=num_ops, magnitude=magnitude)(image, seed=seed)
    assert (done.mode, done.size) == ("RGB", image.size)


@pytest.mark.parametrize(("options", "line"), [({"num_ops": 0}, "at least 1"), ({"magnitude": 11}, r"in 0\.\.10")])
def test_wrong_numbers_are_refused(options, line):
    with pytest.raises(UserError, match=line):
        RandAugment(**options)


# what a sample forbids ----------------------------------------------------------------------------------------------


def sample(text="A boat.", *, answer="It floats.", content=(), **extra):
    question = [{"type": "image"}, {"type": "text", "text": text}, *content]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return parse_sample({"id": "s", "images": ["s.png"], "messages": messages} | extra)


BOX = {"type": "box", "box": [0.1, 0.2, 0.6, 0.9]}


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (sample(), "unnamed"),
        (sample("Copyright and bright, upright."), "unnamed"),
        (sample("Turn LEFT."), "sides"),
        (sample(answer="On the right-hand side."), "sides"),
        (sample("船在哪里？", answer="在左边。"), "sides"),
        (sample(answer="右"), "sides"),
        (sample(answers=[{"text": "left", "weight": 0.3}]), "sides"),
        (sample(choices=["a", "the leftmost one"]), "sides"),
        (sample(content=[BOX]), "regions"),
        (sample("left", content=[{"type": "point", "point": [0.5, 0.5]}]), "regions"),
    ],
)
def test_what_a_sample_names(made, expected):
    assert places_named(made) == expected


def test_a_picture_whose_sides_are_named_is_not_mirrored():
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 40).astype(np.uint8)[None, :, None], (30, 1, 3)))
    augment = RandomCropFlip(20)
    mirrored = Counter()
    for places in ("unnamed", "sides", "regions"):
        for seed in range(60):
            row = np.asarray(augment(ramp, seed=seed, places=places))[10, :, 0].astype(int)
            mirrored[places] += bool(row[0] > row[-1])
    assert 15 < mirrored["unnamed"] < 45
    assert mirrored["sides"] == mirrored["regions"] == 0
    # the crop is the same: only the mirror is left out
    for seed in range(20):
        plain = np.asarray(augment(ramp, seed=seed, places="sides"))
        free = np.asarray(augment(ramp, seed=seed))
        assert np.array_equal(plain, free) or np.array_equal(plain, free[:, ::-1])


def test_then_changes_the_square():
    image, plain = picture(50, 40), RandomCropFlip(20)
    both = RandomCropFlip(20, then=RandAugment())
    pairs = [(np.asarray(plain(image, seed=seed)), np.asarray(both(image, seed=seed))) for seed in range(40)]
    assert 5 < sum(np.array_equal(*pair) for pair in pairs) < 35  # 0.65 ** 2 of the draws change nothing
    assert all(np.array_equal(both(image, seed=seed), pair[1]) for seed, pair in enumerate(pairs))


def test_a_system_obeys_the_sample(tmp_path):
    picture(60, 44).save(tmp_path / "s.png")
    file = ImageFile("s.png", tmp_path / "s.png")
    augment = RandomCropFlip(28, then=RandAugment())
    codec = build("llava_1_5", {"connector": RATE}, augment=augment).codec
    kinds = {
        "unnamed": sample(images=[file]),
        "sides": sample("What is left?", images=[file]),
        "regions": sample(content=[BOX], images=[file]),
    }
    differ = Counter()
    for seed in range(30):
        seen = {}
        for places, made in kinds.items():
            item = codec.encode(made, seed=seed)
            assert item.places == places
            seen[places] = codec.collate([item], counts={}).views["image"].pixels
        differ.update(
            pair for pair in [("unnamed", "sides"), ("sides", "regions")] if not seen[pair[0]].equal(seen[pair[1]])
        )
        # the box that is written is where the picture shows it
        box = bounds(codec.view(60, 44, seed=seed).placement(corners((0.1, 0.2, 0.6, 0.9))))
        assert box[0] < box[2]
    assert differ[("unnamed", "sides")] > 5
    assert differ[("sides", "regions")] > 5
    still = [codec.collate([codec.encode(made)], counts={}).views["image"].pixels for made in kinds.values()]
    assert all(pixels.equal(still[0]) for pixels in still)  # no seed, no augmentation
