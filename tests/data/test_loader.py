"""From samples to packs: the step is the same however it is split, and a resumed stream is the uninterrupted one."""

import dataclasses
import pickle
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed

from tests.support.fake_codec import ByteCodec, ListSource, answer, sample, samples
from tests.support.ranks import run_ranks
from vlm.batch import IGNORE
from vlm.codec import Sizes, step_counts
from vlm.data import BatchSpec, InstructionData, MultitaskData, PretrainingData
from vlm.data.loading.carried import from_bytes, to_bytes
from vlm.data.loading.encoder import Encoder
from vlm.data.loading.rank_gather import Gather, gather_over_ranks
from vlm.data.loading import step_dataset
from vlm.data.sampling.packs import Packing, Seat, as_filler, balance_packs, check_packs, deal_seats
from vlm.data.sources.base import Concat
from vlm.data.sampling.batches import batch_draws
from vlm.data.loading.shared_memory import from_shared, to_shared
from vlm.errors import SampleError, UserError
from vlm.sample.images import ImageFile
from vlm.seeding import seed_from

CODEC = ByteCodec()
SPLITS = [(1, 1), (2, 1), (1, 2), (4, 2), (8, 1), (2, 8)]


def make(n=50, *, size=16, cls=InstructionData, **options):
    return cls([samples(n)], batch=BatchSpec(size), **options)


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def steps_of(data, world, accumulate, epoch=0):
    """Per step, all packs over all ranks: [step][rank][micro-batch]."""
    streams = [
        epoch_of(data.train_loader(CODEC, world=world, rank=rank, accumulate=accumulate), epoch)
        for rank in range(world)
    ]
    assert len({len(stream) for stream in streams}) == 1
    return [[stream[i : i + accumulate] for stream in streams] for i in range(0, len(streams[0]), accumulate)]


def ids_of(packs):
    return sorted(info.id for pack in packs for info in pack.samples if not info.filler)


def members(dealt, packs):
    return [np.flatnonzero(dealt == pack).tolist() for pack in range(packs)]


def flat(step):
    return [pack for rank in step for pack in rank]


def tensors_of(value, found):
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, dict):
        for key in sorted(value):
            tensors_of(value[key], found)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            tensors_of(getattr(value, field.name), found)
    elif isinstance(value, tuple):
        for item in value:
            tensors_of(item, found)
    else:
        found.append(value)
    return found


def same(a, b):
    left, right = tensors_of(a, []), tensors_of(b, [])
    return len(left) == len(right) and all(
        (x.dtype == y.dtype and torch.equal(x, y)) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(left, right, strict=True)
    )


