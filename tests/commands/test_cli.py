"""The command line: what a person does wrong ends in one line that names file, key or sample and the remedy."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import cli
import vlm
from callbacks import StageTransition
from callbacks.stop_signals import StopSignals
from tests.conftest import GOLDEN
from tests.support.systems import LLAMA, TOWER
from vlm.checkpoints.published.open import find_weights
from vlm.recipes.run_folder import RunFolder

CONFIGS = Path(__file__).parents[2] / "configs" / "llava_1_5"


class World:
    """A folder with pictures, records and an overlay, and the command that trains on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        for i in range(6):
            Image.new("RGB", (30 + i, 40), (40 * i, 0, 0)).save(folder / f"{i}.png")
        self.records: Any = [
            {
                "id": f"s{i}",
                "image": f"{i}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": f"a picture of shade {i}"},
                ],
            }
            for i in range(6)
        ]
        self.text: str | None = None
        self.options: list[str] = []
        self.command, self.stage = "fit", "1_align"
        self.other_process: RunFolder | None = None

    def fit(self, *options: str) -> int:
        data = self.folder / "data.json"
        data.write_text(self.text if self.text is not None else json.dumps(self.records))
        source = {"class_path": "vlm.data.LlavaJson", "init_args": {"path": str(data), "image_root": str(self.folder)}}
        overlay = {
            "model": {
                "init_args": {
                    "vision": {"init_args": {"weights": None, "options": TOWER}},
                    "language": {"init_args": {"path": None, "config": LLAMA, "checkpointing": False}},
                    "tokenizer": {"init_args": {"path": str(GOLDEN / "_shared" / "llama_sp_tokenizer.model")}},
                }
            },
            "data": {
                "init_args": {"sources": [source], "batch": {"size": 3}, "micro_batch_size": None, "num_workers": 0}
            },
            "trainer": {
                "precision": "32-true",
                "accelerator": "cpu",
                "default_root_dir": str(self.run),
                "logger": False,
                "enable_progress_bar": False,
            },
        }
        (self.folder / "overlay.yaml").write_text(yaml.safe_dump(overlay))
        files = [CONFIGS / "model.yaml", CONFIGS / f"{self.stage}.yaml", self.folder / "overlay.yaml"]
        return cli.main([self.command, *(f"--config={file}" for file in files), *self.options, *options])


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def _turn(world: World, index: int, **changes: str) -> None:
    world.records[2]["conversations"][index] |= changes


