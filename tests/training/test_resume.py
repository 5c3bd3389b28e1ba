"""Killed at any moment and started again with the same command, a run is the run that was never killed, bit for bit."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cli
from tests.conftest import GOLDEN, PATIENCE
from tests.support.commands import Command
from tests.support.samples import samples
from tests.support.systems import LLAMA, TOWER, build
from vlm.recipes.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "llava_1_5"
PROBE = {"class_path": "tests.support.probe.Probe"}
SHARDED = {"class_path": "callbacks.MixedPrecisionFSDP", "init_args": {"precision": "32-true"}}
HOW = {
    "one": [],
    "ddp": ["--trainer.devices=2", "--trainer.strategy=ddp"],
    "fsdp": [
        "--trainer.devices=2",
        "--trainer.strategy=fsdp2",
        f"--trainer.callbacks={json.dumps([PROBE, SHARDED])}",
    ],
}
STEPS = 12
"""3 epochs of 23 samples, 6 to a step; the last step of an epoch has 5."""


class World:
    """Data on disk, and runs on it through the command line."""

    def __init__(self, folder: Path, *, count: int = 23) -> None:
        self.folder = folder
        records = []
        for sample in samples(folder, count):
            turns = [
                {
                    "from": {"user": "human", "assistant": "gpt"}[message.role],
                    "value": "".join(part.text if hasattr(part, "text") else "<image>" for part in message.content),
                }
                for message in sample.messages
            ]
            images = {"image": [image.name for image in sample.images]} if sample.images else {}
            records.append({"id": sample.id, "conversations": turns, **images})
        (folder / "data.json").write_text(json.dumps(records))
        source = {"path": str(folder / "data.json"), "image_root": str(folder)}
        self.overlay: dict[str, Any] = {
            "model": {
                "init_args": {
                    "vision": {"init_args": {"weights": None, "options": TOWER}},
                    "language": {
                        "init_args": {
                            "path": None,
                            "config": LLAMA | {"attention_dropout": 0.1},
                            "checkpointing": False,
                        }
                    },
                    "tokenizer": {"init_args": {"path": str(GOLDEN / "_shared" / "llama_sp_tokenizer.model")}},
                    "augment": {"class_path": "vlm.vision.RandomCropFlip", "init_args": {"size": 28}},
                }
            },
            "data": {
                "init_args": {
                    "sources": [{"class_path": "vlm.data.LlavaJson", "init_args": source}],
                    "batch": {"size": 6},
                    "micro_batch_size": None,
                    "num_workers": 0,
                }
            },
            "trainer": {
                "precision": "32-true",
                "accelerator": "cpu",
                "max_epochs": 3,
                "accumulate_grad_batches": 2,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "callbacks": [PROBE],
            },
            "stage": {"train": {"connector": {"lr": 1e-2}, "language": {"lr": 1e-2, "weight_decay": 0.1}}},
            "checkpoint": {"every_n_train_steps": 2, "background": True},
        }

    def command(self, run: Path, *options: str) -> list[str]:
        overlay = self.folder / "overlay.yaml"
        overlay.write_text(yaml.safe_dump(self.overlay))
        files = [CONFIGS / "model.yaml", CONFIGS / "2_finetune.yaml", overlay]
        configs = [argument for file in files for argument in ("-c", str(file))]
        return [sys.executable, "-m", "cli", "fit", *configs, f"--trainer.default_root_dir={run}", *options]

    def start(
        self, run: Path, *options: str, kill: str = "", pause: float = 0.0, launcher: tuple[str, ...] | None = None
    ) -> Command | subprocess.Popen:
        """The first of its processes leads their group; see `tests.support.probe` for `kill` and `pause`.

        Args:
            launcher: what a new interpreter is to run before the command; without one, processes are forked.
        """
        # the temporary directory lies on another filesystem than the run folder
        temporary = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
        environment = os.environ | {
            "VLM_TEST_KILL": kill,
            "VLM_TEST_PAUSE": str(pause),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": temporary,
        }
        python, module, name, *words = self.command(run, *options)
        if launcher is None:
            world = 2 if "--trainer.devices=2" in options else 1
            return Command(words, world=world, environment=environment)
        return subprocess.Popen(
            [python, *launcher, module, name, *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
        )

    def fit(self, run: Path, *options: str, kill: str = "") -> None:
        """Runs in a process of its own, to the end or to where it is killed."""
        process = self.start(run, *options, kill=kill)
        try:
            output, _ = process.communicate(timeout=PATIENCE)
        finally:
            end(process)
        assert process.returncode == (-signal.SIGKILL if kill else 0), output
        assert RunFolder(run).finished is not bool(kill)

    def fit_here(self, run: Path, *options: str) -> int:
        """Runs in this process, which saves the start of another one; its status."""
        return cli.main(self.command(run, *options)[3:])

    def stop_early(self, run: Path, *options: str) -> None:
        """Runs a few steps and stops."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLM_TEST_PAUSE", "0.15")
            assert self.fit_here(run, "--trainer.max_time=00:00:00:01", *options) == 0
        assert not RunFolder(run).finished