# dealing ------------------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(0, 500) | st.integers(1, 4), max_size=60),
    packs=st.integers(1, 16),
    room=st.none() | st.integers(0, 3),
)
def test_the_longest_sample_goes_to_the_pack_that_is_the_lightest(lengths, packs, room):
    most = None if room is None else -(-len(lengths) // packs) + room
    dealt = [[] for _ in range(packs)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        free = [pack for pack in dealt if most is None or len(pack) < most]
        min(free, key=lambda pack: (sum(lengths[i] for i in pack), len(pack))).append(index)
    assert members(balance_packs(np.array(lengths, dtype=np.int64), packs, most=most), packs) == list(
        map(sorted, dealt)
    )


@given(lengths=st.lists(st.integers(0, 500), max_size=60), packs=st.integers(1, 16), parts=st.sampled_from([1, 2, 4]))
def test_packs_are_balanced_and_lose_nothing(lengths, packs, parts):
    """Within each part of the step that is dealt for itself."""
    packing = Packing(parts=parts)
    dealt = packing.deal(np.array(lengths, dtype=np.int64), packs * parts)
    for part in range(parts):
        own = packing.share(len(lengths), world=parts, rank=part)
        loads = [sum(lengths[i] for i in own if dealt[i] == pack) for pack in range(part, packs * parts, parts)]
        assert sum(loads) == sum(lengths[i] for i in own)
        assert max(loads) - min(loads) <= max((lengths[i] for i in own), default=0)
        assert len(own) < packs or {*dealt[own]} == {*range(part, packs * parts, parts)}


def test_a_pack_over_the_limit_says_what_to_set():
    def check(lengths, accumulate=1, training=True, **packing):
        check_packs(np.array(lengths), Packing(100, **packing), world=2, accumulate=accumulate, training=training)

    check([50, 50, 50, 50])
    with pytest.raises(
        UserError,
        match=r"2 samples has 101 tokens, over data\.max_tokens=100; set trainer\.accumulate_grad_batches to 2",
    ):
        check([50, 51, 50, 51])
    with pytest.raises(UserError, match=r"accumulate_grad_batches to 4$"):
        check([90] * 8)
    with pytest.raises(UserError, match=r"a single sample has 120 tokens, over data\.max_tokens=100.*raise it"):
        check([120])
    with pytest.raises(UserError, match=r"2 samples has 101 tokens.*lower data\.val_batch_size"):
        check([50, 51], training=False, max_samples=2, in_order=True)


def test_a_filler_trains_nothing_and_counts_nothing():
    items = [CODEC.encode(sample(str(n), n, image=True)) for n in (9, 3, 5)]
    tokens, ranks = Sizes.of(items).tokens, [{"world": 2, "rank": rank, "accumulate": 2} for rank in (0, 1)]
    dealt = [
        seats for rank in ranks for seats in deal_seats([0, 1, 2], tokens, Packing(), training=True, **rank)[0].values()
    ]
    assert sorted(seat for pack in dealt for seat in pack if not seat.filler) == [Seat(0), Seat(1), Seat(2)]
    assert [pack for pack in dealt if pack[0].filler] == [[Seat(1, filler=True)]]  # the shortest costs least
    filler = as_filler(items[1])
    assert (filler.text[0].targets == IGNORE).all()
    assert (items[1].text[0].targets != IGNORE).any()
    assert step_counts([*items, filler]) == step_counts(items)
    pack = CODEC.collate([items[0], as_filler(items[0])], counts={})
    assert len(pack.text.label_positions) == int((items[0].text[0].targets != IGNORE).sum())
    assert pack.real.tolist() == [True, False]


# the step -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), size=st.integers(1, 20), epoch=st.integers(0, 3), split=st.sampled_from(SPLITS))
def test_a_step_is_the_same_on_any_number_of_devices(n, size, epoch, split):
    data = make(n, size=size)
    alone = steps_of(data, 1, 1, epoch)
    shared = steps_of(data, *split, epoch)
    seen = Counter()
    assert len(shared) == len(alone) == -(-n // size)
    for one, many in zip(alone, shared, strict=True):
        packs = flat(many)
        assert ids_of(packs) == ids_of(flat(one))
        assert {pack.packs for pack in packs} == {len(packs)} == {split[0] * split[1]}
        assert all(pack.counts == one[0][0].counts for pack in packs)
        labels = sum(len(pack.text.label_positions) for pack in packs)
        assert labels == len(one[0][0].text.label_positions) == one[0][0].counts["lm"]  # every choice of a sample too
        assert all(pack.samples for pack in packs)
        seen.update(ids_of(packs))
    assert seen == Counter(str(i) for i in range(n))


def test_packs_of_a_step_are_balanced_and_dealt_in_turn():
    data = make(64, size=64)
    (step,) = steps_of(data, 4, 2)
    loads = [len(pack.text.ids) for pack in flat(step)]
    assert max(loads) - min(loads) <= max(pack.text.max_len for pack in flat(step))
    encoder = Encoder(data.samples, CODEC, data.seed)
    draws = data.steps(0, encoder=encoder)[0]
    dealt = members(balance_packs(Sizes.of([encoder(draw, epoch=0) for draw in draws]).tokens, 8), 8)
    for rank in range(4):
        for micro in range(2):  # pack p is micro-batch p // world of rank p % world
            expected = [str(draws[i]) for i in dealt[micro * 4 + rank]]
            assert [info.id for info in step[rank][micro].samples] == expected


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed, epoch):
        return [ids_of([pack]) for pack in epoch_of(make(seed=seed).train_loader(CODEC), epoch)]

    assert order(0, 1) == order(0, 1)
    assert len({str(order(seed, epoch)) for seed in range(2) for epoch in range(3)}) == 6


def test_a_sample_makes_its_choices_anew_in_each_epoch():
    loader = make(20, size=20).train_loader(CODEC)
    first, second = epoch_of(loader, 0)[0], epoch_of(loader, 1)[0]
    assert ids_of([first]) == ids_of([second])
    assert first.counts["lm"] != second.counts["lm"]  # labels are drawn in this codec
    assert same(first, epoch_of(loader, 0)[0])


def test_a_pack_over_the_limit_is_refused_by_every_rank():
    data = make(16, max_tokens=100)
    for rank in range(2):
        with pytest.raises(UserError, match=r"set trainer\.accumulate_grad_batches to \d"):
            next(iter(data.train_loader(CODEC, world=2, rank=rank)))
    assert steps_of(data, 2, 4)


def test_drop_last():
    assert [len(ids_of(flat(step))) for step in steps_of(make(50), 2, 1)] == [16, 16, 16, 2]
    assert [len(ids_of(flat(step))) for step in steps_of(make(50, drop_last=True), 2, 1)] == [16, 16, 16]
    with pytest.raises(UserError, match=r"drop_last leaves no step of the 5 .*lower data\.batch\.size"):
        make(5, drop_last=True).train_loader(CODEC)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=50), size=st.integers(1, 4), room=st.integers(5, 60))
