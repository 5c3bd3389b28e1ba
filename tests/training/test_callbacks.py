"""What a run shows and when it stops: every failure is provoked in a small training."""

import html
import io
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageColor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, distributed

from callbacks import Health, LogCadence, Predictions, Progress, ResumeCheckpoint, ThroughputMonitor
from callbacks.progress import wrapped
from tests.support.ranks import run_ranks
from tests.support.samples import samples
from tests.support.systems import LLAMA, SYSTEMS, TOKENIZER, llava_1_5
from tests.commands.test_cli import World
from tests.support.training import ListSource, Recorder, packs, trainer
from vlm.batch import IGNORE, Batch, TokenSequence, next_token_targets
from vlm.data import BatchSpec, InstructionData
from vlm.errors import UserError
from vlm.language import CausalLM
from vlm.module import VisionLanguageModule
from vlm.drawing.panels import TRAINED_PAPER, WIDTH, Panel, Piece, draw, pieces_of
from vlm.prompts.regions import REGION_FORMS, find_boxes
from vlm.stages import Stage, Trained
from vlm.systems import LLaVA15

STEPS = (((0, 3), (2,)), ((1,), (4,)), ((0,), (2, 5)), ((3,), (1, 4)), ((2,), (0,)), ((5,), (3,)))
"""Two packs to a step; the second step has no picture."""


class CutOff(LLaVA15):
    """Whose pictures reach the language model without a way back."""

    def image_features(self, batch: Batch) -> Tensor:
        return super().image_features(batch).detach()


class Do(L.Callback):
    """Does something to the module before the micro-batches of one step, or after each backward pass."""

    def __init__(self, action: Callable[[Any], None], *, step: int = 3, hook: str = "on_train_batch_start") -> None:
        def act(trainer: L.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step + 1 == step:
                with torch.no_grad():
                    action(module)

        setattr(self, hook, act)


def _made(make: Callable[..., VisionLanguageModule] = llava_1_5, **changes: Any) -> VisionLanguageModule:
    module = make(**changes)
    module.stage = Stage("test", {part: Trained(lr=1e-2) for part in ("connector", "language")})
    return module


def _fit(folder: Path, module: VisionLanguageModule, *callbacks: L.Callback, steps: Any = STEPS, **options: Any) -> Any:
    world, rank = (distributed.get_world_size(), distributed.get_rank()) if distributed.is_initialized() else (1, 0)
    run = trainer(
        folder,
        world=world,
        callbacks=list(callbacks),
        accumulate_grad_batches=2 // world,
        **({"max_epochs": 1} | options),
    )
    run.fit(module, packs(module, folder, steps, world=world, rank=rank))
    return run


# -- health


def _cut_off() -> VisionLanguageModule:
    return CutOff(**llava_1_5().arguments)


def _poison_weights(module: Any) -> None:
    module.connector[0].weight.fill_(torch.nan)


def _poison_gradient(module: Any) -> None:
    module.connector[0].weight.grad.fill_(torch.inf)


@pytest.mark.parametrize("every", [1, 4])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, every: int) -> None:
    with pytest.raises(UserError) as caught:
        _fit(tmp_path, _made(), Do(_poison_weights), Health(every_n_steps=every))
    line = str(caught.value)
    file = tmp_path / "health" / "step=3.json"
    assert "\n" not in line
    assert line.startswith("step 3: loss term 'lm' not finite; sample ids '0', '2', '5'; ")
    assert str(file) in line
    dump = json.loads(file.read_text())
    assert [[sample["id"] for sample in pack["samples"]] for pack in dump["packs"]] == [["0"], ["2", "5"]]
    assert {pack["losses"]["lm"] for pack in dump["packs"]} == {"nan"}
    module = _made()
    lengths = {s.id: module.codec.encode(s).num_tokens for s in samples(tmp_path)}
    assert all(sample["tokens"] == lengths[sample["id"]] for pack in dump["packs"] for sample in pack["samples"])