def end(process: Command | subprocess.Popen) -> None:
    """All of its group, where any are left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def notes(run: Path) -> dict[tuple[str, int, int], list[dict]]:
    """{(rank, epoch, micro-batch): what was noted, once per time it was trained on}."""
    found = defaultdict(list)
    for file in sorted((run / "probe").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            found[(file.stem, *entry["micro_batch"])].append(entry)
    return found


def assert_same(run: Path, reference: Path) -> None:
    ours, theirs = notes(run), notes(reference)
    assert ours.keys() == theirs.keys()
    for key, entries in ours.items():
        for entry in entries:
            assert entry == theirs[key][0], key
    mine, other = (json.loads((folder / "artefact/stage.json").read_text()) for folder in (run, reference))
    assert mine["tensors"] == other["tensors"], "hashes of the trained tensors"
    assert mine["global_step"] == other["global_step"] == STEPS
    for name in ("model", "trained", "frozen", "follows"):
        assert mine[name] == other[name]
    assert not list((run / "checkpoints").iterdir()), "the artefact has all, and nothing half-written is left"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reference(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run that nobody disturbed, made once for each way to run."""
    made: dict[str, Path] = {}

    def run(how: str) -> Path:
        if how not in made:
            made[how] = tmp_path_factory.mktemp(how) / "run"
            if how == "one":
                assert world.fit_here(made[how]) == 0
            else:
                world.fit(made[how], *HOW[how])
        return made[how]

    return run


# -- kills