def _truncated(world: World) -> None:
    Image.effect_noise((300, 300), 50).convert("RGB").save(world.folder / "2.png")
    data = (world.folder / "2.png").read_bytes()
    (world.folder / "2.png").write_bytes(data[: len(data) // 2])


def _huge(world: World) -> None:
    Image.new("1", (20000, 20000)).save(world.folder / "2.png")


def _second_start(world: World) -> None:
    world.other_process = RunFolder(world.run)
    world.other_process.lock()


BAD: dict[str, tuple[Any, list[str]]] = {
    "missing image": (lambda w: (w.folder / "2.png").unlink(), ["data.json", "'s2'", "2.png", "does not exist"]),
    "truncated image": (_truncated, ["data.json", "'s2'", "2.png", "cannot be decoded", "replace or remove"]),
    "huge image": (_huge, ["data.json", "'s2'", "2.png", "shrink"]),
    "not an image": (lambda w: (w.folder / "2.png").write_text("hello"), ["'s2'", "2.png", "not a readable picture"]),
    "outside the root": (lambda w: w.records[2].update(image="../x.png"), ["'s2'", "../x.png", "image_root"]),
    "broken JSON": (lambda w: setattr(w, "text", '[{"id": 1,, }]'), ["data.json", "line 1"]),
    "not a list": (lambda w: setattr(w, "text", '{"a": 1}'), ["data.json"]),
    "no records": (lambda w: setattr(w, "text", "[]"), ["data.json"]),
    "no conversation": (lambda w: w.records[2].pop("conversations"), ["data.json", "'s2'", "conversations"]),
    "unknown role": (lambda w: _turn(w, 0, **{"from": "robot"}), ["'s2'", "robot", "human"]),
    "marks and images": (lambda w: _turn(w, 0, value="no mark"), ["'s2'", "0 image marks", "1 images"]),
    "empty answer": (lambda w: _turn(w, 1, value=" "), ["'s2'", "empty"]),
    "over the limit": (lambda w: _turn(w, 1, value="a b " * 2000), ["'s2'", "limit of 2048", "max_tokens"]),
    "unknown config key": (
        lambda w: w.options.append("--model.init_args.tokeniser=x"),
        ["tokeniser", "did you mean tokenizer?"],
    ),
    "unknown option": (lambda w: w.options.append("--trainer.max_stepz=3"), ["max_stepz", "did you mean max_steps?"]),
    "unknown template": (lambda w: w.options.append("--model.init_args.template=v9"), ["v9", "vicuna_v1"]),
    "pattern that matches nothing": (
        lambda w: w.options.append('--stage.train={"conector": {"lr": 1}}'),
        ["conector", "connector, language, vision"],
    ),
    "missing artefact": (
        lambda w: w.options.append('--stage.follows=[{"artefact": "nowhere/artefact", "parts": {"connector": "x"}}]'),
        ["nowhere/artefact", "run the stage before it"],
    ),
    "missing base weights": (
        lambda w: w.options.append("--model.init_args.vision.init_args.weights=nowhere/clip"),
        ["nowhere/clip"],
    ),
    "missing language model": (
        lambda w: w.options.append("--model.init_args.language.init_args.path=./nowhere"),
        ["language.path", "nowhere"],
    ),
    "missing tokenizer": (
        lambda w: w.options.append("--model.init_args.tokenizer.init_args.path=./nowhere"),
        ["nowhere", "tokenizer.model"],
    ),
    "locked run folder": (_second_start, ["pid", "another process works in this run folder"]),
    "batch that leaves nothing": (lambda w: w.options.append("--data.init_args.batch.size=0"), ["batch.size"]),
    "sample over the limit of a pack": (
        lambda w: w.options.append("--data.init_args.max_tokens=10"),
        ["a single sample has", "data.max_tokens=10"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_one_line_says_what_to_do(case: str, world: World, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, words = BAD[case]
    spoil(world)
    assert world.fit() == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("vlm: error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0], lines[0]


def test_errors_in_loader_workers_are_one_line_too(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    (world.folder / "2.png").unlink()
    assert world.fit("--data.init_args.num_workers=1") == 2
    assert "sample 's2': image '2.png' does not exist" in capfd.readouterr().err


def test_a_stage_runs_once_and_the_next_follows_it(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    assert world.fit() == 0
    assert "trains 2,112 at lr 0.001" in capfd.readouterr().out
    assert world.fit() == 2
    assert "this stage is finished" in capfd.readouterr().err
    first, world.run, world.stage = world.run, world.folder / "second", "2_finetune"
    follows = [{"artefact": str(first / "artefact"), "parts": {"connector": "connector"}}]
    assert world.fit(f"--stage.follows={json.dumps(follows)}") == 0
    (world.folder / "foreign").mkdir()
    foreign = [{"artefact": str(world.folder / "foreign"), "parts": {"connector": "connector"}}]
    world.run = world.folder / "third"
    assert world.fit(f"--stage.follows={json.dumps(foreign)}") == 2
    assert "foreign: neither stage.json nor weight files in it" in capfd.readouterr().err
    world.command = "validate"
    assert world.fit() == 2
    assert "validate needs --weights" in capfd.readouterr().err
    assert world.fit(f"--weights={world.folder / 'second'}") == 2
    assert "data.val_sources is empty" in capfd.readouterr().err
    source = {"class_path": "vlm.data.LlavaJson", "init_args": {"path": str(world.folder / "data.json")}}
    assert (
        world.fit(f"--weights={world.folder / 'second'}", f"--data.init_args.val_sources={json.dumps([source])}") == 0
    )
    assert "\nloss " in capfd.readouterr().out
    image = str(world.folder / "1.png")
    arguments = ["--weights", str(first.parent / "second"), "--image", image, "--prompt", "What?"]
    assert cli.main(["predict", *arguments, "--max_new_tokens", "4"]) == 0
    assert capfd.readouterr().out.startswith(image)


def test_lora_by_yaml(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """The shipped overlay trains an adapter; validate, predict and a stage that follows have it without its lines."""
    world.stage = "2_finetune"
    assert world.fit(f"--config={CONFIGS / 'lora.yaml'}") == 0
    first, banner = world.run, capfd.readouterr().out
    assert "surgery      PeftAdapter(rank=128, alpha=256.0" in banner
    stored = json.loads((first / "artefact" / "stage.json").read_text())
    assert {name.split(".")[0] if "lora_" not in name else "lora" for name in stored["tensors"]} == {
        "connector",
        "lora",
    }
    assert len(stored["trained"]) == 4 + 2 * 7 * 2  # A and B of seven linear layers in two blocks
    source = {"class_path": "vlm.data.LlavaJson", "init_args": {"path": str(world.folder / "data.json")}}
    validation = f"--data.init_args.val_sources={json.dumps([source])}"
    world.command = "validate"
    assert world.fit(f"--weights={first}", validation) == 0
    alone = capfd.readouterr().out.split("\nloss ")[1]
    assert world.fit(f"--weights={first}", f"--config={CONFIGS / 'lora.yaml'}", validation) == 0
    assert capfd.readouterr().out.split("\nloss ")[1] == alone
    world.command, world.run = "fit", world.folder / "second"
    assert (
        world.fit(f'--stage.follows=[{{"artefact": "{first / "artefact"}"}}]', "--stage.train={connector: {lr: 1}}")
        == 0
    )
    assert "surgery      PeftAdapter(rank=128" in capfd.readouterr().out
    other = "--trainer.callbacks+={class_path: callbacks.LoRAInjection, init_args: {rank: 64, alpha: 256}}"
    world.run = world.folder / "third"
    assert world.fit(f'--stage.follows=[{{"artefact": "{first / "artefact"}"}}]', other) == 2
    assert f"in {first / 'artefact'} and in this run, with other settings (rank: 128 and 64" in capfd.readouterr().err


def test_qlora_by_the_overlay_for_every_system(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """It trains the adapter alone, and predict opens it; new weights have nothing that it could be merged into."""
    world.stage = "2_finetune"
    assert world.fit(f"--config={CONFIGS.parent / 'finetune' / 'qlora.yaml'}", "--trainer.precision=bf16-mixed") == 0
    first, banner = world.run, capfd.readouterr().out
    assert "14 linear layers of language" in banner
    assert "surgery      14 linear layers are kept in 4 bits" in banner
    stored = json.loads((first / "artefact" / "stage.json").read_text())
    assert len(stored["tensors"]) == 2 * 7 * 2
    assert all(".lora_" in name for name in stored["tensors"])
    image = str(world.folder / "1.png")
    assert cli.main(["predict", "--weights", str(first), "--image", image, "--prompt", "What?"]) == 0
    assert capfd.readouterr().out.startswith(image)
    world.run = world.folder / "second"
    merged = f"--stage.follows=[{{artefact: {first / 'artefact'}, merge: true}}]"
    assert world.fit(merged, "--stage.train={connector: {lr: 1}}") == 2
    assert "comes from no weights, so there is nothing to merge the adapter into" in capfd.readouterr().err


@pytest.fixture
def interrupts() -> Iterator[Any]:
    """Ctrl-C as in a terminal, also where these tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_other_settings_on_resume_are_refused(
    world: World, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, interrupts: Any
) -> None:
    monkeypatch.setattr(StageTransition, "on_train_batch_end", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as stopped:
        world.fit()
    monkeypatch.undo()
    said = capfd.readouterr().err
    assert stopped.value.code == 128 + signal.SIGINT
    assert "saves after this step, then stops; Ctrl-C again ends at once" in said
    assert "vlm: stopped by Ctrl-C; the same command goes on" in said
    assert signal.getsignal(signal.SIGINT) == interrupts
    assert not RunFolder(world.run).finished
    assert world.fit("--stage.schedule.warmup=0.5") == 2
    assert "stage.schedule.warmup: 0.03 -> 0.5" in capfd.readouterr().err
    assert world.fit("--trainer.devices=1") == 0
    assert "step 1 of 2" in capfd.readouterr().out
    assert RunFolder(world.run).finished


def test_unknown_command_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trane"]) == 2
    assert "unknown command 'trane'" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    assert "fit --recipe" in capsys.readouterr().out


def test_out_of_memory_says_what_would_take_less(
    world: World, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(self: Any, batch: Any) -> Any:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB of which 1 GiB is "
            "free. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF."
        )

    monkeypatch.setattr("vlm.systems.LLaVA15.losses", losses)
    world.stage = "2_finetune"
    assert world.fit("--stage.follows=null", "--data.init_args.max_tokens=600") == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("vlm: error: ")]
    assert "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has" in line
    assert "PYTORCH" not in line
    for remedy in (
        "data.max_tokens below 600",
        "trainer.precision: bf16-mixed",
        "stage.recompute: {language: true}",
        "stage.optimizer.kind: adamw_8bit",
        "callbacks.LoRAInjection",
        "trainer.strategy: fsdp2",
        "`vlm plan`",
    ):
        assert remedy in line


def test_an_interrupt_before_the_first_step_has_its_status(
    world: World, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, interrupts: Any
) -> None:
    monkeypatch.setattr(StageTransition, "on_fit_start", lambda *_: signal.raise_signal(signal.SIGINT))
    assert world.fit() == 128 + signal.SIGINT
    assert "vlm: interrupted" in capfd.readouterr().err


def test_a_second_interrupt_ends_at_once(monkeypatch: pytest.MonkeyPatch, interrupts: Any) -> None:
    ended: list[Any] = []
    monkeypatch.setattr("callbacks.stop_signals.os._exit", ended.append)
    launcher = SimpleNamespace(kill=ended.append)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace())
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher), is_global_zero=False, fit_loop=loop)
    signals, terminate = StopSignals(), signal.getsignal(signal.SIGTERM)
    signals.listen(trainer)
    signal.raise_signal(signal.SIGINT)
    assert (signals.received, ended) == (signal.SIGINT, [])
    signal.raise_signal(signal.SIGINT)
    assert ended == [signal.SIGKILL, 130], "the other ranks with it"
    signal.signal(signal.SIGTERM, terminate)


def test_a_trial_leaves_nothing_behind(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    assert world.fit("--trainer.fast_dev_run=1", "--trainer.logger=true") == 0
    assert "was tried with trainer.fast_dev_run; nothing was written" in capfd.readouterr().out
    assert not world.run.exists()


def test_early_stopping_ends_a_stage_and_a_finished_one_is_compared(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    (world.folder / "val.json").write_text(json.dumps(world.records))
    source = {
        "class_path": "vlm.data.LlavaJson",
        "init_args": {"path": str(world.folder / "val.json"), "image_root": str(world.folder)},
    }
    stopper = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}
    stopper["init_args"] |= {"patience": 1, "min_delta": 100.0}
    options = [
        f"--data.init_args.val_sources={json.dumps([source])}",
        "--checkpoint.monitor=val/loss",
        "--trainer.max_epochs=9",
    ]
    stopping = f"--trainer.callbacks+={json.dumps(stopper)}"
    assert world.fit(*options, stopping) == 0
    assert "shortened (EarlyStopping on val/loss stopped it after step 4)" in capfd.readouterr().out
    stored = json.loads((world.run / "artefact/stage.json").read_text())
    assert (stored["global_step"], "EarlyStopping" in stored["shortened"]) == (4, True)
    assert find_weights(f"{world.run}@last").endswith("checkpoints/step=4.ckpt")
    best = json.loads((world.run / "checkpoints/best/score.json").read_text())
    opened = vlm.load(f"{world.run}@best")
    assert opened.weights == str(world.run / f"checkpoints/best/step={best['step']}.ckpt")
    assert world.fit(*options) == 2, "without EarlyStopping it is another run"
    refusal = capfd.readouterr().err
    assert "this run was finished with other settings" in refusal
    assert "EarlyStopping.monitor: val/loss -> null" in refusal
    assert world.fit(*options, stopping, "--data.init_args.num_workers=1", "--trainer.log_every_n_steps=3") == 2
    assert "this stage is finished" in capfd.readouterr().err, "how it runs may differ"
