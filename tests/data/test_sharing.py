"""Who decides how a step is shared by devices and micro-batches: one setting, and what contradicts it is refused."""

import vlm  # noqa: F401

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_loader import epoch_of, flat, steps_of
from tests.data.test_loader_resume import Model, SaveAt, fit
from tests.support.fake_codec import ByteCodec, ListSource, sample, samples
from vlm.data import BatchSpec, InstructionData, Mixture, MultitaskData, PretrainingData
from vlm.data.sampling.packs import Packing
from vlm.data.sampling.sharing import check_negatives, micro_batches
from vlm.errors import UserError

CODEC = ByteCodec()


def make(n=50, *, size=16, cls=InstructionData, negatives=None, packs=None, **options):
    return cls([samples(n)], batch=BatchSpec(size, negatives=negatives, packs=packs), **options)


def share(batch, *, world=1, given=1, micro_batch_size=None, max_tokens=None, steps=()):
    limits = {"micro_batch_size": micro_batch_size, "max_tokens": max_tokens}
    return micro_batches(batch, world=world, given=given, lengths=lambda: [np.array(step) for step in steps], **limits)


# what follows from each word ----------------------------------------------------------------------------------------


def test_without_a_word_the_trainer_decides():
    assert [share(BatchSpec(16), world=2, given=given) for given in (1, 3)] == [1, 3]


def test_a_micro_batch_holds_so_many_samples():
    assert [share(BatchSpec(128), world=world, micro_batch_size=16) for world in (1, 2, 6, 8, 64)] == [8, 4, 2, 1, 1]
    data = make(50, micro_batch_size=3)
    for world in (1, 2, 4):
        accumulate = data.micro_batches(CODEC, world=world)
        packs = [pack for step in steps_of(data, world, accumulate) for pack in flat(step)]
        assert accumulate == -(-16 // (3 * world))
        assert max(len(pack.samples) for pack in packs) == 3
    with pytest.raises(UserError, match=r"micro_batch_size=3: 4 packs hold no step of 16 samples"):
        data.train_loader(CODEC, world=4)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=5),
    limit=st.integers(40, 120),
    world=st.integers(1, 4),
)
def test_max_tokens_takes_the_fewest_micro_batches_into_which_all_steps_fit(steps, limit, world):
    found = share(BatchSpec(12), world=world, max_tokens=limit, steps=steps)
    fits = [
        all(Packing(limit).fits(np.array(step), world * number) for step in steps) for number in range(1, found + 1)
    ]
    assert fits == [False] * (found - 1) + [True]


def test_max_tokens_looks_at_every_epoch():
    data = make(60, size=6, max_tokens=70, seed=2)
    for world in (1, 2):
        one, many = (data.micro_batches(CODEC, world=world, max_epochs=epochs) for epochs in (1, 12))
        assert one <= many
        for epoch in range(12):
            for rank in range(world):
                loader = data.train_loader(CODEC, world=world, rank=rank, accumulate=many)
                assert max(len(pack.text.ids) for pack in epoch_of(loader, epoch)) <= 70
    assert data.micro_batches(CODEC, max_epochs=1) < data.micro_batches(
        CODEC, max_epochs=12
    )  # the longest is a later one
    assert data.micro_batches(CODEC, max_epochs=None, max_steps=120) == data.micro_batches(CODEC, max_epochs=12)
    assert data.micro_batches(CODEC, given=9) == 9  # the trainer's number spares the reading of all lengths
    with pytest.raises(UserError, match=r"a single sample has \d+ tokens, over data\.max_tokens=20"):
        make(60, size=6, max_tokens=20).micro_batches(CODEC)


def test_steps_of_their_own_size_are_shared_by_the_largest():
    mixture = Mixture(weights={"a": 1, "b": 1}, epoch_size=60)
    sources = [samples(40, prefix="a"), samples(20, prefix="b")]
    options = {"batch": BatchSpec(4), "mixture": mixture, "pure": "step", "sizes": {"b": 12}}
    data = MultitaskData(sources, micro_batch_size=3, **options)
    assert data.micro_batches(CODEC, world=2) == 2
    assert max(len(pack.samples) for step in steps_of(data, 2, 2) for pack in flat(step)) == 3


