"""Samples that a training leaves out: by a list, or because it meets them and may go on without them."""

import functools
import json
from pathlib import Path
from typing import Any

import vlm  # noqa: F401  (before lightning)
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributed

from callbacks import BadSamples
from tests.support.fake_codec import ByteCodec, ListSource, sample, samples
from tests.support.ranks import run_ranks
from tests.commands.test_cli import World, _truncated
from tests.data.test_loader_resume import Model, SaveAt, SharedModel, fit
from vlm.data import BatchSpec, InstructionData, MultitaskData
from vlm.data.loading.rank_gather import gather_over_ranks
from vlm.data.loading.encoder import Encoder
from vlm.data.sampling.mixture import Mixture
from vlm.errors import SampleError, UserError

BAD = {5: "broken5", 11: "unusable11", 17: "broken17"}


class PictureCodec(ByteCodec):
    """Pictures of samples with `broken` in their id cannot be decoded."""

    def collate(self, items, *, counts, packs=1):
        for item in items:
            if "broken" in item.sample.id:
                raise item.sample.error("image 'x.png' cannot be decoded")
        return super().collate(items, counts=counts, packs=packs)


def source(names: dict[int, str] = BAD, n: int = 22) -> ListSource:
    found = ListSource(samples(n, prefix="s").samples, "list")
    for index, name in names.items():
        found.samples[index] = sample(name, 9, image=True)
    return found


def data(**options: Any) -> InstructionData:
    return InstructionData([source()], **({"batch": BatchSpec(8), "max_bad_samples": 3} | options))


def all_steps(loader: Any) -> list[list[tuple]]:
    """Per step what decides a gradient: ids, sequences and denominators of its packs."""
    seen = [
        (tuple(s.id for s in pack.samples if not s.filler), pack.text.ids.tolist(), dict(pack.counts), pack.packs)
        for pack in loader
    ]
    return [seen[at : at + loader.accumulate] for at in range(0, len(seen), loader.accumulate)]


def ids(step: list[tuple]) -> list[str]:
    return sorted(name for pack in step for name in pack[0])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_a_step_is_what_it_would_be_without_its_bad_samples(workers: int, unit: str) -> None:
    """Bad text and bad pictures alike: nobody takes their place, and the denominators count who is left."""
    batch = BatchSpec(8) if unit == "samples" else BatchSpec(150, "tokens")
    mine = data(num_workers=workers, batch=batch)
    loader = mine.train_loader(PictureCodec(), accumulate=2)
    found = all_steps(loader)
    encoder = Encoder(mine.samples, PictureCodec(), mine.seed)
    planned = [loader.sampler.steps[at] for at in range(len(found))]
    for step, draws in zip(found, planned, strict=True):
        good = [draw for draw in draws if draw not in BAD]
        assert ids(step) == sorted(mine.samples[draw].id for draw in good)
        labels = sum(encoder(draw, epoch=0).counts["lm"] for draw in good)
        assert {pack[2]["lm"] for pack in step} == {labels}
        assert {pack[2]["samples"] for pack in step} == {float(len(good))}
    where = {draw: index for index, draws in enumerate(planned) for draw in draws}
    assert {(e.source, e.index, e.id, e.epoch, e.step) for e in loader.left_out} == {
        ("list", index, name, 0, where[index]) for index, name in BAD.items()
    }
    assert loader.num_bad_samples == 3
    assert {e.reason for e in loader.left_out} == {"cannot be used", "image 'x.png' cannot be decoded"}


