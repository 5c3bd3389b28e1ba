"""How the sources of an epoch are mixed: shares, purity, no repetition too early, and the same on any devices."""

import vlm  # noqa: F401

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import golden_json
from tests.support.fake_codec import ByteCodec, ListSource, answer, sample, samples
from tests.data.test_loader import SPLITS, epoch_of, flat, same, steps_of
from vlm.data import BatchSpec, InstructionData, Mixture, MultitaskData, PretrainingData, WithResolution
from vlm.data.loading.encoder import Encoder
from vlm.data.sampling.turns import apportion, rank_orders, interleave_evenly, shuffled_walk
from vlm.errors import UserError

CODEC = ByteCodec()
SIZES = {"a": 40, "b": 10, "c": 13}


def sources(sizes=SIZES):
    return [samples(size, prefix=name) for name, size in sizes.items()]


def of_one_modality(sizes=SIZES):
    """`c` is text alone, the others have pictures."""
    return [
        ListSource([sample(f"{name}{i}", 1 + 7 * i % 30, image=name != "c") for i in range(size)], name)
        for name, size in sizes.items()
    ]


def open_questions():
    """Pictures nobody has asked about yet."""
    message = {"role": "user", "content": [{"type": "image"}]}
    return [
        ListSource([sample(f"a{i}", i % 9, image=True, messages=[message, _said(i)]) for i in range(40)], "a"),
        ListSource([sample(f"b{i}", 3, image=True, messages=[message, _said(i)]) for i in range(23)], "b"),
    ]


def _said(i):
    return {"role": "assistant", "content": "b" * (1 + i % 9)}


def make(*, size=8, unit="samples", row_tokens=None, cls=MultitaskData, of=sources, **options):
    return cls(of(), batch=BatchSpec(size, unit, row_tokens), **options)


def steps(data, epoch=0):
    return [[data.samples[draw % len(data.samples)] for draw in step] for step in plan(data, epoch)]


def plan(data, epoch=0):
    encoder = Encoder(data.samples, CODEC, data.seed, data.preparation())
    return data.steps(epoch, encoder=encoder)


def names(step):
    return {sample.id[0] for sample in step}


def counts(found):
    return Counter(sample.id[0] for step in found for sample in step)


MODES = {
    "by chance": {"mixture": Mixture(weights={"a": 1, "b": 3, "c": 0})},
    "sqrt": {"mixture": Mixture(weights="sqrt_size", factors={"b": 2.5}, epoch_size=50)},
    "numbers": {"mixture": Mixture(epoch_samples={"a": 7, "b": 25, "c": 13})},
    "repeats": {"mixture": Mixture(repeats={"a": 0.3, "b": 2.5, "c": 1})},
    "spread": {"mixture": Mixture(weights="sqrt_size", order="spread")},
    "spread numbers": {"mixture": Mixture(epoch_samples={"a": 7, "b": 25, "c": 13}, order="spread")},
    "pure steps": {"mixture": Mixture(weights="sqrt_size"), "pure": "step"},
    "pure numbers": {"mixture": Mixture(repeats={"a": 1, "b": 2, "c": 1}), "pure": "step", "drop_last": True},
    "pure tasks": {"mixture": Mixture(), "pure": "step", "tasks": {"a": "vqa", "c": "vqa"}},
    "pure tokens": {"pure": "step", "size": 300, "unit": "tokens"},
    "pure packs": {"pure": "pack", "size": 3, "unit": "rows", "row_tokens": 90, "tasks": {"a": "vqa", "c": "vqa"}},
    "pure packs spread": {
        "pure": "pack",
        "size": 3,
        "unit": "rows",
        "row_tokens": 90,
        "mixture": Mixture(order="spread"),
    },
    "pure sizes": {"mixture": Mixture(weights="sqrt_size"), "pure": "step", "sizes": {"b": 3}},
    "pure sizes of tasks": {"pure": "step", "tasks": {"a": "vqa", "c": "vqa"}, "sizes": {"vqa": 5, "b": 2}},
    "alternate": {
        "cls": InstructionData,
        "of": of_one_modality,
        "mixture": Mixture(weights="sqrt_size"),
        "alternate": 3,
    },
    "instructions": {"cls": InstructionData, "of": open_questions, "instructions": ["What is it?", "Tell me.", "Say"]},
    "LLaVA's order": {"cls": InstructionData, "group_by_modality": True, "ranks": 4},
    "text share": {"cls": InstructionData, "text_share": 0.6},
    "grouped text share": {"cls": InstructionData, "text_share": 0.6, "group_by_modality": True},
    "grouped mixture": {"cls": InstructionData, "mixture": Mixture(weights="sqrt_size"), "group_by_modality": True},
    "pretraining": {"cls": PretrainingData, "mixture": Mixture(weights={"a": 115, "b": 14, "c": 0})},
}


