"""Data by its hub name: folders that the `datasets` library itself wrote, in the layouts that the hub serves."""

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture

from tests.support.fake_codec import ByteCodec
from vlm.data import BatchSpec, HubDataset, Mixture, Parquet, VisionLanguageData
from vlm.data.sampling.order import Blocks, shuffled_blocks
from vlm.data.wrappers.held_out import HoldOut
from vlm.errors import SampleError, UserError
from vlm.sample import ImagePart, TextPart

PAIR = {"user": Value("string"), "assistant": Value("string"), "source": Value("string")}
CAULDRON = Features({"images": List(Image()), "texts": List(PAIR)})
TURN = {"from": Value("string"), "value": Value("string")}
ONEVISION = Features(
    {"id": Value("string"), "image": Image(), "conversations": List(TURN), "data_source": Value("string")}
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(width: int) -> bytes:
    file = io.BytesIO()
    Picture.new("RGB", (width, 5), (width, 0, 0)).save(file, "PNG")
    return file.getvalue()


def cauldron(count: int) -> Dataset:
    """Sample i shows i % 3 images, the first of them 10 + i wide."""
    return Dataset.from_dict(
        {
            "images": [[{"bytes": png(10 + i + 50 * n), "path": None} for n in range(i % 3)] for i in range(count)],
            "texts": [
                [
                    {"user": f"q{i}", "assistant": f"a{i}", "source": "x"},
                    {"user": "and?", "assistant": "b", "source": "x"},
                ]
                for i in range(count)
            ],
        },
        features=CAULDRON,
    )


def onevision(count: int) -> Dataset:
    """Every third sample is text alone."""
    return Dataset.from_dict(
        {
            "id": [f"s{i}" for i in range(count)],
            "image": [None if i % 3 == 2 else {"bytes": png(10 + i), "path": None} for i in range(count)],
            "conversations": [
                [
                    {"from": "human", "value": f"q{i}" if i % 3 == 2 else f"<image>\nq{i}"},
                    {"from": "gpt", "value": f"a{i}"},
                ]
                for i in range(count)
            ],
            "data_source": ["x"] * count,
        },
        features=ONEVISION,
    )


def written(folder: Path, data: Dataset, how: str) -> dict[str, Any]:
    """Arguments of a source that reads `data`."""
    if how == "saved":
        data.save_to_disk(folder)
    elif how == "saved with splits":
        DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(folder)
    else:
        folder.mkdir()
        half = len(data) // 2
        for at, rows in enumerate((range(half), range(half, len(data)))):
            data.select(rows).to_parquet(folder / f"train-{at}.parquet", batch_size=3)
    return {"path": str(folder), "streaming": how == "streamed"}


HOW = ("saved", "saved with splits", "parquet", "streamed")


@pytest.mark.parametrize("how", HOW)
def test_the_cauldron(how: str, tmp_path: Path) -> None:
    source = HubDataset(**written(tmp_path / "ai2d", cauldron(10), how))
    source = pickle.loads(pickle.dumps(source))  # as it travels to a worker
    assert (len(source), source.name) == (10, "ai2d")
    assert source.image_mask().tolist() == [i % 3 > 0 for i in range(10)]
    sample = source[5]
    assert [file.read(sample).size for file in sample.images] == [(15, 5), (65, 5)]
    roles = [message.role for message in sample.messages]
    assert roles == ["user", "assistant"] * 2
    first = sample.messages[0].content
    assert [type(part) for part in first] == [ImagePart, ImagePart, TextPart]
    assert first[2].text == "q5"
    assert not source[6].images
    assert source[6].messages[1].content[0].text == "a6"


@pytest.mark.parametrize("how", HOW)
def test_llava_onevision(how: str, tmp_path: Path) -> None:
    source = HubDataset(**written(tmp_path / "x", onevision(10), how))
    assert source.image_mask().tolist() == [i % 3 < 2 for i in range(10)]
    sample = source[4]
    assert (sample.id, sample.images[0].size(sample)) == ("s4", (14, 5))
    assert [type(part) for part in sample.messages[0].content] == [ImagePart, TextPart]
    assert not source[5].images


def test_captions_and_parquet_of_the_same_layout(tmp_path: Path) -> None:
    data = Dataset.from_dict(
        {"image": [{"bytes": png(9), "path": "q.png"}], "text": ["a red square"]},
        features=Features({"image": Image(), "text": Value("string")}),
    )
    data.save_to_disk(tmp_path / "pairs")
    sample = HubDataset(str(tmp_path / "pairs"), caption="text", prompt="Describe.")[0]
    assert sample.task == "caption"
    assert sample.messages[1].content[0].text == "a red square"
    arguments = written(tmp_path / "c", cauldron(4), "parquet")
    assert [len(sample.images) for sample in Parquet(arguments["path"])] == [0, 1, 2, 0]


@pytest.mark.parametrize("mixture", [None, Mixture("sqrt_size")])
def test_a_stream_is_shuffled_by_blocks_and_goes_on_exactly(tmp_path: Path, mixture: Mixture | None) -> None:
    arguments = written(tmp_path / "s", cauldron(24), "streamed")
    written(tmp_path / "w", onevision(6), "saved")

    def loader() -> Any:
        sources = [HubDataset(**arguments, groups_at_once=2), HubDataset(str(tmp_path / "w"))]
        data = VisionLanguageData(sources, batch=BatchSpec(4), mixture=mixture, num_workers=0)
        return data, data.train_loader(ByteCodec())

    data, whole = loader()
    draws = [draw % 30 for draw in data.draws(0)]
    mine = [draw for draw in draws if draw < 24]
    if mixture is None:
        assert sorted(draws) == list(range(30))
        visited = [draw // 3 for draw in mine]  # parquet files of 12 rows in groups of 3
        for at in range(0, 24, 6):
            assert len(set(visited[at : at + 6])) == 2, "two groups are shuffled together and left behind"
        assert mine != sorted(mine)
    assert data.draws(1) != data.draws(0)
    batches = [[info.id for info in batch.samples] for batch in whole]
    _, second = loader()
    ids = iter(second)
    first = [[info.id for info in next(ids).samples] for _ in range(3)]
    state = second.state_dict()
    _, third = loader()
    third.load_state_dict(state)
    assert first + [[info.id for info in batch.samples] for batch in third] == batches


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 3))
def test_blocks_are_left_behind(sizes: list[int], together: int, epoch: int) -> None:
    ends = np.cumsum(sizes)
    order = shuffled_blocks(Blocks(ends, together), seed=1, epoch=epoch)
    assert sorted(order) == list(range(ends[-1]))
    blocks = np.searchsorted(ends, order, side="right").tolist()
    for block in set(blocks):
        first, last = blocks.index(block), len(blocks) - 1 - blocks[::-1].index(block)
        assert len(set(blocks[first : last + 1])) <= together