def test_the_cap_counts_different_samples_and_ends_the_run() -> None:
    loader = data(max_bad_samples=3).train_loader(PictureCodec())
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        list(loader)
    assert (len(loader.left_out), loader.num_bad_samples) == (9, 3)
    with pytest.raises(UserError, match=r"bad sample number 3 of this training, more than data\.max_bad_samples=2.*"):
        list(data(max_bad_samples=2).train_loader(PictureCodec()))
    strict = data(max_bad_samples=0).train_loader(PictureCodec())
    with pytest.raises(SampleError) as caught:
        list(strict)
    assert [(entry.id, entry.reason) for entry in strict.left_out] == [(caught.value.sample_id, caught.value.reason)]
    nothing = source({0: "broken0", 1: "unusable1", 2: "broken2"}, 3)
    loader = InstructionData([nothing], batch=BatchSpec(8), max_bad_samples=9).train_loader(PictureCodec())
    with pytest.raises(UserError, match=r"all of its 3 samples are bad"):
        list(loader)
    with pytest.raises(UserError, match="max_bad_samples must not be negative"):
        data(max_bad_samples=-1)


def test_a_filler_of_a_bad_sample_goes_with_it() -> None:
    """The filler copies the step's shortest sample: if that cannot be decoded, its copies in other packs go too."""
    few = ListSource([sample("long", 30, image=True), sample("broken", 1, image=True), sample("longer", 40)])
    mine = InstructionData([few], batch=BatchSpec(3), max_bad_samples=1)
    (step,) = all_steps(mine.train_loader(PictureCodec(), accumulate=5))
    assert ids(step) == ["long", "longer"]
    assert {pack[2]["samples"] for pack in step} == {2.0}


# ranks --------------------------------------------------------------------------------------------------------------


FLAKY = {"s1", "s2", "s3", "s4", "s6", "s7"}


class FlakyCodec(PictureCodec):
    """Rank 1 cannot read the text of some samples, as on a machine that lacks files; it may never meet them."""

    def encode(self, sample, *, seed=None, generate=False):
        if sample.id in FLAKY and distributed.get_rank() == 1:
            raise sample.error("is not on this machine")
        return super().encode(sample, seed=seed, generate=generate)


def _shared(codec: Any) -> tuple[list, list]:
    mine = data(max_bad_samples=9)
    world, rank = distributed.get_world_size(), distributed.get_rank()
    loader = mine.train_loader(codec, world=world, rank=rank, gather=gather_over_ranks())
    return all_steps(loader), loader.left_out


def test_all_ranks_leave_out_what_one_of_them_cannot_read() -> None:
    alone = data().train_loader(PictureCodec(), accumulate=2)
    expected = all_steps(alone)
    results = run_ranks(_shared, 2, PictureCodec())
    assert [left_out for _, left_out in results] == [alone.left_out] * 2
    for at, step in enumerate(expected):
        assert sorted(pack for steps, _ in results for pack in steps[at]) == sorted(step)
    results = run_ranks(_shared, 2, FlakyCodec())
    first, second = (left_out for _, left_out in results)
    assert first == second
    met = {entry.id for entry in first} - {*BAD.values()}
    assert met
    assert met <= FLAKY
    for at in range(len(expected)):
        together = [pack for steps, _ in results for pack in steps[at]]
        assert ids(together) == [name for name in ids(expected[at]) if name not in met]
        assert len({str(pack[2]) for pack in together}) == 1
    with pytest.raises(AssertionError, match="agree on what is left out"):
        data().train_loader(PictureCodec(), world=2)


# in a training ------------------------------------------------------------------------------------------------------


def _fit(folder: Path, *, resume: Path | None = None, callbacks: Any = (), **options: Any) -> Any:
    model = Model()
    model.codec = PictureCodec()
    made = functools.partial(data, **options)
    return fit(folder, model=model, data=made, resume=resume, callbacks=[BadSamples(), *callbacks])


def _fit_shared(folder: Path) -> list:
    """What each step trained on, over both ranks, and the weight before it."""
    model = SharedModel()
    model.codec = PictureCodec()
    shared = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "accumulate_grad_batches": 1}
    fit(folder, model=model, data=data, callbacks=[BadSamples()], **shared)
    return model.log_of_steps


