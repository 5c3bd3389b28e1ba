"""Sample order against the published samplers, and what holds for any data."""

import vlm  # noqa: F401

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.sampling.order import length_grouped, modality_grouped_steps, modality_length_grouped, shuffled

ROWS = json.loads((Path(__file__).parents[1] / "golden/llava_sampler__a/rows.json").read_text())


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_golden_orders(row):
    inner = generator(row["global_seed"])
    outer = inner if row["generator_seed"] is None else generator(row["generator_seed"])
    sizes = {"batch_size": row["batch_size"], "world_size": row["world_size"]}
    if row["group_by_modality"]:
        order = modality_length_grouped(row["lengths"], **sizes, generator=inner, outer=outer)
    else:
        order = length_grouped(row["lengths"], **sizes, generator=outer)
    assert order == row["indices"]


def test_a_length_without_modality_is_refused():
    with pytest.raises(ValueError, match="sample 1 has length 0"):
        modality_length_grouped([3, 0, -1], batch_size=1, world_size=1, generator=generator(0))


def test_shuffled_depends_on_seed_and_epoch():
    assert sorted(shuffled(50, seed=0, epoch=0)) == list(range(50))
    orders = {tuple(shuffled(50, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    torch.manual_seed(3)
    assert tuple(shuffled(50, seed=0, epoch=0)) in orders


@settings(max_examples=100, deadline=None)
@given(has_image=st.lists(st.booleans(), max_size=60), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_steps_hold_one_modality_but_the_last(has_image, size, seed):
    steps = modality_grouped_steps(has_image, size=size, seed=seed, epoch=1)
    assert sorted(index for step in steps for index in step) == list(range(len(has_image)))
    assert all(len(step) == size for step in steps[:-1])
    pure = len(has_image) and sum(has_image) // size + (len(has_image) - sum(has_image)) // size
    assert all(len({has_image[index] for index in step}) == 1 for step in steps[:pure])
    assert len(steps) - pure <= 2
    assert steps == modality_grouped_steps(has_image, size=size, seed=seed, epoch=1)


def test_steps_of_both_modalities_are_interleaved():
    has_image = [True] * 400 + [False] * 400
    steps = modality_grouped_steps(has_image, size=8, seed=0, epoch=0)
    kinds = [has_image[step[0]] for step in steps]
    assert 30 < sum(a != b for a, b in itertools.pairwise(kinds)) < 70
    assert steps != modality_grouped_steps(has_image, size=8, seed=0, epoch=1)