def test_the_first_pack_that_fails_is_named(tmp_path: Path) -> None:
    module = _made()
    data = packs(module, tmp_path, STEPS)
    pack = data.dataset[5]  # the second micro-batch of step 3
    data.dataset[5] = replace(pack, text=replace(pack.text, weights=torch.full_like(pack.text.weights, torch.inf)))
    run = trainer(tmp_path, callbacks=[Health()], max_epochs=1, accumulate_grad_batches=2)
    with pytest.raises(UserError, match="step 3: loss term 'lm' not finite; sample ids '2', '5'; "):
        run.fit(module, data)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 3: gradient of connector not finite; sample ids '0', '2', '5'; "):
        _fit(tmp_path, _made(), Do(_poison_gradient, hook="on_after_backward"), Health(every_n_steps=3))
    assert (tmp_path / "health" / "step=3.json").exists()


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    """Between two looks, and although the loss of the step was finite."""
    rogue = Do(_poison_gradient, hook="on_after_backward")
    checkpoints = ResumeCheckpoint(every_n_train_steps=1)
    with pytest.raises(UserError, match=r"step 3: weights of connector not finite; sample ids '0', '2', '5'; "):
        _fit(tmp_path, _made(), rogue, Health(every_n_steps=100), checkpoints, enable_checkpointing=True)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step=*")] == ["step=2.ckpt"]


def test_a_part_that_the_loss_does_not_depend_on_stops_the_run(tmp_path: Path) -> None:
    health = Health(every_n_steps=1, patience=2)
    with pytest.raises(UserError, match="steps 1 to 3: the gradient of 'connector', which the stage trains, is exactl"):
        _fit(tmp_path, _made(_cut_off), health)
    _fit(tmp_path, _made(_cut_off), Health(every_n_steps=1, patience=0))
    text_only = (((1,), (4,)),) * 5
    _fit(tmp_path, _made(_cut_off), health, steps=text_only)
    _fit(tmp_path, _made(), health)


def _write(module: Any) -> None:
    module.vision.trunk.blocks[1].mlp.fc1.weight[0, 0] += 1e-3


def _swap(module: Any) -> None:
    weight = module.vision.trunk.blocks[0].attn.qkv.weight
    weight.copy_(weight.roll(1, 0))  # the same bits in another order


@pytest.mark.parametrize(("action", "name"), [(_write, "blocks.1.mlp.fc1.weight"), (_swap, "blocks.0.attn.qkv.weight")])
def test_a_frozen_tensor_that_moves_is_found(tmp_path: Path, action: Any, name: str) -> None:
    with pytest.raises(UserError) as caught:
        _fit(tmp_path, _made(), Do(action), Health(num_frozen=1))
    assert str(caught.value).startswith(f"step 6: frozen tensors have changed: vision.trunk.{name}; ")
    if action is _write:
        with pytest.raises(UserError, match="step 3: frozen tensors have changed"):
            _fit(tmp_path, _made(), Do(action), Health(every_n_steps=1, num_frozen=1000))


def test_packs_without_labels_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def bare(batch: Batch) -> Batch:
        empty = {name: getattr(batch.text, name)[:0] for name in ("label_positions", "targets", "weights")}
        return replace(batch, text=replace(batch.text, **empty))

    module = _made()
    data = packs(module, tmp_path, STEPS)
    for index in (3, 5, 7, 9, 11):
        data.dataset[index] = bare(data.dataset[index])
    trainer(tmp_path, callbacks=[Health(patience=3)], max_epochs=1, accumulate_grad_batches=2).fit(module, data)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vlm: warning")]
    assert len(lines) == 1
    assert "rank 0: packs without any label in 3 steps up to step 4" in lines[0]


def test_the_first_steps_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder()
    module = _made()
    _fit(tmp_path, module, recorder, Health(every_n_steps=4))
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("health: ")]
    assert line.startswith(
        f"health: steps 1 to 4 are sound: loss lm {recorder.losses[0]:.4g} -> {recorder.losses[3]:.4g}; "
        f"gradient norms connector {_norm(recorder.gradients[3], 'connector'):.3g}, "
    )
    seen = [module.codec.encode(samples(tmp_path)[i]) for step in STEPS[:4] for pack in step for i in pack]
    assert f"{sum(item.num_tokens for item in seen):,} tokens" in line
    assert f"{sum(len(item.sample.images) for item in seen)} pictures" in line


def _norm(gradients: dict[str, Tensor], part: str) -> float:
    squares = [g.double().square().sum() for name, g in gradients.items() if part in ("", name.split(".")[0])]
    return torch.stack(squares).sum().sqrt().item()