def test_two_ranks_train_as_one_does(tmp_path: Path) -> None:
    alone = _fit(tmp_path / "alone").log_of_steps
    first, second = run_ranks(_fit_shared, 2, tmp_path / "shared")
    assert [step[:2] for step in first] == [step[:2] for step in second] == [step[:2] for step in alone]
    assert [step[2] for step in first] == pytest.approx([step[2] for step in alone], abs=1e-6)
    assert _lines(tmp_path / "shared") == _lines(tmp_path / "alone")


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]


def test_a_resumed_training_knows_what_was_left_out(tmp_path: Path) -> None:
    whole = _fit(tmp_path / "whole")
    lines = _lines(tmp_path / "whole")
    assert len(lines) == 9
    assert {(line["id"], line["index"]) for line in lines} == {(name, index) for index, name in BAD.items()}
    path = tmp_path / "x.ckpt"
    for at in [(0, 1), (1, 1), (1, 2), (1, 5)]:
        _fit(tmp_path / "first", callbacks=[SaveAt(path, "batch_end", at)])
        done = torch.load(path, weights_only=False)["global_step"]
        resumed = _fit(tmp_path / "second", resume=path)
        assert resumed.log_of_steps == whole.log_of_steps[done:]
        assert _lines(tmp_path / "second") == lines
    # what was left out before the checkpoint counts: the cap is reached at the same sample
    tight = torch.load(path, weights_only=False)
    assert len({entry["id"] for entry in next(iter(_states(tight)))["left_out"]}) == 3
    with pytest.raises(UserError, match="max_bad_samples=2"):
        _fit(tmp_path / "third", max_bad_samples=2)
    assert len({line["id"] for line in _lines(tmp_path / "third")}) == 3


def _states(value: Any) -> Any:
    if isinstance(value, dict):
        if "left_out" in value:
            yield value
        for item in value.values():
            yield from _states(item)
    elif isinstance(value, list):
        for item in value:
            yield from _states(item)


def test_the_first_bad_sample_ends_a_training_and_is_written_down(tmp_path: Path) -> None:
    with pytest.raises(SampleError) as caught:
        _fit(tmp_path, max_bad_samples=0)
    (line,) = _lines(tmp_path)
    assert (line["id"], line["reason"]) == (caught.value.sample_id, caught.value.reason)
    again = _fit(tmp_path / "again", max_bad_samples=3)  # the list of one training is the quarantine of the next
    listed = tmp_path / "again" / "bad_samples.jsonl"
    clean = _fit(tmp_path / "clean", max_bad_samples=0, quarantine=listed)
    assert len(clean.log_of_steps) == len(again.log_of_steps)
    assert not (tmp_path / "clean" / "bad_samples.jsonl").exists()


# the list -----------------------------------------------------------------------------------------------------------


