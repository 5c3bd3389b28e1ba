"""What every system keeps, whatever it is made of. A new system joins by one entry in `tests.support.systems.SYSTEMS`.

Dropout is 0 everywhere, so only the order of sums may differ. Gradients are compared in float64: 1e-14 of a tensor's
largest value was seen. In float32, small errors would hide in the noise.
"""

import dataclasses
import json
import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, distributed, nn
from torch.nn.utils import parameters_to_vector

import vlm
from callbacks import Health, StageTransition
from callbacks.stage_transition import write_stage
from tests.support.parity import assert_same_scores
from tests.support.ranks import run_ranks
from tests.support.systems import RATE, SYSTEMS, System, build, make
from tests.support.training import ListSource, Recorder, trainer, weights
from vlm.batch import Batch
from vlm.building.network import find_ties
from vlm.checkpoints.resume.single_file import AtomicCheckpointIO
from vlm.codec import step_counts
from vlm.data import BatchSpec, VisionLanguageData
from vlm.errors import SampleError, UserError
from vlm.language import Decoding
from vlm.building.instantiate import describe
from vlm.module import VisionLanguageModule
from vlm.moving import changing_names, moving_names
from vlm.sample import Sample
from vlm.schedules import Schedule
from vlm.stages import AdamW, InitFrom, Stage, Trained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def among(chosen: Callable[[System], object]) -> Any:
    """The systems that a test can be asked of; `test_a_system_is_what_its_entry_says` leaves none out unseen."""
    return pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if chosen(system)])


EVERY = among(lambda system: True)


def collate(module: Any, chosen: Sequence[Sample], *, of: Sequence[Sample] | None = None, packs: int = 1) -> Batch:
    """A pack of the step that consists of the samples `of`."""
    encode = module.codec.encode
    counts = step_counts([encode(sample) for sample in (chosen if of is None else of)])
    return module.codec.collate([encode(sample) for sample in chosen], counts=counts, packs=packs)


def gradients(module: Any, *batches: Batch, leave_out: Collection[str] = ()) -> tuple[float, dict[str, Tensor]]:
    """Sum of the loss over packs and the gradients of that sum, all terms together but for some."""
    module.zero_grad()
    total = 0.0
    for batch in batches:
        loss = sum(value for term, value in module.losses(batch).items() if term not in leave_out)
        loss.backward()
        total += loss.item()
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if leave_out:  # some are for those terms alone
        trained = {n: p for n, p in trained.items() if p.grad is not None}
    return total, {n: p.grad.clone() for n, p in trained.items()}


def outputs(name: str, module: Any, batch: Batch) -> list[Tensor]:
    """What a system makes of a pack, other than its losses."""
    uses = SYSTEMS[name].uses
    found = [module.label_logits(batch)] if "score" in uses else []
    return [*found, *module.embeddings(batch)[:2]] if "embed" in uses else found


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, rtol: float) -> None:
    """Same names; the worst difference is at most `rtol` of the tensor's largest value."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        scale = max(tensor.abs().max().item(), 1e-3)
        assert (ours[name] - tensor).abs().max().item() <= rtol * scale, name


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


def values(module: VisionLanguageModule) -> dict[str, Tensor]:
    """Every parameter and buffer, the buffers that are not saved too."""
    return {name: tensor.detach().clone() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def disturb(module: Any, what: set[str]) -> None:
    """As if `what` had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name in what:
                step = 0.1 * torch.randn(tensor.shape, generator=generator)
                tensor += step if tensor.is_floating_point() else 1


class Planned(VisionLanguageData):
    """Steps that a test chooses."""

    def __init__(self, pool: Sequence[Sample], plan: Sequence[Sequence[int]], batch: BatchSpec) -> None:
        super().__init__([ListSource(pool)], batch=batch)
        self.plan = [list(step) for step in plan]

    def steps(self, epoch: int, **_: Any) -> list[list[int]]:
        return self.plan