def test_packs_are_those_of_the_published_run():
    batch = BatchSpec(48, negatives="pack", packs=16)
    assert [share(batch, world=world) for world in (1, 2, 8, 16)] == [16, 8, 2, 1]
    with pytest.raises(UserError, match=r"packs=16 cannot be shared alike by 6 devices; use 1, 2, 4, 8, 16$"):
        share(batch, world=6)
    data = make(50, size=12, negatives="pack", packs=4)
    drawn = [[info.id for info in pack.samples] for step in steps_of(data, 1, 4) for pack in flat(step)]
    order = [str(draw) for draw in data.draws(0)]
    assert drawn == [order[i : i + 3] for i in range(0, 48, 3)]  # as they come; the last two of 50 are left out
    for world in (2, 4):
        again = steps_of(data, world, 4 // world)
        packs = [
            [info.id for info in step[r][m].samples] for step in again for m in range(4 // world) for r in range(world)
        ]
        assert packs == drawn
        assert [step[r][m].pack for step in again for m in range(4 // world) for r in range(world)] == [0, 1, 2, 3] * 4
        assert len({pack.seed for pack in flat(again[0])}) == 1
    with pytest.raises(UserError, match=r"data\.batch wants 4 packs, devices times micro-batches make up 2"):
        data.train_loader(CODEC, world=2)


def test_comparing_a_whole_step_needs_all_of_it_on_the_devices():
    batch = BatchSpec(1680, negatives="step")
    assert [share(batch, world=world) for world in (1, 16, 20)] == [1, 1, 1]
    with pytest.raises(UserError, match=r"1680 samples on each device, which 32 devices cannot have; use 30 or 35$"):
        share(batch, world=32)
    for options, smallest in (
        ({"given": 2}, 16),
        ({"micro_batch_size": 100}, 20),
        ({"micro_batch_size": 105}, 16),
        ({"max_tokens": 1000, "steps": [[10] * 1680]}, 20),
    ):
        with pytest.raises(UserError, match=rf"without accumulation; use {smallest} devices, found 8$"):
            share(batch, world=8, **options)
    with pytest.raises(UserError, match=r"use 8 devices, found 4, or remove data\.batch\.packs$"):
        share(BatchSpec(256, negatives="step", packs=8), world=4)
    with pytest.raises(UserError, match="less than the longest training sample has"):
        share(BatchSpec(4, negatives="step"), max_tokens=5, steps=[[1, 2, 9, 1]])


# what contradicts it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (lambda: make(micro_batch_size=2, max_tokens=9), r"^data\.micro_batch_size and data\.max_tokens both decide"),
        (
            lambda: make(negatives="pack", packs=4, max_tokens=9),
            r"^data\.batch\.packs and data\.max_tokens both decide",
        ),
        (lambda: make(micro_batch_size=0), r"data\.micro_batch_size must be at least 1, found 0"),
        (lambda: make(max_tokens=0), r"data\.max_tokens must be at least 1, found 0"),
        (
            lambda: InstructionData([samples(4)], batch=BatchSpec(90, "tokens"), micro_batch_size=2),
            r"micro_batch_size needs a batch counted in samples, found unit 'tokens'",
        ),
        (lambda: BatchSpec(8, negatives="all"), r"negatives must be pack or step, found 'all'"),
        (lambda: BatchSpec(8, negatives="pack"), r"negatives: pack needs data\.batch\.packs"),
        (lambda: BatchSpec(8, packs=2), r"packs goes with data\.batch\.negatives"),
        (lambda: BatchSpec(8, negatives="pack", packs=3), r"packs=3 must divide data\.batch\.size=8"),
        (lambda: BatchSpec(8, "tokens", negatives="step"), r"negatives needs a batch counted in samples"),
        (lambda: share(BatchSpec(8, negatives="pack", packs=4), given=3), r"=3 contradicts data\.batch\.packs=4"),
        (
            lambda: share(BatchSpec(128), world=2, given=3, micro_batch_size=16),
            r"=3 contradicts data\.micro_batch_size=16, which makes it 4 on 2 devices; remove one of them$",
        ),
        (
            lambda: make(3, negatives="step").train_loader(CODEC),
            r"^data\.batch\.negatives leaves no step of the 3 training samples",
        ),
        (lambda: check_negatives(BatchSpec(8), ("itc",), system="BLIP"), r"^BLIP compares the samples .*\(itc\)"),
        (
            lambda: check_negatives(BatchSpec(8, negatives="step"), (), system="LLaVA"),
            r"negatives: step, but LLaVA compares no samples; remove it",
        ),
    ],
)
def test_what_contradicts_is_refused(build, line):
    with pytest.raises(UserError, match=line) as caught:
        build()
    assert "\n" not in str(caught.value)


# in a run -----------------------------------------------------------------------------------------------------------


def data_with(**options):
    return lambda: InstructionData([samples(22)], batch=BatchSpec(8), val_sources=[samples(3)], **options)


@pytest.mark.parametrize(("options", "accumulate"), [({"micro_batch_size": 3}, 3), ({"max_tokens": 75}, 4)])
def test_a_run_accumulates_as_its_data_says_and_resumes_with_another_split(tmp_path, options, accumulate):
    whole = fit(tmp_path, accumulate_grad_batches=1).log_of_steps
    path = tmp_path / "x.ckpt"
    run = fit(
        tmp_path,
        data=data_with(**options),
        accumulate_grad_batches=1,
        callbacks=[SaveAt(path, "batch_end", (1, 2 * accumulate - 1))],
    )
    assert run.trainer.accumulate_grad_batches == accumulate
    assert [step[:2] for step in run.log_of_steps] == [step[:2] for step in whole]
    assert [step[2] for step in run.log_of_steps] == pytest.approx([step[2] for step in whole], abs=1e-6)
    resumed = fit(tmp_path, data=data_with(micro_batch_size=4), accumulate_grad_batches=1, resume=path)
    assert resumed.trainer.accumulate_grad_batches == 2
    done = torch.load(path, weights_only=False)["global_step"]
    assert done == 5
    assert [step[:2] for step in resumed.log_of_steps] == [step[:2] for step in whole[done:]]
    with pytest.raises(UserError, match=r"trainer\.accumulate_grad_batches=5 contradicts data\.micro_batch_size=4"):
        fit(tmp_path, data=data_with(micro_batch_size=4), accumulate_grad_batches=5)


class Comparing(Model):
    in_batch_terms = ("itc",)


def test_a_resume_keeps_the_packs_of_an_in_batch_objective(tmp_path):
    def pairs(**batch):
        return lambda: PretrainingData([samples(22)], batch=BatchSpec(8, negatives="pack", **batch))

    path = tmp_path / "x.ckpt"
    options = {"accumulate_grad_batches": 1, "max_epochs": 2}
    save = SaveAt(path, "batch_end", (1, 3))
    run = fit(tmp_path, model=Comparing(), data=pairs(packs=4), callbacks=[save], **options)
    assert run.trainer.accumulate_grad_batches == 4
    assert len(run.log_of_steps) == 4  # two whole steps of 22 samples in each epoch
    resumed = fit(tmp_path, model=Comparing(), data=pairs(packs=4), resume=path, **options)
    assert resumed.log_of_steps == run.log_of_steps[3:]
    with pytest.raises(UserError, match=r"written with data\.batch = .*'packs': 4.*this run has .*'packs': 2"):
        fit(tmp_path, model=Comparing(), data=pairs(packs=2), resume=path, **options)
    with pytest.raises(
        UserError, match=r"Comparing compares the samples of a batch \(itc\); set data\.batch\.negatives"
    ):
        fit(tmp_path, model=Comparing(), **options)


def test_packs_of_a_validation_are_the_same_on_any_devices():
    source = ListSource([sample(str(i), 40 - i, image=True) for i in range(11)])

    def seen(world):
        loaders = [make(val_batch_size=4).eval_loader(source, CODEC, world=world, rank=rank) for rank in range(world)]
        together = [pack for packs in zip(*map(list, loaders), strict=True) for pack in packs]
        assert {(pack.negatives, pack.seed) for pack in together} == {("pack", None)}
        return [ids for pack in together if (ids := [info.id for info in pack.samples if not info.filler])]

    assert seen(1) == seen(2) == seen(4) == [[str(i) for i in range(at, min(at + 4, 11))] for at in (0, 4, 8)]