def _list(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")
    return path


def _entry(index: int, name: str, source: str = "list") -> dict[str, Any]:
    return {"source": source, "id": name, "index": index, "reason": "because"}


def test_listed_samples_are_in_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [_entry(index, name) for index, name in BAD.items()]
    path = _list(tmp_path / "q.jsonl", *entries, entries[0], _entry(1, "v1", "val"), _entry(2, "v2", "val"))
    val = ListSource(samples(4, prefix="v").samples, "val")
    mine = data(quarantine=path, val_sources=[val], num_workers=1, max_bad_samples=0)
    mine.setup("fit")
    assert "3 samples are left out of the training and 2 of the validation" in capsys.readouterr().out
    everyone = [source()[index].id for index in range(22) if index not in BAD]
    assert [mine.samples[i].id for i in range(len(mine.samples))] == everyone
    assert [mine.samples.place(i)[1] for i in range(19)] == [i for i in range(22) if i not in BAD]
    assert mine.samples.image_mask().tolist() == [mine.samples.has_image(i) for i in range(19)]
    assert sorted(name for step in all_steps(mine.train_loader(PictureCodec())) for name in ids(step)) == sorted(
        everyone
    )
    assert [mine.val_sources[0][i].id for i in range(len(mine.val_sources[0]))] == ["v0", "v3"]
    with pytest.raises(IndexError):
        mine.val_sources[0][2]
    weighted = MultitaskData(
        [source()],
        batch=BatchSpec(4),
        mixture=Mixture({"list": 1.0}, order="spread"),
        quarantine=path,
        val_sources=[val],
    )
    assert {name for step in all_steps(weighted.train_loader(PictureCodec())) for name in ids(step)} == set(everyone)


def test_a_source_with_a_resolution_keeps_its_list(tmp_path: Path) -> None:
    def tasks(**options: Any) -> MultitaskData:
        return MultitaskData([source()], batch=BatchSpec(4), resolution={"list": "x"}, **options)

    listed = tasks(quarantine=_list(tmp_path / "q.jsonl", _entry(5, "broken5")))
    assert listed.samples.place(5) == ("list", 6)
    assert listed.identity()["data.quarantine"] != tasks().identity()["data.quarantine"]


def test_rows_of_one_task_go_on_without_bad_samples() -> None:
    mine = MultitaskData([source()], batch=BatchSpec(2, "rows", 60), pure="pack", max_bad_samples=3)
    loader = mine.train_loader(PictureCodec())
    everyone = {source()[index].id for index in range(22) if index not in BAD}
    assert {name for step in all_steps(loader) for name in ids(step)} == everyone


def test_another_list_is_another_training(tmp_path: Path) -> None:
    first = _list(tmp_path / "1.jsonl", _entry(5, "broken5"))
    same = _list(tmp_path / "2.jsonl", _entry(5, "broken5") | {"reason": "x"})
    other = _list(tmp_path / "3.jsonl", _entry(17, "broken17"))
    state = data(quarantine=first).train_loader(PictureCodec()).state_dict()
    data(quarantine=same).train_loader(PictureCodec()).load_state_dict(state)
    for changed in (other, None):
        with pytest.raises(UserError, match=r"written with data\.quarantine = 1 samples, \w+"):
            data(quarantine=changed).train_loader(PictureCodec()).load_state_dict(state)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"data\.quarantine: .*q\.jsonl cannot be read.*check-data"),
        ('{"source": "list"}', "line 1 is no entry .*index"),
        ("[1]", "line 1 is no entry"),
        ('{"source": "list", "index": "5", "id": "broken5"}', "'index' a number from 0"),
        (json.dumps(_entry(5, "other")), r"sample 'other' \(number 5\) of source 'list' is not there.*changed"),
        (json.dumps(_entry(500, "s500")), "is not there, the data has changed"),
        (json.dumps(_entry(5, "broken5", "nowhere")), "there is no such source, there are list"),
        ("\n".join(json.dumps(_entry(i, s.id)) for i, s in enumerate(source().samples)), "names every sample of"),
    ],
)
def test_a_list_that_does_not_fit(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        len(data(quarantine=tmp_path / "q.jsonl").samples)


# the command line ---------------------------------------------------------------------------------------------------


def test_a_run_says_and_writes_what_it_leaves_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path)
    _truncated(world)
    options = ["--trainer.logger=true", "--trainer.log_every_n_steps=1"]
    assert world.fit(*options) == 2
    assert "image '2.png' cannot be decoded" in capfd.readouterr().err
    assert [line["id"] for line in _lines(world.run)] == ["s2"]
    assert world.fit(*options, "--data.init_args.max_bad_samples=1") == 0  # the same run folder goes on
    assert "goes without sample 's2' of 'data' (1 of at most 1 bad samples)" in capfd.readouterr().err
    assert [(line["id"], line["index"], line["source"]) for line in _lines(world.run)] == [("s2", 2, "data")]
    events = EventAccumulator(str(world.run / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("data/bad_samples")][-1] == 1.0