# -- throughput


def _scalars(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def _measured(folder: Path, run: str, fsdp: str | None, **options: Any) -> list[dict[str, Tensor]]:
    recorder = Recorder()
    _fit(
        folder,
        _made(),
        recorder,
        ThroughputMonitor(),
        Health(every_n_steps=2),
        fsdp=fsdp,
        logger=TensorBoardLogger(folder, name="", version=run),
        log_every_n_steps=2,
        gradient_clip_val=1e-3,
        **options,
    )
    return recorder.gradients


def _check_scalars(found: dict[str, dict[int, float]], gradients: list[dict[str, Tensor]]) -> None:
    for part in ("connector", "language", "total"):
        expected = {step: _norm(gradients[step], "" if part == "total" else part) for step in (1, 3, 5)}
        assert found[f"grad_norm/{part}"] == pytest.approx(expected, rel=2e-4)  # float32 sums: 6e-5 measured
    for part in ("connector", "language"):
        assert found[f"lr/{part}"] == {
            step: pytest.approx(Stage("", {}).schedule.factor(step, 6) * 1e-2, rel=1e-6) for step in (1, 3, 5)
        }
    assert "grad_norm/vision" not in found
    for name in ("tokens_per_s", "label_tokens_per_s", "images_per_s", "steps_per_s", "data_wait"):
        assert list(found[f"speed/{name}"]) == [1, 3, 5]
    assert found["train/loss"].keys() == found["speed/tokens_per_s"].keys()


def test_speed_rates_and_norms(tmp_path: Path) -> None:
    """Of two micro-batches in one process, and of one in each of two, with whole gradients and with sharded ones."""
    one = _measured(tmp_path, "one", None)
    _check_scalars(_scalars(tmp_path / "one"), one)
    copied = run_ranks(_measured, 2, tmp_path, "ddp", None, strategy="ddp")[0]
    _check_scalars(_scalars(tmp_path / "ddp"), copied)
    sharded = run_ranks(_measured, 2, tmp_path, "sharded", "32-true")[0]
    found = _scalars(tmp_path / "sharded")
    _check_scalars(found, sharded)
    _check_counts(tmp_path, found)
    _check_counts(tmp_path, _scalars(tmp_path / "one"))


def _check_counts(folder: Path, found: dict[str, dict[int, float]]) -> None:
    codec = _made().codec
    for step in (3, 5):
        seen = [codec.encode(samples(folder)[i]) for s in (step - 1, step) for pack in STEPS[s] for i in pack]
        seconds = 2 / found["speed/steps_per_s"][step]
        for name, total in {
            "tokens": sum(item.num_tokens for item in seen),
            "label_tokens": sum(item.counts["lm"] for item in seen),
            "images": sum(len(item.sample.images) for item in seen),
        }.items():
            assert found[f"speed/{name}_per_s"][step] * seconds == pytest.approx(total, rel=1e-4)


def test_the_wait_for_data_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _made()
    data = InstructionData([ListSource(samples(tmp_path))], batch=BatchSpec(1))
    real, clock, late = type(module.codec).encode, time.perf_counter, 0.0

    def slow(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal late
        late += 1000  # seconds that cost none, and beside which those of any machine are few
        return real(self, *args, **options)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late)
    monkeypatch.setattr(type(module.codec), "encode", slow)
    logger = TensorBoardLogger(tmp_path, name="", version="slow")
    run = trainer(tmp_path, callbacks=[ThroughputMonitor()], max_steps=4, logger=logger, log_every_n_steps=4)
    run.fit(module, datamodule=data)
    assert 0.9 < _scalars(tmp_path / "slow")["speed/data_wait"][3] < 1


# -- predictions


def _predict(folder: Path, run: str, fsdp: str | None, *, validated: bool = True, **options: Any) -> None:
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    module = _made()
    source = ListSource(samples(folder))
    data = InstructionData([source], val_sources=[source] if validated else [], batch=BatchSpec(2))
    fit = trainer(
        folder,
        world=world,
        fsdp=fsdp,
        callbacks=[Predictions(num_samples=3, max_new_tokens=5, every_n_steps=2)],
        logger=TensorBoardLogger(folder, name="", version=run),
        num_sanity_val_steps=1,
        max_steps=3,
        **options,
    )
    fit.fit(module, datamodule=data)


def _images(folder: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    for tag in events.Tags()["images"]:
        for event in events.Images(tag):
            assert event.width == WIDTH
    texts = events.Tags()["tensors"]
    assert all("Prediction" in str(events.Tensors(tag)[0].tensor_proto.string_val[0]) for tag in texts)
    assert len(texts) == len(events.Tags()["images"])
    return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


def test_panels_under_any_strategy(tmp_path: Path) -> None:
    samples(tmp_path)
    _predict(tmp_path, "one", None)
    shown = {f"predictions/{i}": [0, 2] for i in range(3)}
    assert _images(tmp_path / "one") == shown
    run_ranks(_predict, 2, tmp_path, "sharded", "32-true")
    assert _images(tmp_path / "sharded") == shown
    run_ranks(_predict, 2, tmp_path, "ddp", None, strategy="ddp")
    assert _images(tmp_path / "ddp") == shown
    _predict(tmp_path, "train", None, validated=False)
    assert _images(tmp_path / "train") == {name: [0, 1, 2] for name in shown}


def test_panels_leave_training_as_it_is(tmp_path: Path) -> None:
    def losses(*callbacks: L.Callback) -> list[float]:
        recorder = Recorder()
        module = _made(language=CausalLM(config=LLAMA | {"attention_dropout": 0.2}))
        source = ListSource(samples(tmp_path))
        data = InstructionData([source], val_sources=[source], batch=BatchSpec(2))
        run = trainer(
            tmp_path,
            callbacks=[recorder, *callbacks],
            logger=TensorBoardLogger(tmp_path, name="", version=str(len(callbacks))),
            max_epochs=2,
            val_check_interval=1,
            log_every_n_steps=1,
        )
        run.fit(module, datamodule=data)
        return recorder.losses

    assert losses() == losses(Predictions(max_new_tokens=3), Health(every_n_steps=1), ThroughputMonitor())


def test_every_system_can_be_shown(tmp_path: Path) -> None:
    for name, system in SYSTEMS.items():
        if "generate" not in system.uses or name == "blip_nlvr":  # its judgement is no text that is trained
            continue
        module = system.make()
        data = InstructionData([ListSource(system.pool(tmp_path, 6))], batch=BatchSpec(2))
        shown = Predictions()._choose(data, module)
        assert len(shown) == 4, name
        for item in shown:
            encoded = module.codec.encode(item.sample)
            sequences = [*encoded.text, *(s for row in encoded.rows.values() for s in row)]
            labels = [s.targets[s.targets != IGNORE].tolist() for s in sequences]
            green = "".join(piece.text for piece in item.pieces if piece.trained)
            said = "".join(module.codec.tokenizer.decode(ids, skip_special=False) for ids in labels if ids)
            assert green.replace(" ", "") == said.replace(" ", "") != "", name


# -- progress


def test_a_log_file_gets_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder()
    _fit(tmp_path, _made(), recorder, Progress(), log_every_n_steps=3, enable_progress_bar=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("test: ")]
    for line, step in zip(lines, (3, 6), strict=True):
        assert line.startswith(f"test: step {step} of 6, loss {recorder.losses[step - 1]:.4g}, "), line
        assert re.search(r"\d steps/s, \d\d:\d\d left$", line)


@pytest.mark.parametrize(
    ("options", "logged"), [((), range(20)), (("--trainer.log_every_n_steps=7",), (6, 13, 19))], ids=["own", "set"]
)
def test_a_short_run_shows_how_it_goes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: tuple[str, ...], logged: Sequence[int]
) -> None:
    """Every one of 20 steps, or those that the user wants and the last; what validation found; how far a test is."""
    world = World(tmp_path)
    source = {"path": str(tmp_path / "data.json"), "image_root": str(tmp_path)}
    sources = json.dumps([{"class_path": "vlm.data.LlavaJson", "init_args": source}])
    shown = ["--trainer.enable_progress_bar=true", "--trainer.logger=true", "--predictions.enabled=false"]
    rates = '{"connector": {"lr": 0.01}, "language.lm_head": {"lr": 0.02}, "language.model": {"lr": 0.03}}'
    training = [f"--data.init_args.val_sources={sources}", "--trainer.max_epochs=10", f"--stage.train={rates}"]
    assert world.fit(*shown, *training, *options) == 0
    out = capfd.readouterr().out
    scalars = _scalars(world.run / "tensorboard")
    for name in ("train/loss", "grad_norm/total", "lr/connector", "lr/language.lm_head", "lr/language.model"):
        assert list(scalars[name]) == list(logged), name
    assert list(scalars["speed/steps_per_s"]) == [step for step in logged if step > 0]  # the first one does not count
    highest = {
        name: max(scalars[f"lr/{name}"].values()) for name in ("connector", "language.lm_head", "language.model")
    }
    assert sorted(highest, key=highest.__getitem__) == ["connector", "language.lm_head", "language.model"]
    assert not {"train/lm", "val/lm"} & scalars.keys()
    assert "steps 1 to 20 of 20, all done" in (world.run / "report.md").read_text()
    lines = [line for line in out.splitlines() if line.startswith("1_align: ")]
    told = [int(re.match(r"1_align: step (\d+) of 20, ", line)[1]) - 1 for line in lines if ": step" in line]
    assert told == list(logged)
    loss, norm = (scalars[name][19] for name in ("train/loss", "grad_norm/total"))
    assert f"step 20 of 20, loss {loss:.4g}, lr " in out
    assert f", norm {norm:.4g}, val loss " in next(line for line in lines if "step 20 of 20" in line)
    assert f"1_align: validation after step 20: loss {scalars['val/loss'][19]:.4g}\n" in out
    if options:
        return
    world.command = "test"
    asked = [f"--data.init_args.test_sources={sources}", "--data.init_args.val_batch_size=2"]
    assert world.fit(*shown, *asked, f"--weights={world.run}") == 0
    found = re.findall(r"^test: batch (\d) of 3, \d\d:\d\d left$", capfd.readouterr().out, re.M)
    assert found == ["1", "2", "3"]


def test_a_stage_that_a_validation_ends_has_its_last_step_in_the_log(tmp_path: Path) -> None:
    module = _made()
    source = ListSource(samples(tmp_path))
    data = InstructionData([source], val_sources=[source], batch=BatchSpec(2))
    logger = TensorBoardLogger(tmp_path, name="", version="ended")
    never = L.pytorch.callbacks.EarlyStopping("val/loss", patience=1, min_delta=1e9)
    run = trainer(
        tmp_path, callbacks=[LogCadence(adapt=False), ThroughputMonitor(), never], logger=logger, max_epochs=9
    )
    run.fit(module, datamodule=data)
    assert run.global_step == 6  # two epochs of three steps
    assert list(_scalars(tmp_path / "ended")["train/loss"]) == [5]


def test_lines_fit_a_terminal() -> None:
    table = "  part   12\n  other   3"
    assert wrapped(table, width=60) == table
    line = "  new: " + ", ".join(f"connector.{i}.weight" for i in range(12))
    lines = wrapped(line, width=80).split("\n")
    assert max(map(len, lines)) <= 80
    assert [part.startswith(" " * 6) for part in lines] == [False] + [True] * (len(lines) - 1)
    assert " ".join(lines).split() == line.split()


def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    recorder = Recorder()
    _fit(tmp_path, _made(), recorder, Progress(), enable_progress_bar=True, log_every_n_steps=1)
    last = re.split(r"[\r\n]+", terminal.getvalue().strip())[-1]
    assert "100%" in last
    assert "6/6" in last
    assert last.endswith(f"loss {recorder.losses[-1]:.4g}")


# -- the drawing


def test_pieces_show_what_is_trained() -> None:
    ids, offsets = TOKENIZER.encode("Who? 你好 It is 𝄞 me</s>")
    labels = [-100 if end <= 5 else token for token, (_, end) in zip(ids, offsets, strict=True)]
    ids, labels = [1, 0, 0, 0, *ids], [-100] * 4 + labels
    sequence = TokenSequence(
        torch.tensor(ids), next_token_targets(torch.tensor(labels)), slots={"image": torch.tensor([1, 2, 3])}
    )
    pieces = pieces_of(sequence, TOKENIZER.decode)
    assert [piece.text for piece in pieces[:2]] == ["<s>", "3 image tokens"]
    text = "".join(piece.text for piece in pieces if not piece.is_mark)
    assert text.replace(" ", "") == "<s>Who?你好Itis𝄞me</s>"
    trained = "".join(piece.text for piece in pieces if piece.trained)
    assert trained.replace(" ", "") == "你好Itis𝄞me</s>"


def test_what_is_trained_is_green() -> None:
    def green(*trained: bool) -> int:
        pieces = [Piece("word ", is_trained) for is_trained in trained]
        return _count(draw(Panel("t", [], "p", "t", "p", pieces)), TRAINED_PAPER)

    one = green(False, True, False)
    assert green(False, False, False) == 0
    assert one > 100
    assert green(True, True, True) > 2 * one


def test_pictures_are_shown_as_the_tower_gets_them(tmp_path: Path) -> None:
    module = _made()
    data = InstructionData([ListSource(samples(tmp_path))], batch=BatchSpec(2))
    chosen = Predictions(num_samples=6)._choose(data, module)
    assert sum(len(shown.pictures) for shown in chosen) > 2
    for shown in chosen:
        expected = [module.codec.transform.square(file.read(shown.sample)) for file in shown.sample.images]
        assert [seen.tobytes() for seen in shown.pictures] == [picture.tobytes() for picture in expected]


def test_texts_stand_for_themselves_in_markdown() -> None:
    import markdown

    text = "<b>&amp; *a* _b_ `c` [d](e) | \\ $1\n    # 1. x  y\n\n- 你好"
    shown = markdown.markdown(Panel("", [], text, "t").markdown(), extensions=["tables", "fenced_code"])
    quoted = shown.split("<blockquote>")[1].split("</blockquote>")[0]
    plain = re.sub(r"<br ?/?>\n?|</p>\s*<p>", "\n", quoted).replace("<p>", "").replace("</p>", "")
    assert "<" not in plain
    assert html.unescape(plain).strip().split() == text.split()


def _count(picture: Image.Image, color: str) -> int:
    return int((np.asarray(picture) == ImageColor.getrgb(color)).all(-1).sum())


def test_boxes_are_drawn_in_the_colour_of_their_text() -> None:
    picture = Image.new("RGB", (100, 100), "white")
    texts = {"prompt": "p", "target": "t", "prediction": "a"}
    find = partial(find_boxes, form=REGION_FORMS["llava"])
    for text, color in zip(texts, ("#1b4b91", "#1a7f37", "#d4570a"), strict=True):
        plain, boxed = (
            draw(Panel("", [picture], **(texts | {text: said}), find_boxes=find)).crop((0, 0, 310, 310))
            for said in ("none", "[0.2, 0.2, 0.8, 0.8]")
        )
        assert _count(plain, color) == 0
        assert _count(boxed, color) > 4 * 3 * 0.55 * 288


def test_panels_of_any_content_can_be_drawn() -> None:
    thin = Image.new("L", (3, 4000))
    panel = Panel("t" * 500, [thin] * 5, "word " * 2000 + "x" * 3000, "", "", [])
    assert draw(panel).width == WIDTH
    assert draw(Panel("", [], "", "", None)).height < 300


# -- the command line


def test_they_can_be_switched_off(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path)
    options = ["--health.every_n_steps=2", "--trainer.log_every_n_steps=1", "--trainer.logger=true"]
    assert world.fit(*options) == 0
    out = capfd.readouterr().out
    assert "health: steps 1 to 2 are sound" in out
    assert re.search(r"\n  [1-9]\d* samples, \d+ samples a step, \d+ tokens a picture\n", out)
    assert {"lr/connector", "grad_norm/connector"} <= _scalars(world.run / "tensorboard").keys()
    assert len(_images(world.run / "tensorboard")) == 4
    world.run = tmp_path / "off"
    off = [f"--{name}.enabled=false" for name in ("health", "throughput", "predictions")]
    assert world.fit(*options, *off) == 0
    assert "health:" not in capfd.readouterr().out
    assert not any("/" in name and name.split("/")[0] != "train" for name in _scalars(world.run / "tensorboard"))
    assert _images(world.run / "tensorboard") == {}
    world.run = tmp_path / "bad"
    assert world.fit("--health.every_n_steps=0") == 2
    assert "health.every_n_steps must be at least 1" in capfd.readouterr().err