# every mode ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_the_same_on_any_number_of_devices(mode):
    def step_sets(split):
        return [
            sorted((info.id, pack.counts["lm"]) for pack in flat(step) for info in pack.samples if not info.filler)
            for step in steps_of(make(**MODES[mode]), *split, epoch=1)
        ]

    alone = step_sets((1, 1))
    assert len(alone) > 2
    for split in SPLITS[1:4]:
        assert step_sets(split) == alone


@pytest.mark.parametrize("mode", MODES)
def test_a_run_resumes_in_the_middle_with_the_same_tensors(mode):
    whole = epoch_of(make(**MODES[mode]).train_loader(CODEC, accumulate=2), 1)
    first = make(**MODES[mode]).train_loader(CODEC, accumulate=2)
    first.sampler.set_epoch(1)
    stream = iter(first)
    seen = [next(stream) for _ in range(4)]
    second = make(**MODES[mode]).train_loader(CODEC, accumulate=2)
    second.load_state_dict(first.state_dict())
    seen += list(second)
    assert len(seen) == len(whole)
    assert all(same(a, b) for a, b in zip(seen, whole, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_another_mixture_cannot_resume(mode):
    loader = make(**MODES[mode]).train_loader(CODEC)
    state = loader.state_dict()
    changed = MODES[mode] | {"seed": 1}
    with pytest.raises(UserError, match="the checkpoint was written with"):
        make(**changed).train_loader(CODEC).load_state_dict(state)
    if "mixture" in MODES[mode]:
        without = {key: value for key, value in MODES[mode].items() if key != "mixture"}
        with pytest.raises(UserError, match=r"written with data\.mixture"):
            make(**without).train_loader(CODEC).load_state_dict(state)


@pytest.mark.parametrize("mode", MODES)
def test_no_sample_comes_again_before_all_others_of_its_source_over_epochs(mode):
    data = make(**(MODES[mode] | {"drop_last": False}))
    group = (lambda s: bool(s.images)) if "text_share" in MODES[mode] else (lambda s: s.id[0])
    times: dict = {}
    for epoch in range(4):
        planned = plan(data, epoch)
        draws = [draw for step in planned for draw in step]
        assert len(set(draws)) == len(draws)  # each repetition makes choices of its own
        for draw in draws:
            found = data.samples[draw % len(data.samples)]
            times.setdefault(group(found), Counter())[found.id] += 1
    if "mixture" not in MODES[mode] and "text_share" not in MODES[mode]:
        assert all(set(count.values()) == {4} for count in times.values())
    for key, count in times.items():
        size = sum(1 for i in range(len(data.samples)) if group(data.samples[i]) == key)
        values = [*count.values(), *[0] * (size - len(count))]
        assert max(values) - min(values) <= 1


# shares -------------------------------------------------------------------------------------------------------------


def test_shares_by_rule_and_factor():
    four = [samples(n, prefix=name) for name, n in {"a": 40, "b": 10, "c": 10}.items()]
    sizes = {source.name: len(source) for source in four}
    assert Mixture(weights="sqrt_size").shares(sizes) == pytest.approx([0.5, 0.25, 0.25])
    assert Mixture(weights="sqrt_size", factors={"c": 2}).shares(sizes) == pytest.approx([0.4, 0.2, 0.4])
    assert Mixture().shares(sizes) == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    # InstructBLIP's published ratio of two sets (CC12M to COCO) is the root of their sizes
    shares = Mixture(weights="sqrt_size").shares({"cc": 6_029_862, "coco": 566_747})
    assert shares[0] / shares[1] == pytest.approx(0.1944 / 0.0596, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10), min_size=3, max_size=3), seed=st.integers(0, 99), pure=st.booleans())