def logged(run: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def check_kills(world: World, run: Path, reference: Path, how: str, workers: int, kills: list[str]) -> None:
    options = [*HOW[how], f"--data.init_args.num_workers={workers}"]
    options += ["--predictions.enabled=false"] * (how != "one")  # two ranks, killed at random, show theirs below
    for kill in kills:
        world.fit(run, *options, kill=kill)
    if how == "one":
        assert world.fit_here(run, *options) == 0
    else:
        world.fit(run, *options)
    assert_same(run, reference)
    assert [step for step, _ in logged(run, "train/loss")] == list(range(STEPS)), "each step is in the log once"


def test_one_process(world: World, reference: Callable, tmp_path: Path) -> None:
    # in a window of the second epoch, resumed at an epoch's end; while saving, resumed in an epoch; at the stage's end
    check_kills(world, tmp_path / "run", reference("one"), "one", 2, ["window:5", "save:2", "artefact:1"])


KILLS = [
    ["step:0", "step:1", "step:2"],
    ["step:3", "window:3"],
    ["epoch:0", "epoch:1", "epoch:2"],
    ["save:1", "save:3"],
    ["pointer:1", "pointer:2"],
    ["end:0", "artefact:1"],
    ["window:7", "window:11", "end:0"],
]


@pytest.mark.slow
@pytest.mark.parametrize("kills", KILLS, ids=" ".join)
@pytest.mark.parametrize("how", HOW)
def test_every_kill(how: str, kills: list[str], world: World, reference: Callable, tmp_path: Path) -> None:
    # every way to run meets both kinds of loader, every kill as well; two ranks take longest to start workers
    with_workers = {"one": (0, 2, 4, 6), "ddp": (1, 5), "fsdp": (3,)}[how]
    workers = 2 * (KILLS.index(kills) in with_workers)
    check_kills(world, tmp_path / "run", reference(how), how, workers, kills)


@pytest.mark.slow
@pytest.mark.parametrize("interval", ["1.0", "4"])
def test_no_validation_is_lost(interval: str, tmp_path: Path) -> None:
    world = World(tmp_path)
    world.overlay["data"]["init_args"]["val_sources"] = world.overlay["data"]["init_args"]["sources"]
    every = f"--trainer.val_check_interval={interval}"
    assert world.fit_here(tmp_path / "whole", every) == 0
    for kill in ("validate:4", "step:8", "validate:12"):
        world.fit(tmp_path / "run", every, kill=kill)
    assert world.fit_here(tmp_path / "run", every) == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert logged(tmp_path / "run", "val/loss") == logged(tmp_path / "whole", "val/loss")


@pytest.mark.slow
@pytest.mark.parametrize(("interval", "at"), [("4", 0), ("1.0", -1)])
def test_a_signal_cuts_a_validation_which_begins_again(
    interval: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within an epoch or behind the last; the validation takes moving averages, the training goes on without them."""
    world = World(tmp_path)
    world.overlay["data"]["init_args"] |= {
        "val_sources": world.overlay["data"]["init_args"]["sources"],
        "val_batch_size": 8,
    }
    world.overlay["trainer"]["callbacks"].append({"class_path": "callbacks.EMA", "init_args": {"decay": 0.9}})
    options = [f"--trainer.val_check_interval={interval}", "--checkpoint.every_n_train_steps=100"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert world.fit_here(whole, *options) == 0
    validated = [step for step, _ in logged(whole, "val/loss")]
    cut = validated[at] + 1
    monkeypatch.setenv("VLM_TEST_KILL", f"stop:{cut}")
    with pytest.raises(SystemExit) as stop:
        world.fit_here(run, *options)
    monkeypatch.delenv("VLM_TEST_KILL")
    assert stop.value.code == 128 + signal.SIGTERM
    assert RunFolder(run).last_checkpoint() == run / f"checkpoints/step={cut}.ckpt"
    if at:
        assert [step for step, _ in logged(run, "val/loss")] == validated[:at]
    assert world.fit_here(run, *options) == 0
    assert_same(run, whole)
    assert logged(run, "val/loss") == logged(whole, "val/loss")


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_killed_at_random_until_it_is_done(how: str, world: World, reference: Callable, tmp_path: Path) -> None:
    run, draw, starts = tmp_path / "run", random.Random(7), 0
    options = [*HOW[how], "--data.init_args.num_workers=1"]
    patience = 1.0  # a busy machine needs longer for a step: a start that came to nothing makes the next ones longer
    while not RunFolder(run).finished:
        before = RunFolder(run).last_checkpoint()
        starts += 1
        assert starts < 40, "no progress"
        process = world.start(run, *options, pause=0.15)
        while process.poll() is None and not (run / "probe" / f"start-{starts}").exists():
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it trains now
            process.wait(patience * draw.uniform(0.3, 1.8))
        end(process)
        process.communicate()
        if RunFolder(run).last_checkpoint() == before:
            patience *= 1.3
    assert starts > 3
    assert_same(run, reference(how))


def _wait_for(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


# -- stops and refusals


def test_sigterm_saves_and_the_same_command_goes_on(
    world: World, reference: Callable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    rare = "--checkpoint.every_n_train_steps=100"
    process = world.start(run, rare, pause=0.5)
    try:
        _wait_for(lambda: process.poll() is not None or len(notes(run)) > 2)
        assert world.fit_here(run, rare) == 2, "a run that is running"
        assert f"another process works in this run folder (pid {process.pid} on host" in capfd.readouterr().err
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 128 + signal.SIGTERM, output
    finally:
        end(process)
    done = len(notes(run)) // 2
    assert RunFolder(run).last_checkpoint() == run / f"checkpoints/step={done}.ckpt"
    assert world.fit_here(run, rare, "--stage.optimizer.eps=1e-6") == 2
    assert "stage.optimizer.eps: 1.0e-08 -> 1.0e-06" in capfd.readouterr().err
    assert world.fit_here(run, rare) == 0
    assert f"step {done} of {STEPS}" in capfd.readouterr().out
    assert_same(run, reference("one"))
    assert world.fit_here(run, rare) == 2
    assert "this stage is finished" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("how", "number"), [("ddp", signal.SIGINT), ("fsdp", signal.SIGTERM)])
def test_a_signal_stops_all_ranks_at_one_step(
    how: str, number: signal.Signals, world: World, reference: Callable, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = [*HOW[how], "--checkpoint.every_n_train_steps=100", "--data.init_args.num_workers=1"]
    process = world.start(run, *options, pause=0.3, launcher=())  # Lightning starts the second rank
    try:
        _wait_for(lambda: process.poll() is not None or len(notes(run)) > 5)
        if number == signal.SIGTERM:
            process.send_signal(number)  # to the first rank alone
        else:
            os.killpg(process.pid, number)  # as a terminal sends it: to all ranks, and to the loaders' workers
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        end(process)
    assert process.returncode == 128 + number, output
    assert RunFolder(run).last_checkpoint() is not None
    world.fit(run, *options)
    assert_same(run, reference(how))


@pytest.mark.slow
def test_a_dead_rank_ends_the_run_and_torchrun_starts_it_again(
    world: World, reference: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    process = world.start(run, *HOW["ddp"], pause=0.3, launcher=torchrun)
    try:
        _wait_for(lambda: process.poll() is not None or RunFolder(run).last_checkpoint() is not None)
        os.kill(_ranks_of(process.pid)[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        end(process)
    assert process.returncode == 0, output
    assert "another rank has ended or does not answer" in output
    assert f"step 2 of {STEPS}" in output or f"step 4 of {STEPS}" in output
    assert_same(run, reference("ddp"))


def _ranks_of(torchrun: int) -> dict[int, int]:
    """{local rank: process} of what torchrun has started."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    variables = {int(pid): Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in children}
    ranks = {pid: [text for text in found if text.startswith("LOCAL_RANK=")] for pid, found in variables.items()}
    return {int(found[0].partition("=")[2]): pid for pid, found in ranks.items() if found}


def test_max_time_is_the_time_of_one_start(
    world: World, reference: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, starts = tmp_path / "run", 0
    monkeypatch.setenv("VLM_TEST_PAUSE", "0.08")
    while not RunFolder(run).finished:
        starts += 1
        assert starts < 40, "no progress"
        options = ["--trainer.max_time=00:00:00:01", "--checkpoint.every_n_train_steps=100"]
        assert world.fit_here(run, *options) == 0
    assert starts > 1
    assert_same(run, reference("one"))


def test_changed_base_weights_are_refused(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, weights = tmp_path / "run", tmp_path / "tower.safetensors"
    tower = build("llava_1_5").vision.trunk.state_dict()
    save_file(tower, weights)
    options = [f"--model.init_args.vision.init_args.weights={weights}"]
    world.stop_early(run, *options)
    tower["blocks.1.mlp.fc1.bias"][0] += 1e-3
    save_file(tower, weights)
    assert world.fit_here(run, *options) == 2
    error = capfd.readouterr().err
    assert "cannot resume: 1 frozen tensors have changed since the start" in error
    assert "vision.trunk.blocks.1.mlp.fc1.bias" in error


# -- another shape of the run


def samples_of_steps(run: Path) -> dict[int, set[str]]:
    """{step: ids}, of the last time each micro-batch was trained on."""
    found = defaultdict(set)
    for entries in notes(run).values():
        found[entries[-1]["step"]].update(entries[-1]["ids"])
    return found


def check_reshaped(run: Path, before: Path, reference: Path) -> None:
    """`run` went on where `before`, the notes of the same run's first start, had ended."""
    done = min(entries[0]["step"] for entries in notes(run).values())
    assert 0 < done < STEPS - 1
    assert {entries[0]["step"] for entries in notes(before).values()} >= set(range(done))
    expected = samples_of_steps(reference)
    assert samples_of_steps(run) == {step: expected[step] for step in range(done, STEPS)}
    rates = {entries[0]["step"]: entries[0]["lr"] for entries in notes(reference).values()}
    for entries in notes(run).values():
        for entry in entries:
            assert entry["lr"] == rates[entry["step"]]


def test_resume_with_another_accumulation(world: World, reference: Callable, tmp_path: Path) -> None:
    run = tmp_path / "run"
    world.stop_early(run)
    (run / "probe").rename(tmp_path / "probe")
    assert world.fit_here(run, "--trainer.accumulate_grad_batches=3") == 0
    check_reshaped(run, tmp_path, reference("one"))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("one", "ddp"), ("ddp", "one"), ("ddp", "fsdp"), ("fsdp", "one")])
@pytest.mark.parametrize("kill", ["step:5", "epoch:1"])
def test_resume_on_other_devices(
    before: str, after: str, kill: str, world: World, reference: Callable, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    world.fit(run, *HOW[before], kill=kill)
    (run / "probe").rename(tmp_path / "probe")
    world.fit(run, *HOW[after], "--trainer.accumulate_grad_batches=1")
    check_reshaped(run, tmp_path, reference("one"))


# -- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Room for two checkpoints of 25 MB while one takes the place of the other, and an artefact of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(world: World, reference: Callable, small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = small_disk / "run"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(40_000_000))
    assert world.fit_here(run) == 2
    error = capfd.readouterr().err
    errors = [line for line in error.splitlines() if line.startswith("vlm: error: ")]
    assert len(errors) == 1
    assert f"no space left in {run / 'checkpoints'}" in errors[0]
    assert "Traceback" not in error
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last", "step=2.ckpt"]
    ballast.unlink()
    assert world.fit_here(run) == 0
    assert "step 2 of 12" in capfd.readouterr().out
    assert_same(run, reference("one"))