def test_batches_counted_in_rows_and_tokens(lengths, size, room):
    draws = list(range(100, 100 + len(lengths)))
    for spec in (BatchSpec(room, "tokens"), BatchSpec(size, "rows", room)):
        steps = batch_draws(draws, spec, lengths=lengths)
        assert [draw for step in steps for draw in step] == draws
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            rows, used = 1, 0
            for draw in step:
                length = lengths[draw - 100]
                if used and used + length > room:
                    rows, used = rows + 1, 0
                used += length
            assert rows <= (size if spec.unit == "rows" else 1)
            if following is not None:  # a step ends only when the next sample does not fit
                assert used + lengths[following[0] - 100] > room
                assert rows == (size if spec.unit == "rows" else 1)
        assert batch_draws(draws, spec, lengths=lengths, drop_last=True) in (steps, steps[:-1])


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_counted_in_tokens_know_the_lengths(workers):
    data = InstructionData([samples(40)], batch=BatchSpec(150, "tokens"), num_workers=workers)
    steps = [[len(pack.text.ids) for pack in flat(step)] for step in steps_of(data, 1, 1, epoch=1)]
    assert max(map(sum, steps)) <= 150
    assert sum(map(len, steps)) == len(data.steps(1, encoder=Encoder(data.samples, CODEC)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BatchSpec(0), r"data\.batch\.size must be at least 1"),
        (lambda: BatchSpec(1, "bytes"), "samples, rows or tokens"),
        (lambda: BatchSpec(1, "rows"), "row_tokens goes with unit rows"),
        (lambda: BatchSpec(1, "samples", 5), "row_tokens goes with unit rows"),
        (lambda: InstructionData([], batch=BatchSpec(1)).train_loader(CODEC), r"data\.sources is empty"),
        (lambda: InstructionData([ListSource([])], batch=BatchSpec(1)).train_loader(CODEC), "holds? no samples"),
        (lambda: make(val_batch_size=0), "val_batch_size must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


# workers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])  # alone, the packs of a step come one by one
def test_workers_deliver_the_same_and_leave_the_global_generator_alone(world):
    state = torch.get_rng_state()
    data = make(40, num_workers=2)
    with_workers = data.train_loader(CODEC, world=world, rank=world - 1, accumulate=2)
    without = make(40).train_loader(CODEC, world=world, rank=world - 1, accumulate=2)
    for epoch in (0, 1, 3):  # the same workers serve all of them
        assert all(same(a, b) for a, b in zip(epoch_of(with_workers, epoch), epoch_of(without, epoch), strict=True))
    assert torch.equal(state, torch.get_rng_state())


class Counting(ByteCodec):
    """Counts what it encodes."""

    encoded = 0

    def encode(self, sample, *, seed=None, generate=False):
        self.encoded += 1
        return super().encode(sample, seed=seed, generate=generate)


def _shared(data, accumulate):
    """Two epochs of this rank, how much it encoded for them, and the validation of a few samples."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    codec, ranks = Counting(), {"world": world, "rank": rank, "gather": gather_over_ranks()}
    loader = data.train_loader(codec, accumulate=accumulate, **ranks)
    epochs = [epoch_of(loader, epoch) for epoch in (0, 1)]
    encoded = codec.encoded
    validation = list(data.eval_loader(samples(11), codec, **ranks))
    return epochs, encoded, validation


@pytest.mark.parametrize("batch", [{}, {"packs": 4, "negatives": "pack"}], ids=["balanced", "in order"])
def test_ranks_that_tell_each_other_sizes_have_the_same_packs(batch):
    """As a rank that encodes all of the step itself; what one of them has encoded to measure it, none does again."""
    data = InstructionData([samples(40)], batch=BatchSpec(16, **batch))
    every = sum(len(step) for step in data.steps(0, encoder=Encoder(data.samples, CODEC)))
    found = run_ranks(_shared, 2, data, 2)
    fillers = sum(info.filler for epochs, _, _ in found for packs in epochs for pack in packs for info in pack.samples)
    assert sum(encoded for _, encoded, _ in found) <= 2 * every + fillers  # of two epochs
    for rank, (epochs, _, validation) in enumerate(found):
        alone = data.train_loader(CODEC, world=2, rank=rank, accumulate=2)
        for epoch, packs in enumerate(epochs):
            assert all(same(a, b) for a, b in zip(packs, epoch_of(alone, epoch), strict=True))
        judged = data.eval_loader(samples(11), CODEC, world=2, rank=rank)
        assert all(same(a, b) for a, b in zip(validation, judged, strict=True))


def test_shared_memory_is_bounded_by_packs_and_not_by_steps(monkeypatch):
    """Packs of 8 samples travel one by one, whether 2, 8 or 32 of them make a step."""
    sent, share = [], to_shared
    monkeypatch.setattr(step_dataset, "get_worker_info", lambda: True)
    monkeypatch.setattr(step_dataset, "to_shared", lambda made: sent.append((made, share(made))) or sent[-1][1])
    largest = []
    for packs in (2, 8, 32):
        sent.clear()
        assert len(list(make(256, size=8 * packs).train_loader(CODEC, accumulate=packs, gather=Gather.alone()))) == 32
        assert {len(made.packs) for made, _ in sent} == {1}
        largest.append(max(parcel.data.nbytes for _, parcel in sent))
    assert max(largest) == largest[0]  # 0.89 and 0.88 of it: packs of a larger step are better balanced


def _error_of(data):
    world, rank = distributed.get_world_size(), distributed.get_rank()
    with pytest.raises(UserError) as raised:
        list(data.train_loader(CODEC, world=world, rank=rank, gather=gather_over_ranks()))
    return str(raised.value)


@pytest.mark.parametrize("what", ["limit", "sample"])
def test_every_rank_raises_what_one_of_them_found(what):
    listed = samples(16)
    if what == "sample":
        listed.samples[5] = sample("unusable5", 9)
    data = InstructionData([listed], batch=BatchSpec(16), max_tokens=100 if what == "limit" else None)
    errors = run_ranks(_error_of, 2, data)
    assert len(set(errors)) == 1
    assert ("accumulate_grad_batches" if what == "limit" else "unusable5") in errors[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_arrives_as_its_own_error(workers):
    source = ListSource([sample("fine", 3), sample("unusable", 3)])
    loader = InstructionData([source], batch=BatchSpec(2), num_workers=workers).train_loader(CODEC)
    with pytest.raises(SampleError) as caught:
        list(loader)
    assert str(caught.value) == "<memory>: sample 'unusable': cannot be used"
    assert caught.value.sample_id == "unusable"


def test_a_mistake_in_the_code_names_the_sample():
    loader = InstructionData([ListSource([sample("bug", 3)])], batch=BatchSpec(2)).train_loader(CODEC)
    with pytest.raises(KeyError) as caught:
        list(loader)
    assert caught.value.__notes__ == ["while encoding sample 'bug' of <memory>"]


def test_a_step_travels_in_one_piece():
    packs = epoch_of(make(30, size=30).train_loader(CODEC, accumulate=8), 0)
    parcel = to_shared(
        [*packs, torch.zeros(0, dtype=torch.bfloat16), torch.tensor([True]), torch.arange(6).view(2, 3).T]
    )
    back = from_shared(pickle.loads(pickle.dumps(parcel)))
    assert all(same(a, b) for a, b in zip(back[:-3], packs, strict=True))
    assert (back[-3].dtype, back[-3].shape) == (torch.bfloat16, (0,))
    assert back[-2].tolist() == [True]
    assert back[-1].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert len({tensor.untyped_storage().data_ptr() for tensor in back[-3:] if tensor.numel()}) == 1


def test_what_is_encoded_is_carried_unless_its_images_are_heavy():
    item = CODEC.encode(sample("7", 9, image=True), seed=3)
    carried = to_bytes(item)
    assert carried is not None
    assert len(carried) < 4096
    assert same(from_bytes(carried), item)
    for size, fits in ((1 << 17, True), ((1 << 17) + 1, False)):
        image = ImageFile("picture", data=bytes(size))
        heavy = dataclasses.replace(item, sample=dataclasses.replace(item.sample, images=(image,)))
        assert (to_bytes(heavy) is not None) == fits


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_many_packs_do_not_use_up_the_file_descriptors():
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))  # one descriptor a tensor would need some thousands
    try:
        loader = make(512, size=256, num_workers=2).train_loader(CODEC, accumulate=32)
        assert len(epoch_of(loader, 0)) == 64
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# resume -------------------------------------------------------------------------------------------------------------


def stream(loader, epochs):
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        for pack in loader:
            yield epoch, pack


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_every_position_is_the_uninterrupted_stream(workers):
    def fresh():
        return make(22, size=8, num_workers=workers).train_loader(CODEC, world=2, rank=1, accumulate=2)

    whole = list(stream(fresh(), range(3)))
    per_epoch = len(whole) // 3
    assert per_epoch == 6 == len(fresh())
    positions = range(len(whole) + 1) if workers == 0 else (3, 6, 8)
    for position in positions:
        loader, resumed = fresh(), fresh()
        running = stream(loader, range(3))
        for _ in range(position):
            next(running)
        state = pickle.loads(pickle.dumps(loader.state_dict()))
        resumed.load_state_dict(state)
        assert resumed.state_dict()["steps_seen"] == state["steps_seen"]
        assert len(resumed) == per_epoch
        # Lightning goes on with the epoch of the checkpoint, or with the next one if that is complete
        rest = list(stream(resumed, range(state["epoch"], 3)))
        expected = whole[position // 2 * 2 :]  # a half-computed step starts again
        assert [epoch for epoch, _ in rest] == [epoch for epoch, _ in expected]
        assert all(same(a, b) for (_, a), (_, b) in zip(rest, expected, strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_resume_on_other_devices_continues_with_the_right_step(split):
    data = make(40, size=8)
    loader = data.train_loader(CODEC, world=2, rank=0, accumulate=2)
    running = stream(loader, [0, 1])
    for _ in range(10 + 4):  # all of epoch 0, two steps of epoch 1
        next(running)
    state = loader.state_dict()
    assert (state["epoch"], state["steps_seen"], state["mid_step"]) == (1, 2, False)
    world, accumulate = split
    expected = [ids_of(flat(step)) for step in steps_of(data, 1, 1, epoch=1)][2:]
    streams = []
    for rank in range(world):
        resumed = data.train_loader(CODEC, world=world, rank=rank, accumulate=accumulate)
        resumed.load_state_dict(state)
        streams.append(epoch_of(resumed, 1))
    found = [
        ids_of([pack for packs in streams for pack in packs[i : i + accumulate]])
        for i in range(0, len(streams[0]), accumulate)
    ]
    assert found == expected


def test_ranks_save_the_same_state():
    data = make(40, size=8)
    states = []
    for rank in range(2):
        loader = data.train_loader(CODEC, world=2, rank=rank)
        next(iter(loader))
        states.append(loader.state_dict())
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: make(40, size=16), r"data\.batch = .*'size': 8.*'size': 16"),
        (lambda: make(40, size=8, seed=1), r"data\.seed = 0, this run has 1"),
        (lambda: make(41, size=8), "number of training samples = 40, this run has 41"),
        (lambda: make(40, size=8, group_by_modality=True), "group_by_modality = False, this run has True"),
    ],
)
def test_a_checkpoint_of_other_steps_is_refused(other, message):
    state = make(40, size=8).train_loader(CODEC).state_dict()
    with pytest.raises(UserError, match=message):
        other().train_loader(CODEC).load_state_dict(state)


def test_seeds_do_not_collide_and_are_the_same_everywhere():
    assert seed_from(1, 2) == 6288156900839449082
    assert len({seed_from(a, b) for a in range(100) for b in range(100)}) == 10_000
    assert 0 <= seed_from(-1, 2**80) < 2**63


# validation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_shows_every_sample_once(world):
    data = make(4, val_sources=[samples(17)], val_batch_size=4)
    loaders = [data.eval_loader(Concat(data.val_sources), CODEC, world=world, rank=rank) for rank in range(world)]
    streams = [list(loader) for loader in loaders]
    assert {len(s) for s in streams} == {len(loaders[0])} == {-(-17 // (4 * world))}
    assert ids_of([pack for s in streams for pack in s]) == sorted(str(i) for i in range(17))
    assert sum(packs[0].counts["samples"] for packs in zip(*streams, strict=True)) == 17
    for loader, first in zip(loaders, streams, strict=True):
        loader.sampler.set_epoch(5)  # Lightning does; nothing changes
        assert all(same(a, b) for a, b in zip(loader, first, strict=True))


# one behaviour of each kind of data ---------------------------------------------------------------------------------


def test_pretraining_draws_one_caption_per_epoch():
    captions = [{"text": "red boat", "weight": 3.0}, {"text": "blue sea", "weight": 1.0}, {"text": "no", "weight": 0}]
    source = ListSource([sample(str(i), 1, answers=captions) for i in range(400)] + [sample("plain", 1)])
    data = PretrainingData([source], batch=BatchSpec(8))
    encoder = Encoder(data.samples, CODEC, 0, data.preparation())

    def drawn(epoch):
        return [answer(encoder(i, epoch=epoch).sample.messages[-1]) for i in range(401)]

    first = drawn(0)
    assert first == drawn(0) != drawn(1)
    assert first[400] == "ab"
    counts = Counter(first[:400])
    assert set(counts) == {"red boat", "blue sea"}
    assert 260 < counts["red boat"] < 340  # 300 expected, standard deviation 9
    assert len(encoder(0, epoch=0).sample.messages) == 2
    for other in (MultitaskData, InstructionData):
        assert other([source], batch=BatchSpec(8)).preparation() is None


def test_instructions_are_grouped_by_modality():
    data = make(50, size=8, group_by_modality=True)
    steps = [[info.id for pack in flat(step) for info in pack.samples] for step in steps_of(data, 1, 1)]
    kinds = [{int(name) % 3 > 0 for name in step} for step in steps]
    assert all(len(kind) == 1 for kind in kinds[:-1])
    assert {True, False} == set.union(*kinds)
    assert Counter(name for step in steps for name in step) == Counter(str(i) for i in range(50))
    with pytest.raises(UserError, match="needs a batch counted in samples"):
        InstructionData([samples(4)], batch=BatchSpec(8, "tokens"), group_by_modality=True)
    for other in (PretrainingData, MultitaskData):
        with pytest.raises(TypeError, match="group_by_modality"):
            other([samples(4)], batch=BatchSpec(8), group_by_modality=True)


@pytest.mark.parametrize("given", [{}, {"batch": BatchSpec(2)}])
def test_training_needs_files_and_a_batch(given: dict) -> None:
    data = InstructionData(**given)  # enough to evaluate with
    data.trainer = object()  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"data\.sources and data\.batch: training needs both"):
        data.setup("fit")