def test_chance_keeps_the_shares(weights, seed, pure):
    mixture = Mixture(weights=dict(zip("abc", weights, strict=True)), epoch_size=4000)
    data = make(mixture=mixture, seed=seed, pure="step" if pure else None, size=2)
    which = np.searchsorted([40, 50], np.asarray(data.draws(0)) % 63, side="right")
    draws = 2000 if pure else 4000
    for share, found in zip(mixture.shares(SIZES), np.bincount(which, minlength=3) / 4000, strict=True):
        assert abs(found - share) < 5.5 * (share * (1 - share) / draws) ** 0.5


def test_exact_numbers():
    assert counts(steps(make(**MODES["numbers"]), 3)) == {"a": 7, "b": 25, "c": 13}
    assert counts(steps(make(**MODES["repeats"]), 1)) == {"a": 12, "b": 25, "c": 13}
    assert counts(steps(make(mixture=Mixture(epoch_samples={"a": 5, "b": 0, "c": 0})))) == {"a": 5}
    roots = {"a": 40**0.5, "b": 10**0.5, "c": 13**0.5}
    found = counts(steps(make(**MODES["spread"])))
    assert sum(found.values()) == 63
    assert all(abs(found[name] - 63 * root / sum(roots.values())) < 1 for name, root in roots.items())


@given(parts=st.lists(st.floats(0, 5), min_size=1, max_size=6).filter(lambda p: sum(p) > 0.1), total=st.integers(0, 99))
def test_apportioned_numbers_are_the_shares_rounded(parts, total):
    shares = [part / sum(parts) for part in parts]
    found = apportion(shares, total)
    assert sum(found) == total
    assert all(abs(count - share * total) < 1 + 1e-9 for count, share in zip(found, shares, strict=True))