@EVERY
def test_a_system_is_what_its_entry_says(name: str, tmp_path: Path) -> None:
    """What it is not asked by the tests below, it refuses."""
    system, module = SYSTEMS[name], build(name)
    pool = system.pool(tmp_path, 2)
    states = [*module.embed(pool)[3:]] if "match" in system.uses else [torch.zeros(2, 2)] * 2
    asked: dict[str, Callable[[], Any]] = {
        "score": lambda: module.score(pool),
        "generate": lambda: module.generate(pool, decoding=Decoding(max_new_tokens=1)),
        "embed": lambda: module.embed(pool).image,
        "match": lambda: module.match(*states),
    }
    assert {"score", "generate", "embed"} & {*system.uses}
    assert {*system.uses} <= asked.keys()
    for use, ask in asked.items():
        if use in system.uses:
            assert len(ask()) == len(pool)
        else:
            with pytest.raises(UserError, match=f"^{module.system} "):
                ask()
    assert (system.reference is not None) == ("score" in system.uses)
    assert module.codec.needs_image == system.needs_image
    if system.needs_image:
        with pytest.raises(SampleError, match="image"):
            module.codec.encode(dataclasses.replace(pool[0], images=()))
    batch = collate(module, pool)
    terms = module.losses(batch).keys()
    assert terms <= batch.counts.keys()
    assert {*module.in_batch_terms} <= terms
    assert bool(module.in_batch_terms) == (system.batch.negatives is not None)
    assert moving_names(module) == system.moving


# -- building


