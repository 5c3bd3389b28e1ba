"""Tar shards of which each rank opens its own: the same steps on any number of ranks, and an exact resume."""

import io
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import vlm  # noqa: F401

import numpy as np
import pytest
from PIL import Image

from tests.support.fake_codec import ByteCodec, samples
from vlm.data import BatchSpec, PretrainingData, WebDataset
from vlm.data.loading.rank_gather import Gather
from vlm.data.sampling.order import Blocks, shuffled_blocks
from vlm.errors import UserError

SIZES = [7, 12, 9, 11, 3, 13, 10, 8, 6, 14, 9, 10]  # of the shards: 112 samples
CODEC = ByteCodec()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    picture = io.BytesIO()
    Image.new("RGB", (20, 10)).save(picture, "PNG")
    for number, size in enumerate(SIZES):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for at in range(size):
                for ending, content in (("png", picture.getvalue()), ("txt", b"a caption" + b" of words" * (at % 4))):
                    member = tarfile.TarInfo(f"{at:04}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder / "{00000..00011}.tar"


def data(shards: Path, streams: int | None = 8, **batch: Any) -> PretrainingData:
    return PretrainingData([WebDataset(shards, prompt="Say it.", streams=streams)], batch=BatchSpec(16, **batch))


def together(world: int, work: Callable[[int, Gather], Any]) -> list[Any]:
    """What each rank makes, where every rank is a thread."""
    barrier, told = threading.Barrier(world), {}

    def gather_of(rank: int) -> Gather:
        def talk(value: Any) -> list[Any]:
            told[rank] = value
            barrier.wait(60)
            everywhere = [told[other] for other in range(world)]
            barrier.wait(60)
            return everywhere

        return Gather(talk, lambda messages: [sent[rank] for sent in talk(messages)])

    with ThreadPoolExecutor(world) as pool:
        return [made.result() for made in [pool.submit(work, rank, gather_of(rank)) for rank in range(world)]]


def epochs(
    shards: Path, world: int, accumulate: int = 1, **options: Any
) -> tuple[list[list[set[str]]], list[set[int]]]:
    """The samples of every step of two epochs, and the shards that each rank has opened."""

    def work(rank: int, gather: Gather) -> Any:
        own = data(shards, **options)
        (source,) = own.sources
        source.open_together(gather, world=world, rank=rank)
        loader = own.train_loader(CODEC, world=world, rank=rank, accumulate=accumulate, gather=gather)
        seen: list[list[set[str]]] = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            packs = [{info.id for info in pack.samples if not info.filler} for pack in loader]
            seen.append([set().union(*packs[i : i + accumulate]) for i in range(0, len(packs), accumulate)])
        return seen, set(source._opened)

    ranks = together(world, work)
    steps = [
        [set().union(*step) for step in zip(*parts, strict=True)]
        for parts in zip(*(seen for seen, _ in ranks), strict=True)
    ]
    for parts, whole in zip(zip(*(seen for seen, _ in ranks), strict=True), steps, strict=True):
        assert sum(len(step) for part in parts for step in part) == sum(map(len, whole))  # each sample on one rank
    return steps, [opened for _, opened in ranks]


@pytest.mark.parametrize("batch", [{}, {"negatives": "pack", "packs": 4}], ids=["balanced", "in order"])
def test_a_rank_opens_shards_of_its_own_and_the_steps_stay(shards: Path, batch: dict[str, Any]) -> None:
    alone, [everything] = epochs(shards, 1, 4, **batch)
    assert everything == set(range(len(SIZES)))
    shared, opened = epochs(shards, 4, **batch)
    assert shared == alone
    assert sum(len(step) for step in alone[0]) == (112 if not batch else 112 // 16 * 16)
    assert alone[0] != alone[1]
    assert max(map(len, opened)) <= len(SIZES) // 4 + 2  # a shard at either end belongs to two ranks
    assert set().union(*opened) == everything
    every, opened = epochs(shards, 4, streams=None, **batch)
    assert min(map(len, opened)) >= len(SIZES) - 1  # shuffled as a whole
    assert every != shared


def test_a_resumed_training_goes_on_with_the_next_step(shards: Path) -> None:
    def stream(loader: Any) -> list[list[str]]:
        return [[info.id for info in pack.samples] for pack in loader]

    whole = stream(data(shards).train_loader(CODEC, world=2, rank=1))
    stopped = data(shards).train_loader(CODEC, world=2, rank=1)
    packs = iter(stopped)
    for _ in range(3):
        next(packs)
    again = data(shards).train_loader(CODEC, world=2, rank=1)
    again.load_state_dict(stopped.state_dict())
    assert stream(again) == whole[3:]
    with pytest.raises(UserError, match=r"streams of data\.sources = \{'\{00000..00011\}': 8\}, this run has .*: 4\}"):
        data(shards, 4).train_loader(CODEC, world=2, rank=1).load_state_dict(stopped.state_dict())


def test_streams_that_cannot_be(shards: Path) -> None:
    with pytest.raises(UserError, match=r"has 8 streams, less than the 16 ranks; raise 'streams'"):
        data(shards).train_loader(CODEC, world=16)
    with pytest.raises(UserError, match=r"112 samples make no 200 streams"):
        data(shards, 200).train_loader(CODEC)
    with pytest.raises(UserError, match="streams must be at least 1"):
        data(shards, 0)


def test_every_rank_hears_of_a_shard_that_one_of_them_cannot_read(shards: Path, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(
            (shards.parent / f"{number:05}.tar").read_bytes()[: 9000 if number else None]
        )

    def work(rank: int, gather: Gather) -> str:
        with pytest.raises(UserError, match=r"1\.tar: is no whole tar file") as raised:
            WebDataset(tmp_path / "{0..1}.tar").open_together(gather, world=2, rank=rank)
        return str(raised.value)

    assert len(set(together(2, work))) == 1


def test_any_few_samples_in_a_row_come_from_all_over_the_streams() -> None:
    blocks = Blocks(np.cumsum([7] * 40), 2, streams=32)
    walk = shuffled_blocks(blocks, seed=1, epoch=0)
    assert sorted(walk.tolist()) == list(range(280))
    stream = np.searchsorted(blocks.stream_ends, walk[:256], side="right").reshape(-1, 8)
    assert (np.sort(stream // 4) == np.arange(8)).all()


def test_streams_beside_other_data(shards: Path) -> None:
    """A mixture of both: the others' samples stand evenly among them, and ranks open a part of the shards."""
    mixed = PretrainingData([samples(56), WebDataset(shards, prompt="Say it.", streams=8)], batch=BatchSpec(24))
    steps = [mixed.streams().in_order(mixed.steps(epoch, encoder=mixed._encoder(CODEC))) for epoch in (0, 1)]
    assert all(sorted(draw for step in epoch for draw in step) == list(range(168)) for epoch in steps)
    own = [draw - 56 for epoch in steps for step in epoch for draw in step[: len(step) // 4] if draw >= 56]
    assert np.mean(np.array(own) < 28) > 0.9  # of the first quarter of its samples