def test_what_cannot_be_opened_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cauldron(2).rename_column("texts", "words").save_to_disk(tmp_path / "columns")
    written(tmp_path / "splits", cauldron(2), "saved with splits")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "train.jsonl").write_text('{"messages": []}\n')
    cauldron(1).map(lambda row: row | {"texts": []}).save_to_disk(tmp_path / "empty")
    cases: dict[str, dict[str, Any]] = {
        r"columns train: has none of the columns messages, conversations, texts; found images, words": {},
        r"splits: no split 'val'; there are train, test": {"split": "val"},
        r"json train: streaming fetches rows of parquet files, found .*train\.jsonl": {"streaming": True},
        r"nowhere: datasets cannot open it as config 'a', split 'train' \(": {"config": "a"},
    }
    for message, options in cases.items():
        path = str(tmp_path / message.split(":")[0].split()[0])
        with pytest.raises(UserError, match=message) as found:
            len(HubDataset(path, **options))
        assert len(str(found.value)) < 700
    with pytest.raises(SampleError, match=r"row 0: 'messages' must be a list of at least one turn"):
        HubDataset(str(tmp_path / "empty"))[0]
    with pytest.raises(UserError, match=r"split 'train\[:5\]': a slice is of a dataset that is there"):
        HubDataset("x", split="train[:5]", streaming=True)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs datasets; pip install 'vlm\[hub\]'"):
        len(HubDataset("x"))


def test_a_share_is_held_out_by_image(tmp_path: Path) -> None:
    data = cauldron(12)
    twice = datasets.concatenate_datasets([data, data])
    source = HubDataset(**written(tmp_path / "w", twice, "saved"))
    training, validation = (HoldOut(0.25, [source]).parts(side)[0] for side in ("training", "validation"))
    assert len(validation) >= 6
    assert len(training) + len(validation) == 24
    shown = [
        {image.read(sample).tobytes() for sample in part for image in sample.images} for part in (training, validation)
    ]
    assert shown[0]
    assert shown[1]
    assert not shown[0] & shown[1]
    streamed = HubDataset(**written(tmp_path / "s", data, "streamed"))
    with pytest.raises(UserError, match=r"'s' is streamed; name other data in data\.val_sources"):
        len(HoldOut(0.25, [streamed]).parts("training")[0])