@EVERY
def test_building_depends_on_the_seed_alone(name: str) -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first, torch_state = values(build(name, seed=3)), torch.get_rng_state()
    assert torch.equal(torch_state, states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    torch.manual_seed(99)
    module = make(name, seed=3)
    with torch.device("meta"):  # Lightning builds in the context of its device
        module.configure_model()
    assert_equal(values(module), first)
    other = dict(build(name, seed=4).named_parameters())  # buffers are tables that are computed
    drawn = [n for n, tensor in first.items() if n in other and tensor.numel() > 1 and tensor.std() > 0]
    assert len(drawn) > 10
    assert [n for n in drawn if torch.equal(other[n], first[n])] == []


@EVERY
def test_ties_stay_ties(name: str, tmp_path: Path) -> None:
    module = build(name)
    assert module.ties == find_ties(module) == SYSTEMS[name].ties
    for alias, owner in SYSTEMS[name].ties.items():
        assert module.get_parameter(alias) is module.get_parameter(owner)
    write_stage(tmp_path / "artefact", module, global_step=1)
    assert find_ties(vlm.load(tmp_path / "artefact")) == SYSTEMS[name].ties


@among(lambda system: system.surgery)
def test_surgery_starts_as_the_identity(name: str, tmp_path: Path) -> None:
    pool = SYSTEMS[name].pool(tmp_path, 6)
    module, plain = build(name), make(name)
    plain.surgery, plain.stage = [], None  # whose patterns name what surgery adds
    plain.configure_model()
    old, batch = dict(plain.named_parameters()), collate(module, pool)
    text_alone = collate(module, [sample for sample in pool if not sample.images])
    assert all(torch.equal(p, old[n]) for n, p in module.named_parameters() if n in old)
    new = {n for n, _ in module.named_parameters() if n not in old}
    assert new
    with torch.no_grad():
        before, text_before = plain.label_logits(batch), plain.label_logits(text_alone)
        # an expert's products are of other shapes, which may sum in another order; 0 seen
        torch.testing.assert_close(module.label_logits(batch), before, atol=1e-5, rtol=0)
        disturb(module, new)
        assert (module.label_logits(batch) - before).abs().max() > 1e-3
        assert torch.equal(module.label_logits(text_alone), text_before)


# -- a sample and a pack


@EVERY
def test_codec_and_network_agree_on_the_number_of_tokens(name: str, tmp_path: Path) -> None:
    module = build(name)
    for sample in SYSTEMS[name].pool(tmp_path, 6):
        item = module.codec.encode(sample)
        sizes = [image.size(sample) for image in sample.images]
        promised = sum(module.codec.num_tokens(*size) for size in sizes)
        reserved = sum(len(slots) for sequence in item.text for slots in sequence.slots.values())
        features = module.image_features(collate(module, [sample])) if SYSTEMS[name].splices else ()
        assert reserved == len(features)
        assert promised == reserved + sum(SYSTEMS[name].marks(module, *size) for size in sizes)


@among(lambda system: "score" in system.uses)
def test_a_pack_equals_its_samples(name: str, tmp_path: Path) -> None:
    """In every term but those that compare the samples of a pack."""
    module, pool = build(name).double(), SYSTEMS[name].pool(tmp_path, 6)
    total, packed = gradients(module, collate(module, pool), leave_out=module.in_batch_terms)
    apart = [collate(module, [sample], of=pool) for sample in pool]
    alone, single = gradients(module, *apart, leave_out=module.in_batch_terms)
    assert total == pytest.approx(alone, rel=1e-6)
    assert_close(packed, single, rtol=1e-12)


@among(lambda system: "embed" in system.uses)
def test_embeddings_do_not_depend_on_the_batch(name: str, tmp_path: Path) -> None:
    module, pool = build(name).double(), SYSTEMS[name].pool(tmp_path, 6)
    together, alone, few = (module.embed(pool, batch_size=size) for size in (6, 1, 4))
    for found in (alone, few):
        assert torch.equal(found.owner, together.owner)
        for kind in ("image", "text"):
            ours, theirs = getattr(found, kind), getattr(together, kind)
            assert (ours - theirs).abs().max() <= 1e-12
            torch.testing.assert_close(ours.norm(dim=-1), torch.ones_like(ours[..., 0]))
            assert (ours[0] - ours[1]).abs().max() > 1e-3
    if "match" in SYSTEMS[name].uses:
        first, second = together.image_state, together.text_state
        scores = torch.cat([module.match(first[i : i + 1], second[i : i + 1]) for i in range(len(pool))])
        assert (module.match(first, second) - scores).abs().max() <= 1e-12


@among(lambda system: system.mixes)
def test_packs_with_and_without_pictures_make_one_step(name: str, tmp_path: Path) -> None:
    """Two pictures in one sample, none in the next; packs without any reach every trained parameter all the same."""
    module, pool = build(name).double(), SYSTEMS[name].pool(tmp_path, 6)
    whole, expected = gradients(module, collate(module, pool))
    with_pictures, text_alone = ([s for s in pool if bool(s.images) is has] for has in (True, False))
    assert {len(sample.images) for sample in pool} == {0, 1, 2}
    packs = [collate(module, chosen, of=pool, packs=2) for chosen in (with_pictures, text_alone)]
    total, found = gradients(module, *packs)
    assert total == pytest.approx(whole, rel=1e-6)
    assert_close(found, expected, rtol=1e-12)
    for of in (pool, text_alone):  # a mixed step, and one without any picture
        loss, reached = gradients(module, collate(module, text_alone, of=of))
        assert 0 < loss < float("inf")
        assert all(gradient.isfinite().all() for gradient in reached.values())
        of_pictures = {n for n in reached if n.split(".")[0] not in SYSTEMS[name].text_parts}
        assert of_pictures
        assert [n for n in of_pictures if reached[n].any()] == []


# -- a step


STEPS = (
    range(8),
    (1, 4, 7),  # no picture anywhere; fewer samples than packs
    (0, 4),  # one rank has a picture, the other none
    (2,),
)
WHOLE = (range(8), (5, 2, 7, 0, 4, 1, 6, 3), range(7, -1, -1))
"""For systems that do not take these."""


def plan(name: str) -> Sequence[Sequence[int]]:
    return STEPS if SYSTEMS[name].mixes else WHOLE


def _run(folder: Path, name: str, accumulate: int) -> dict[str, Any]:
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    module, recorder = make(name), Recorder()
    train = {pattern: Trained(lr=1e-3) for pattern in SYSTEMS[name].last.train}
    # eps=1: AdamW's first step would otherwise be the sign of the gradient, where noise decides for small ones
    module.stage = Stage("test", train, optimizer=AdamW(eps=1.0), schedule=Schedule("constant"))
    run = trainer(
        folder,
        world=world,
        strategy="ddp" if world > 1 else "auto",
        accumulate_grad_batches=accumulate,
        precision="64-true",
        max_epochs=1,
        callbacks=[recorder],
    )
    system = SYSTEMS[name]
    run.fit(module, Planned(system.pool(folder, 8), plan(name), system.batch))
    assert run.global_step == len(plan(name))
    return {"losses": recorder.losses, "gradients": recorder.gradients, "weights": weights(module)}


def _assert_same_run(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
    assert len(ours["gradients"]) == len(ours["losses"]) == len(theirs["losses"])
    for found, expected in zip(ours["gradients"], theirs["gradients"], strict=True):
        assert_close(found, expected, rtol=1e-12)
    assert_close(ours["weights"], theirs["weights"], rtol=1e-12)


@EVERY
def test_a_step_is_the_same_however_it_is_split(name: str, tmp_path: Path) -> None:
    system = SYSTEMS[name]
    system.pool(tmp_path, 8)  # before the ranks would write the same files
    whole = _run(tmp_path, name, 1)
    assert any(gradient.abs().max() > 1e-3 for gradient in whole["gradients"][0].values())
    if system.batch.negatives is None:  # else it is published
        _assert_same_run(_run(tmp_path, name, 8), whole)
    for rank in run_ranks(_run, 2, tmp_path, name, 2 if system.batch.negatives is None else 1):
        _assert_same_run(rank, whole)


def _fit(folder: Path, out: Path, name: str, how: str, resume: Path | None = None) -> dict[str, Tensor]:
    """Every tensor after the steps of `WHOLE`; a checkpoint is left after each."""
    world, system = distributed.get_world_size() if distributed.is_initialized() else 1, SYSTEMS[name]
    module = make(name)
    checkpoints = ModelCheckpoint(out, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
    run = trainer(
        out,
        world=world,
        fsdp="32-true" if how == "fsdp" else None,
        max_epochs=1,
        enable_checkpointing=True,
        callbacks=[Health(every_n_steps=1), checkpoints],
        plugins=[AtomicCheckpointIO()],
        **({"strategy": "ddp"} if how == "ddp" else {}),
    )
    run.fit(module, Planned(system.pool(folder, 8), WHOLE, system.batch), ckpt_path=resume)
    assert run.global_step == len(WHOLE)
    return weights(module)


def _fit_and_resume(folder: Path, name: str, how: str) -> dict[str, Tensor]:
    whole = _fit(folder, folder / how, name, how)
    assert_equal(_fit(folder, folder / f"{how} again", name, how, folder / how / "step=1.ckpt"), whole)
    return whole


@among(lambda system: not system.mixes)
def test_sharded_and_resumed_steps_are_the_same(name: str, tmp_path: Path) -> None:
    """Of systems that compare samples or move tensors (tests/training/test_fsdp.py has the others)."""
    SYSTEMS[name].pool(tmp_path, 8)
    alone = _fit_and_resume(tmp_path, name, "one")
    for how in ("ddp", "fsdp"):
        first, second = run_ranks(_fit_and_resume, 2, tmp_path, name, how)
        assert_equal(first, second)
        for key, tensor in alone.items():
            torch.testing.assert_close(first[key], tensor, atol=5e-6, rtol=0, msg=key)


@EVERY
def test_exactly_the_published_tensors_change(name: str, tmp_path: Path) -> None:
    system = SYSTEMS[name]
    for stage in system.stages.values():
        module = build(name, stage.train)
        before, buffers = values(module), {n for n, _ in module.named_buffers()}
        transition = StageTransition("test", dict(stage.train), schedule=Schedule("constant"))
        accumulate = 2 if system.batch.negatives is None else 1
        watched = [transition, Health(every_n_steps=1)]
        run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=accumulate, callbacks=watched)
        run.fit(module, Planned(system.pool(tmp_path, 8), [range(8)] * 3, system.batch))
        after = values(module)
        changed = {n for n, tensor in before.items() if not torch.equal(after[n], tensor)}
        assert changed == stage.trained - stage.unreached | system.moving
        assert not changed & buffers - system.moving
        assert all(tensor.isfinite().all() for tensor in after.values())
        stored = json.loads((tmp_path / "artefact" / "stage.json").read_text())
        assert set(stored["trained"]) == stage.trained
        assert set(stored["tensors"]) == stage.trained | system.moving


def _fit_in_bf16(name: str, folder: Path) -> tuple[Any, Recorder]:
    """Two steps of a system's first stage, the one in which most is frozen."""
    system = SYSTEMS[name]
    stage, seen = next(iter(system.stages.values())), Recorder()
    module = make(name, stage.train)
    watched = [StageTransition("test", dict(stage.train), schedule=Schedule("constant")), Health(every_n_steps=1), seen]
    run = trainer(folder, max_epochs=1, precision="bf16-mixed", callbacks=watched)
    folder.mkdir()
    run.fit(module, Planned(system.pool(folder, 8), [range(8)] * 2, system.batch))
    return module, seen


@EVERY
def test_frozen_weights_in_half_precision_change_no_number(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What autocast rounds before each use is rounded once; the artefact opens in float32 over the same base."""
    module, seen = _fit_in_bf16(name, tmp_path / "half")
    with monkeypatch.context() as patch:
        patch.setattr("vlm.building.build.compute_dtype", lambda module: None)
        plain, other = _fit_in_bf16(name, tmp_path / "float32")
    assert seen.losses == other.losses
    for ours, theirs in zip(seen.gradients, other.gradients, strict=True):
        assert_equal(ours, theirs)
    halved = {n for n, tensor in module.named_parameters() if tensor.dtype is torch.bfloat16}
    layers = {f"{n}.weight" for n, child in module.named_modules() if type(child) in (nn.Linear, nn.Conv2d)}
    kept = module.trained_names() | moving_names(module) | {*module.ties, *module.ties.values()}
    assert layers - kept <= halved
    assert not halved & kept
    assert module.frozen_hashes == plain.frozen_hashes
    loaded, pool = vlm.load(tmp_path / "half" / "artefact"), SYSTEMS[name].pool(tmp_path, 3)
    assert_equal(
        {n: t for n, t in values(loaded).items() if n not in halved},
        {n: t for n, t in values(module).items() if n not in halved},
    )
    for n in halved:
        assert torch.equal(loaded.get_parameter(n).to(torch.bfloat16), module.get_parameter(n))
    if "generate" in SYSTEMS[name].uses:
        assert module.generate(pool[:1], decoding=Decoding(max_new_tokens=2))
    if name == "llava_1_5":
        opened = vlm.load(tmp_path / "half" / "artefact", as_trained=True)
        assert all(map(torch.equal, opened.score(pool), module.score(pool)))
    with pytest.raises(UserError, match="built under bf16-mixed"):
        trainer(tmp_path, max_epochs=1).validate(module, Planned(pool, [range(3)], SYSTEMS[name].batch))


# -- stages


@EVERY
def test_a_stage_starts_where_the_one_before_it_ended(name: str, tmp_path: Path) -> None:
    stages = list(SYSTEMS[name].stages.values())
    earlier = stages[0]
    batch, before, previous = None, None, ""
    for number, stage in enumerate([*stages, stages[-1]]):  # the last one goes on from itself, with all it has
        parts = dict(stage.parts) if number < len(stages) else {}
        module = make(name, stage.train)
        module.stage = Stage("test", dict(stage.train), follows=[InitFrom(previous, parts)] if previous else [])
        module.configure_model()
        batch = collate(module, SYSTEMS[name].pool(tmp_path, 6))
        with torch.no_grad():
            loss = {term: value.item() for term, value in module.losses(batch).items()}
        if before is not None:
            now = values(module)
            left = earlier.trained | SYSTEMS[name].moving
            inherited = [n for n in left if not parts or any(n.startswith(f"{part}.") for part in parts)]
            assert inherited
            assert_equal({n: now[n] for n in inherited}, {n: before["values"][n] for n in inherited})
            assert loss == pytest.approx(before["loss"], rel=1e-6)
        disturb(module, changing_names(module))
        previous = str(tmp_path / str(number))
        write_stage(Path(previous), module, global_step=1)
        with torch.no_grad():
            loss = {term: value.item() for term, value in module.losses(batch).items()}
        before, earlier = {"values": values(module), "loss": loss}, stage


@EVERY
def test_artefact_round_trip_of_every_trained_set(name: str, tmp_path: Path) -> None:
    """The surgery is replayed by whoever opens it."""
    system, fresh = SYSTEMS[name], build(name)
    pool, moved = system.pool(tmp_path, 6), {tensor.split(".")[0] for tensor in system.moving}
    parts = [part for part, _ in fresh.named_children() if part not in moved]
    # for any two parts: both trained, both frozen, one trained
    for number, chosen in enumerate([*((part,) for part in parts), tuple(parts)]):
        module = build(name, dict.fromkeys(chosen, RATE))
        disturb(module, changing_names(module))
        folder = tmp_path / str(number)
        write_stage(folder, module, global_step=1)
        loaded = vlm.load(folder)
        assert_equal(values(loaded), values(module))
        assert not any(child.training for child in loaded.modules())
        batch = collate(module, pool)
        with torch.no_grad():
            assert_same_scores(outputs(name, loaded, batch), outputs(name, module, batch))
        stored = json.loads((folder / "stage.json").read_text())
        assert {tensor.split(".")[0] for tensor in stored["tensors"]} == {*chosen} | moved
        assert stored["surgery"] == describe(list(system.surgery))
        assert loaded.surgery == list(system.surgery)


@EVERY
def test_state_dict_round_trip(name: str) -> None:
    """Of the checkpoint of a run: what was trained, over what was built."""
    module, other = build(name), build(name)
    disturb(module, changing_names(module))
    checkpoint = {"state_dict": dict(module.state_dict())}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == SYSTEMS[name].last.trained | SYSTEMS[name].moving
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    assert_equal(values(other), values(module))
    del checkpoint["state_dict"][min(checkpoint["state_dict"])]
    with pytest.raises(UserError, match="train different tensors"):
        other.load_state_dict(checkpoint["state_dict"])


def trained_parts(name: str) -> list[str]:
    """In the order of the network."""
    trained = {tensor.split(".")[0] for tensor in SYSTEMS[name].last.trained}
    return [part for part, _ in build(name).named_children() if part in trained]


@EVERY
def test_changed_base_weights_are_refused(name: str, tmp_path: Path) -> None:
    part, base = SYSTEMS[name].base_weights(build(name), tmp_path / "base")
    other = next(other for other in trained_parts(name) if other != part)
    module = build(name, {other: RATE}, seed=5, **{part: base})
    if not module.surgery:
        assert_equal(values(module.get_submodule(part)), values(build(name).get_submodule(part)))
    write_stage(tmp_path / "artefact", module, global_step=1)
    assert_equal(values(vlm.load(tmp_path / "artefact")), values(module))
    SYSTEMS[name].base_weights(build(name, seed=6), tmp_path / "base")
    with pytest.raises(UserError, match=rf"{part} was frozen at .*base.* differs"):
        vlm.load(tmp_path / "artefact")


@EVERY
def test_artefacts_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    module = build(name)
    part = trained_parts(name)[0]
    another = next(child for child, _ in module.named_children() if child != part)
    write_stage(tmp_path / "artefact", module, global_step=1)

    def follow(folder: str, parts: dict[str, str]) -> None:
        stage = Stage("next", {part: RATE}, follows=[InitFrom(str(tmp_path / folder), parts)])
        later = make(name)
        later.stage = stage
        later.configure_model()

    with pytest.raises(UserError, match="no such folder"):
        follow("missing", {})
    with pytest.raises(UserError, match=r"no place in the network|has shape"):
        follow("artefact", {another: part})
    with pytest.raises(UserError, match="holds nothing of 'projector'"):
        follow("artefact", {part: "projector"})


# -- use


def _dropout(module: Any, _: Any, output: Tensor) -> Tensor:
    return F.dropout(output, 0.5, module.training)


@among(lambda system: "generate" in system.uses)
@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(max_new_tokens=6),
        Decoding(max_new_tokens=6, num_beams=3),
        Decoding(max_new_tokens=6, temperature=1.0, top_p=0.9, seed=1),
    ],
    ids=["greedy", "beams", "sampled"],
)
def test_answers_do_not_depend_on_the_batch(name: str, decoding: Decoding, tmp_path: Path) -> None:
    system = SYSTEMS[name]
    module, asked = build(name), system.asked(tmp_path)
    disturb(module, module.trained_names())
    lengths = [module.codec.encode(sample, generate=True).num_tokens for sample in asked]
    assert max(lengths) > 5 * min(lengths)
    # texts can be compared: the best two tokens lie 4e-4 apart and more, noise of 1e-5 on every score changes no answer
    # of any search, and that of processors and batches is 5e-6
    alone = [module.generate([sample], decoding=decoding)[0] for sample in asked]
    assert len(set(alone)) >= system.num_answers
    assert module.generate(asked, decoding=decoding) == alone
    assert module.generate(asked[::-1], decoding=decoding, batch_size=3) == alone[::-1]


@EVERY
def test_use_leaves_no_trace(name: str, tmp_path: Path) -> None:
    """Modes, attention implementation and random numbers; and dropout never reaches an answer."""
    module, system = build(name), SYSTEMS[name]
    asked = system.asked(tmp_path) if "generate" in system.uses else system.pool(tmp_path, 4)
    uses = [getattr(module, use) for use in system.uses if use != "match"]
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Embedding, nn.Conv2d))]
    for layer in layers:
        layer.register_forward_hook(_dropout)
    module.eval()
    expected = [use(asked) for use in uses]
    for number, child in enumerate(module.modules()):
        child.training = number % 3 != 0
    for layer in layers:
        layer.training = True
    modes = [child.training for child in module.modules()]
    attention, state = _attention(module), torch.get_rng_state()
    for found, before in zip([use(asked) for use in uses], expected, strict=True):
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(found, before, strict=True))
    assert [child.training for child in module.modules()] == modes
    assert _attention(module) == attention
    assert torch.equal(torch.get_rng_state(), state)


def _attention(module: Any) -> list[str]:
    configs = (getattr(child, "config", None) for child in module.modules())
    return [config._attn_implementation for config in configs if hasattr(config, "_attn_implementation")]


@among(lambda system: "score" in system.uses)
def test_scores_are_the_log_probabilities_of_a_plain_forward(name: str, tmp_path: Path) -> None:
    module, pool, reference = build(name), SYSTEMS[name].pool(tmp_path, 6), SYSTEMS[name].reference
    assert reference is not None
    disturb(module, module.trained_names())
    scores = module.score(pool, batch_size=4)
    for sample, found in zip(pool, scores, strict=True):
        torch.testing.assert_close(found, reference(module, sample), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        loss = module.losses(collate(module, pool))["lm"]
    assert -torch.cat(scores).sum().item() == pytest.approx(loss.item(), rel=1e-6)
    assert loss > 0
    assert parameters_to_vector(module.parameters()).isfinite().all()