@given(size=st.integers(1, 9), start=st.integers(0, 40), count=st.integers(0, 40), seed=st.integers(0, 9))
def test_a_walk_is_a_window_of_one_endless_walk(size, start, count, seed):
    whole, rounds = shuffled_walk(size, start=0, count=start + count, seed=seed)
    part, visits = shuffled_walk(size, start=start, count=count, seed=seed)
    assert part.tolist() == whole[start:].tolist()
    assert visits.tolist() == (rounds[start:] - start // size).tolist()
    for first in range(0, start + count - size + 1, size):
        assert sorted(whole[first : first + size]) == list(range(size))


# VILA's order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", golden_json("vila_sampler__a", "rows.json"), ids=lambda row: f"epoch{row['epoch']}")
def test_sources_are_spread_as_in_vila(row):
    """The published sampler, each rank with its own part of every source, and a run here that takes the same steps."""
    sizes, ranks, rank_batch = row["sample_len_list"], row["num_replicas"], row["batch_size"]
    orders = rank_orders(sizes, rank_batch=rank_batch, ranks=ranks, seed=row["seed"], epoch=row["epoch"])
    assert orders == row["indices"]
    parts = [samples(size, prefix=name) for name, size in zip("abc", sizes, strict=True)]
    batch = BatchSpec(rank_batch * ranks)
    data = PretrainingData(parts, batch=batch, mixture=Mixture(order="ranks", ranks=ranks), seed=row["seed"])
    for at, step in enumerate(plan(data, row["epoch"])):
        own = slice(at * rank_batch, (at + 1) * rank_batch)
        assert step == [index for order in row["indices"] for index in order[own]]
    # without `ranks` the pattern over the epoch is the same
    starts = np.cumsum([0, *sizes])
    pattern = interleave_evenly([size // batch.size * rank_batch for size in sizes])
    for order in row["indices"]:
        assert (np.searchsorted(starts, order, side="right") - 1).tolist() == pattern.tolist()


@given(numbers=st.lists(st.integers(0, 60), min_size=1, max_size=5))
def test_spread_numbers_are_exact_and_even(numbers):
    found = interleave_evenly(numbers)
    assert np.bincount(found, minlength=len(numbers)).tolist() == numbers
    first = max(range(len(numbers)), key=lambda kind: numbers[kind])
    for end in range(len(found)):  # the most frequent one chose its places freely
        assert abs((found[:end] == first).sum() - end * numbers[first] / len(found)) <= 1


# purity -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pure steps", "pure numbers", "pure tokens"])
def test_pure_steps_hold_one_source(mode):
    found = steps(make(**MODES[mode]), 1)
    assert all(len(names(step)) == 1 for step in found)
    assert len(set.union(*map(names, found))) == 3


def test_steps_picked_by_chance_are_full_but_the_last():
    found = steps(make(**MODES["pure steps"]))
    assert [len(step) for step in found] == [8] * 7 + [7]
    many = Mixture(weights={"a": 1, "b": 2, "c": 1}, epoch_size=8000)
    picked = Counter(step[0].id[0] for step in steps(make(mixture=many, pure="step")))
    assert 420 < picked["b"] < 580  # of 1000 steps


def test_exact_pure_steps_leave_one_short_step_a_source():
    mixture = Mixture(repeats={"a": 1, "b": 2, "c": 0.5})  # 40, 20 and 6 samples
    found = steps(make(mixture=mixture, pure="step"))
    assert sorted(len(step) for step in found) == [4, 6, *[8] * 7]
    assert [len(step) for step in steps(make(**MODES["pure numbers"]))] == [8] * 8  # 40, 20 and 13
    with pytest.raises(UserError, match=r"data\.drop_last leaves no step of c, which fill none"):
        steps(make(mixture=mixture, pure="step", drop_last=True))


def test_sources_of_one_task_share_steps():
    found = steps(make(**MODES["pure tasks"]))
    assert {frozenset(names(step)) for step in found} <= {frozenset(n) for n in ("a", "c", "ac", "b")}
    assert any(names(step) == {"a", "c"} for step in found)
    exact = make(pure="step", tasks={"a": "vqa", "c": "vqa"})
    assert sorted(len(step) for step in steps(exact)) == [2, 5, *[8] * 7]  # 53 and 10 samples


@pytest.mark.parametrize("mode", ["pure packs", "pure packs spread"])
def test_rows_hold_one_task_and_their_tokens(mode):
    data = make(**MODES[mode])
    task = {"a": "vqa", "b": "b", "c": "vqa"} if "tasks" in MODES[mode] else {name: name for name in SIZES}
    mixed = 0
    for step in steps(data):
        rows = []
        for item in step:  # a row ends where the task changes or the next sample does not fit
            length = CODEC.encode(item).num_tokens
            kind = task[item.id[0]]
            if not rows or rows[-1][0] != kind or rows[-1][1] + length > 90:
                rows.append([kind, 0])
            rows[-1][1] += length
        # neighbouring rows of one task may look like fewer, never like more
        assert 1 <= len(rows) <= 3
        mixed += len({row[0] for row in rows}) > 1
    assert mixed
    assert counts(steps(data)) == SIZES


# groups -------------------------------------------------------------------------------------------------------------


def test_groups_have_steps_of_their_own_size_and_keep_their_shares():
    """XComposer2-4KHD: pages at full resolution in batches of their own size; 1,000 steps and more."""
    mixture = Mixture(weights={"a": 4, "b": 2, "c": 2}, epoch_size=6000)
    options = {"mixture": mixture, "pure": "step", "tasks": {"a": "plain", "c": "plain"}, "sizes": {"b": 3}}
    found = steps(make(**options), 1)
    kinds = [step[0].id[0] == "b" for step in found]
    assert all(names(step) == {"b"} or names(step) <= {"a", "c"} for step in found)
    assert [len(step) for step in found[:-1]] == [3 if is_b else 8 for is_b in kinds[:-1]]
    assert sum(map(len, found)) == 6000
    assert len(found) > 1000
    total = counts(found)
    # a step of `b` is picked with 0.25 / 3 parts to 0.75 / 8: 8 of 17 steps
    assert abs(sum(kinds) - len(found) * 8 / 17) < 5 * (len(found) * 8 * 9 / 17**2) ** 0.5
    assert all(abs(total[name] / 6000 - share) < 0.03 for name, share in (("a", 0.5), ("b", 0.25), ("c", 0.25)))
    dropped = steps(make(**options, drop_last=True), 1)
    assert len(dropped) == len(found) - (len(found[-1]) < (3 if kinds[-1] else 8))


def test_exact_numbers_in_steps_of_their_own_size():
    found = steps(make(**MODES["pure sizes of tasks"]))
    assert counts(found) == SIZES
    assert Counter(len(step) for step in found if "b" in names(step)) == {2: 5}
    assert Counter(len(step) for step in found if "b" not in names(step)) == {5: 10, 3: 1}  # 53 samples


def test_pictures_and_text_alternate():
    """InternLM-XComposer2: b samples with pictures, b + 1 of text alone; exact over 1,000 steps."""
    mixture = Mixture(epoch_size=7000)
    found = steps(make(**(MODES["alternate"] | {"size": 7, "mixture": mixture})), 2)
    assert len(found) == 1000
    assert all([bool(item.images) for item in step] == [True] * 3 + [False] * 4 for step in found)
    total = counts(found)
    assert total["c"] == 4000
    assert abs(total["a"] - 2400) < 5 * (3000 * 0.8 * 0.2) ** 0.5  # in proportion to their sizes, 40 and 10


def test_a_step_has_one_instruction():
    """MiniGPT-4, stage 2: over 1,000 steps, on every split the same; in evaluation the first."""
    options = MODES["instructions"] | {"size": 3, "mixture": Mixture(epoch_size=3000)}
    data = make(**options)
    encoder = Encoder(data.samples, CODEC, data.seed, data.preparation())
    drawn = []
    for number, step in enumerate(plan(data, 1)):
        found = {answer(encoder(draw, epoch=1, step=number).sample.messages[0]) for draw in step}
        assert len(found) == 1
        drawn += found
    assert len(drawn) == 1000
    assert all(abs(count - 333) < 75 for count in Counter(drawn).values())  # five times the standard deviation
    assert set(drawn) == set(options["instructions"])
    encoder = Encoder(data.samples, CODEC, data.seed, data.preparation(), training=False)
    assert {answer(encoder(i, epoch=0, step=i).sample.messages[0]) for i in range(9)} == {"What is it?"}
    asked = make(**(MODES["instructions"] | {"of": sources}))
    with pytest.raises(
        UserError, match=r"sample 'a0': its question says something itself; remove that, or data\.instr"
    ):
        Encoder(asked.samples, CODEC, 0, asked.preparation())(0, epoch=0)


# LLaVA-1.5's order --------------------------------------------------------------------------------------------------

LLAVA_ROWS = [row for row in golden_json("llava_sampler__a", "rows.json") if row["generator_seed"] is None]


def of_words(lengths):
    """Samples of so many words, a picture's mark among them; with a picture where the number is above 0."""
    return ListSource(
        [
            sample(
                str(i),
                1,
                image=words > 0,
                messages=[
                    {"role": "user", "content": [{"type": "image"}] if words > 0 else "why"},
                    {"role": "assistant", "content": " ".join(["b"] * (abs(words) - 1))},
                ],
            )
            for i, words in enumerate(lengths)
        ]
    )


@pytest.mark.parametrize("row", LLAVA_ROWS, ids=range(len(LLAVA_ROWS)))
def test_llava_1_5s_order(row):
    batch = BatchSpec(row["batch_size"] * row["world_size"])
    options = {"batch": batch, "group_by_modality": True, "ranks": row["world_size"], "seed": row["global_seed"]}
    data = InstructionData([of_words(row["lengths"])], **options)
    found = plan(data)
    assert [draw for step in found for draw in step] == row["indices"]
    assert [len(step) for step in found[:-1]] == [batch.size] * (len(found) - 1)
    assert sorted(draw for step in plan(data, 1) for draw in step) == sorted(row["indices"])
    assert plan(data, 1) != found


def test_text_alone_has_the_shortest_first_in_llava_1_5s_order():
    """The official sampler hands its signed lengths on where no sample has a picture."""
    lengths = [-(2 + 7 * i % 29) for i in range(24)]
    data = InstructionData([of_words(lengths)], batch=BatchSpec(8), group_by_modality=True, ranks=2)
    for step in plan(data):
        for chunk in (step[:4], step[4:]):
            words = [-lengths[draw] for draw in chunk]
            assert words == sorted(words)


# text share ---------------------------------------------------------------------------------------------------------


def test_the_text_share_is_kept_with_every_picture_once():
    data = make(**MODES["text share"])
    found = [item for step in steps(data, 1) for item in step]
    pictured = [item.id for item in found if item.images]
    assert len(set(pictured)) == len(pictured) == int(data.samples.image_mask().sum()) == 40
    assert len(found) - 40 == 60  # of 23 text-only samples
    assert not [item for step in steps(make(cls=InstructionData, text_share=0.0)) for item in step if not item.images]
    grouped = [{bool(item.images) for item in step} for step in steps(make(**MODES["grouped text share"]))]
    assert all(len(kinds) == 1 for kinds in grouped[:-2])
    text = InstructionData([ListSource([sample("t", 3)])], batch=BatchSpec(2), text_share=0.5)
    with pytest.raises(UserError, match=r"data\.text_share=0\.5 needs samples with pictures, data\.sources have none"):
        text.draws(0)


# resolution ---------------------------------------------------------------------------------------------------------


class PolicyCodec(ByteCodec):
    resolutions = ("hd_55", "random_hd_25")


def test_the_resolution_of_a_source_reaches_the_codec():
    data = make(resolution={"b": "hd_55"})
    encoder = Encoder(data.samples, PolicyCodec())
    found = {encoder(i, epoch=0).sample.resolution for i in range(40, 50)}
    assert found == {"hd_55"}
    assert encoder(0, epoch=0).sample.resolution is None
    assert data.samples.image_mask().tolist() == make().samples.image_mask().tolist()
    with pytest.raises(UserError, match=r"sample 'b0': data\.resolution 'hd_55': this system knows no such words"):
        Encoder(data.samples, CODEC)(40, epoch=0)
    wrapped = WithResolution(sources()[1], "hd_9")
    with pytest.raises(UserError, match=r"'hd_9': this system knows hd_55, random_hd_25; correct or remove it"):
        Encoder(wrapped, PolicyCodec())(0, epoch=0)


# wrong words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"weights": {"a": 1}}, r"data.mixture.weights names ['a'], the sources are ['a', 'b', 'c']; name each once"),
        ({"weights": {"a": 0, "b": 0, "c": 0}}, "data.mixture.weights: one number must be above 0"),
        ({"weights": {"a": -1, "b": 2, "c": 1}}, "data.mixture.weights must be numbers that are not negative"),
        ({"weights": {"a": float("nan"), "b": 2, "c": 1}}, "must be numbers that are not negative"),
        ({"weights": "even"}, "data.mixture.weights must be size, sqrt_size or a number per source, found 'even'"),
        ({"factors": {"z": 2}}, "data.mixture.factors names ['z'], the sources are ['a', 'b', 'c']"),
        ({"factors": {"a": 2}, "weights": {"a": 1, "b": 1, "c": 1}}, "multiply them into data.mixture.weights"),
        ({"epoch_size": 0}, "data.mixture.epoch_size must be at least 1, found 0"),
        ({"order": "even"}, "data.mixture.order must be random, spread or ranks, found 'even'"),
        ({"order": "ranks"}, "data.mixture.ranks: a number of devices goes with order: ranks, found None"),
        ({"order": "ranks", "ranks": 8, "epoch_size": 4}, "order: ranks takes each source as it is"),
        ({"epoch_samples": {"a": 1.5, "b": 0, "c": 0}}, "must be whole numbers of samples"),
        ({"epoch_samples": {"a": 1, "b": 0}}, "data.mixture.epoch_samples names ['a', 'b'], the sources are"),
        ({"epoch_samples": {"a": 1, "b": 0, "c": 0}, "epoch_size": 3}, "remove the other numbers"),
        ({"epoch_samples": {"a": 1}, "repeats": {"a": 1}}, "remove the other numbers"),
    ],
)
def test_mixtures_that_cannot_work_are_refused(options, line):
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        make(mixture=Mixture(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"pure": "batch"}, "data.pure must be step or pack, found 'batch'"),
        ({"pure": "pack"}, "data.pure: pack needs a batch counted in rows, found unit 'samples'"),
        ({"tasks": {"a": "vqa"}}, "set data.pure: step or pack"),
        ({"tasks": {"z": "vqa"}, "pure": "step"}, "data.tasks names ['z'], the sources are ['a', 'b', 'c']"),
        ({"resolution": {"z": "hd_55"}}, "data.resolution names ['z'], the sources are ['a', 'b', 'c']"),
        ({"cls": InstructionData, "text_share": 1.0}, "data.text_share must be at least 0 and below 1, found 1.0"),
        ({"cls": InstructionData, "text_share": 0.1, "mixture": Mixture()}, "remove one of them"),
        ({"sizes": {"a": 4}}, "data.sizes needs data.pure: step and a batch counted in samples"),
        ({"sizes": {"z": 4}, "pure": "step"}, "data.sizes names 'z', the tasks are a, b, c"),
        ({"sizes": {"a": 0}, "pure": "step"}, "data.sizes: a must be at least 1, found 0"),
        ({"cls": InstructionData, "alternate": 0}, "data.alternate must be at least 1, found 0"),
        ({"cls": InstructionData, "alternate": 2, "text_share": 0.5}, "remove group_by_modality and text_share"),
        ({"cls": InstructionData, "alternate": 2, "mixture": Mixture(order="spread")}, "picks sources by chance"),
        ({"cls": InstructionData, "ranks": 4}, "data.ranks goes with data.group_by_modality: true"),
        ({"cls": InstructionData, "ranks": 3, "group_by_modality": True}, "data.ranks=3 must share data.batch.size=8"),
        (
            {"cls": InstructionData, "ranks": 4, "group_by_modality": True, "mixture": Mixture()},
            "data.ranks takes the sources as they are",
        ),
        ({"cls": InstructionData, "instructions": ["Say", " "]}, "data.instructions: one is empty"),
        ({"cls": InstructionData, "instructions": ["Say"], "unit": "tokens"}, "need a batch counted in samples"),
        (
            {"cls": InstructionData, "group_by_modality": True, "mixture": Mixture(order="spread")},
            "remove it or data.mixture.order: spread",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(options, line):
    with pytest.raises(UserError, match=re.escape(line)):
        make(**options)


def test_sources_that_cannot_be_told_apart_or_are_empty_are_refused():
    with pytest.raises(UserError, match="needs sources with different names"):
        MultitaskData([samples(3), samples(4)], batch=BatchSpec(2), mixture=Mixture())
    with pytest.raises(UserError, match=r"data\.pure needs sources with different names"):
        MultitaskData([samples(3), samples(4)], batch=BatchSpec(2), pure="step")
    assert len(MultitaskData([samples(3), samples(4)], batch=BatchSpec(2)).draws(0)) == 7
    with pytest.raises(UserError, match=r"source 'b' is empty but data\.mixture wants samples of it"):
        Mixture(weights={"a": 1, "b": 1}).shares({"a": 3, "b": 0})
    with pytest.raises(UserError, match=r"data\.mixture leaves no sample"):
        Mixture(repeats={"a": 0.1, "b": 0.1}).shares({"a": 3, "b": 2})


def test_sources_that_cannot_alternate_are_refused():
    with pytest.raises(UserError, match=r"source 'a' has samples with and without pictures; split it in two"):
        make(cls=InstructionData, alternate=2).draws(0)
    with pytest.raises(UserError, match=r"needs sources with pictures and sources of text alone, each with a share"):
        make(cls=InstructionData, alternate=2, of=open_questions).draws(0)


def test_what_one_kind_of_data_does_the_others_refuse():
    for cls, option in ((MultitaskData, "pure"), (MultitaskData, "resolution"), (InstructionData, "text_share")):
        for other in {PretrainingData, MultitaskData, InstructionData} - {cls}:
            with pytest.raises(TypeError, match=option):
                make(cls=other, **{option: None})
