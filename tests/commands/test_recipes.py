"""Recipes: what is refused when one is read, and which processes are started in which order."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import vlm.registry
from tests.conftest import PATIENCE
from vlm.errors import UserError
from vlm.recipes import TrainingStage, load_recipe, print_systems, run_recipe, systems

ROOT = Path(__file__).parents[2]

# Trains like `vlm fit`: notes its arguments, and leaves an artefact unless told to do something else.
FAKE_FIT = """
import json, pathlib, signal, sys, time
arguments = sys.argv[1:]
root = pathlib.Path(arguments[arguments.index("--trainer.default_root_dir") + 1])
with open("calls.jsonl", "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
options = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
if "signals" in options:
    def stop(number, frame):
        pathlib.Path("got").write_text(str(number))
        sys.exit(0)
    signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)
    pathlib.Path("ready").touch()
    time.sleep(600)
if "kill" in options:
    signal.raise_signal(signal.SIGKILL)
if "status" in options:
    sys.exit(int(options["status"]))
if "stop" not in options:
    (root / "artefact").mkdir(parents=True, exist_ok=True)
    (root / "artefact" / "stage.json").write_text("{}")
"""
RECIPE = """
system: three
stages:
  3_last:
    configs: [model.yaml, 3_last.yaml]
    continues: 2_finetune
    follows: [{artefact: three/2_finetune}]
  2_finetune:
    configs: [model.yaml, 2_finetune.yaml]
    follows:
      - {artefact: three/1_align, parts: {connector: connector}}
      - {artefact: other/1_base, parts: {vision: tower}}
  1_align: {configs: [model.yaml, 1_align.yaml]}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of three stages, written in the wrong order; one follows another system."""
    folder = tmp_path / "configs/three"
    (folder / "demo").mkdir(parents=True)
    for name in ("model", "1_align", "2_finetune", "3_last"):
        (folder / f"{name}.yaml").touch()
        (folder / "demo" / f"{name}.yaml").touch()
    (folder / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "fake.py").write_text(FAKE_FIT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vlm.registry, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(vlm.registry, "SYSTEMS", {"three": vlm.registry.System("nowhere.Three")})
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID", "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    _finish(tmp_path / "runs/other/1_base")
    return folder / "recipe.yaml"


def _finish(folder: Path) -> None:
    (folder / "artefact").mkdir(parents=True)
    (folder / "artefact/stage.json").write_text("{}")


def _run(*arguments: str, **options: Any) -> tuple[int, list[list[str]]]:
    """Exit status and the argument lists of the processes it started."""
    Path("calls.jsonl").unlink(missing_ok=True)
    status = run_recipe(["--recipe", "three", *arguments], command=[sys.executable, "fake.py"], **options)
    calls = Path("calls.jsonl")
    return status, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def _names(calls: list[list[str]]) -> list[str]:
    return [call[call.index("--stage.name") + 1] for call in calls]


def test_stages_run_in_the_order_of_the_graph(recipe: Path) -> None:
    status, calls = _run()
    assert status == 0
    assert calls[0] == shlex.split(
        "fit -c configs/three/model.yaml -c configs/three/1_align.yaml "
        "--trainer.default_root_dir runs/three/1_align --stage.name 1_align"
    )
    assert _names(calls) == ["1_align", "2_finetune", "3_last"]
    assert json.loads(calls[1][calls[1].index("--stage.follows") + 1]) == [
        {"artefact": "runs/three/1_align/artefact", "parts": {"connector": "connector"}},
        {"artefact": "runs/other/1_base/artefact", "parts": {"vision": "tower"}},
    ]
    assert calls[2][-2:] == ["--stage.continues", "runs/three/2_finetune/artefact"]
    assert [call[-2:] == ["--stage.keep_optimizer", "true"] for call in calls] == [False, True, False]
    assert _run() == (0, []), "finished stages are not started again"


def test_demo_lays_every_overlay_over_every_file(recipe: Path) -> None:
    _finish(Path("runs/other_demo/1_base"))
    status, calls = _run("--demo")
    assert status == 0
    files = [calls[0][i + 1] for i, item in enumerate(calls[0]) if item == "-c"]
    assert files == [
        f"configs/three/{name}" for name in ("model.yaml", "1_align.yaml", "demo/model.yaml", "demo/1_align.yaml")
    ]
    assert calls[0][calls[0].index("--trainer.default_root_dir") + 1] == "runs/three_demo/1_align"
    (recipe.parent / "demo/3_last.yaml").unlink()
    with pytest.raises(UserError, match=r"no demo of stage 3_last: .*demo/3_last\.yaml is missing"):
        _run("--demo", "--run", "elsewhere/run", "--from", "other/1_base=runs/other/1_base")


def test_options_reach_all_stages_or_one(recipe: Path) -> None:
    status, calls = _run(
        "--stage.2_finetune.a.b=1", "--run", "out", "--stage.2_finetune.c", "2", "--", "--c=0", "--recipe=x"
    )
    assert status == 0
    assert calls[0][-2:] == ["--c=0", "--recipe=x"]
    assert calls[1][-4:] == ["--c=0", "--recipe=x", "--a.b=1", "--c=2"], "those of one stage come last and win"
    assert calls[2][-2:] == ["--c=0", "--recipe=x"]


def test_a_failing_stage_stops_the_recipe(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, calls = _run("--stage.2_finetune.status=7")
    assert (status, _names(calls)) == (7, ["1_align", "2_finetune"])
    assert "the same command continues: vlm fit --recipe three --stage.2_finetune.status=7" in capfd.readouterr().out
    status, calls = _run("--stage.2_finetune.kill=1")
    assert (status, _names(calls)) == (137, ["2_finetune"])
    status, calls = _run("--stage.2_finetune.stop=1")
    assert (status, _names(calls)) == (75, ["2_finetune"]), "a stage that ended early is not followed by the next"
    status, calls = _run()
    assert (status, _names(calls)) == (0, ["2_finetune", "3_last"])


def test_a_finished_stage_is_compared_before_anything_starts(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    compared: list[str] = []

    def compare(options: Sequence[str]) -> None:
        compared.append(options[options.index("--stage.name") + 1])
        if "--lr=2" in options:
            raise UserError("lr: 1 -> 2")

    assert _run("--stage", "1_align")[0] == 0
    Path("runs/three/1_align/config.yaml").touch()
    Path("runs/three/1_align/artefact/stage.json").write_text('{"shortened": "trainer.max_steps: 5 of 9 steps"}')
    with pytest.raises(UserError, match="lr: 1 -> 2"):
        _run("--stage.1_align.lr=2", compare=compare)
    status, calls = _run(compare=compare)
    assert (status, _names(calls), compared) == (0, ["2_finetune", "3_last"], ["1_align", "1_align"])
    assert "1_align: finished, though shortened (trainer.max_steps: 5 of 9 steps), skipped" in capfd.readouterr().out
    Path("runs/other/1_base").rename("gone")
    assert _run("--stage", "2_finetune", compare=compare)[0] == 0


def test_a_trial_is_of_one_stage(recipe: Path) -> None:
    with pytest.raises(UserError, match="leaves nothing for a next stage; try one, with --stage"):
        _run("--", "--trainer.fast_dev_run=1")
    for _ in range(2):
        status, calls = _run("--stage", "1_align", "--", "--trainer.fast_dev_run=1", "--stop=1")
        assert (status, _names(calls)) == (0, ["1_align"])


def test_dry_run_prints_and_starts_nothing(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run("--dry-run") == (0, [])
    lines = capfd.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("  ")]
    assert _names(commands) == ["1_align", "2_finetune", "3_last"]
    assert not Path("runs/three").exists()


def test_one_stage(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"make it with `vlm fit --recipe three --run runs/three --stage 1_align`"):
        _run("--stage", "2_finetune")
    assert _names(_run("--stage", "1_align")[1]) == ["1_align"]
    assert _names(_run("--stage", "2_finetune")[1]) == ["2_finetune"]
    with pytest.raises(UserError, match=r"there is no stage '4'; its stages are 1_align, 2_finetune, 3_last"):
        _run("--stage", "4")


def test_an_artefact_of_another_system(recipe: Path) -> None:
    Path("runs/other").rename("moved")
    with pytest.raises(UserError, match=r"make it with `vlm fit --recipe other --run runs/other --stage 1_base`"):
        _run()
    assert not Path("calls.jsonl").exists(), "found out before the first stage starts"
    _finish(Path("mine"))
    status, calls = _run("--from", "other/1_base=moved/1_base", "--from", "three/1_align=mine/artefact")
    assert (status, _names(calls)) == (0, ["2_finetune", "3_last"])
    follows = json.loads(calls[0][calls[0].index("--stage.follows") + 1])
    assert [follow["artefact"] for follow in follows] == ["mine/artefact", "moved/1_base/artefact"]
    for entry, message in [
        ("other/1_base", "write --from SYSTEM/STAGE=FOLDER"),
        ("other/2=moved", "no stage of .* follows other/2"),
        ("other/1_base=nowhere", "nowhere holds no finished stage"),
    ]:
        with pytest.raises(UserError, match=message):
            _run("--from", entry)


@pytest.mark.parametrize("variable", [("WORLD_SIZE", "2"), ("SLURM_NTASKS", "8"), ("TORCHELASTIC_RUN_ID", "x")])
def test_a_distributed_start_names_its_stage(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]
) -> None:
    monkeypatch.setenv(*variable)
    with pytest.raises(UserError, match=r"say which stage with --stage \(1_align, 2_finetune, 3_last\)"):
        _run()
    assert _names(_run("--stage", "1_align")[1]) == ["1_align"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(recipe: Path, number: signal.Signals) -> None:
    program = (
        "import sys; from vlm.recipes import run_recipe; sys.exit(run_recipe(sys.argv[1:], command=['%s', 'fake.py']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program % sys.executable, "--recipe", str(recipe), "--stage.1_align.signals=1"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not Path("ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(PATIENCE) == 128 + number
        assert Path("got").read_text() == str(int(number))
        assert _names([json.loads(line) for line in Path("calls.jsonl").read_text().splitlines()]) == ["1_align"]
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("system: three", "sytem: three", "the recipe: unknown key 'sytem'"),
        ("system: three", "system: [three]", r"system: \['three'\] is no name"),
        ("configs: [model.yaml, 1_align.yaml]", "config: x", r"stages\.1_align: unknown key 'config'"),
        ("configs: [model.yaml, 1_align.yaml]", "continues: 3_last", r"stages\.1_align: key 'configs' is missing"),
        ("1_align.yaml]", "no.yaml]", r"stages\.1_align\.configs\[1\]: there is no file 'no\.yaml'"),
        ("three/1_align", "three/1_aling", r"stages\.2_finetune\.follows\[0\]\.artefact: .*'1_aling'.*1_align"),
        ("three/1_align", "1_align", r"follows\[0\]\.artefact: must be <system>/<stage>"),
        ("{vision: tower}", "[vision]", r"stages\.2_finetune\.follows\[1\]\.parts: must be a mapping"),
        ("three/1_align", "three/3_last", "3_last and 2_finetune wait for one another"),
        ("three/1_align", "three/2_finetune", "there is no other stage '2_finetune'"),
        ("continues: 2_finetune", "continues: 4", r"stages\.3_last\.continues: there is no other stage 4"),
        ("1_align:", "2_finetune:", "the key '2_finetune' stands twice"),
        (
            "3_last:",
            "3_last:\n    run: instruct",
            r"stages\.3_last: unknown key 'configs'; it takes arguments, demo, needs, run, writes",
        ),
        ("system: three", "system: [three", "is no valid YAML"),
    ],
)
def test_a_wrong_recipe_is_refused(recipe: Path, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    recipe.write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(recipe)
    assert str(caught.value).startswith(f"{recipe}: ")


def test_a_variant_says_what_differs(recipe: Path) -> None:
    folder = recipe.parent / "variants"
    folder.mkdir()
    (folder / "more.yaml").touch()
    variant = folder / "short.yaml"
    variant.write_text("base: ../recipe.yaml\nstages:\n  2_finetune: {add: [more.yaml], follows: []}\n  3_last: null\n")
    whole, short = load_recipe(recipe), load_recipe(variant)
    assert (short.system, [node.name for node in short.nodes]) == ("three", ["2_finetune", "1_align"])
    (second, first), (wanted, *_) = short.nodes, [node for node in whole.nodes if node.name == "1_align"]
    assert isinstance(first, TrainingStage)
    assert isinstance(wanted, TrainingStage)
    assert [file.resolve() for file in first.configs] == list(wanted.configs)
    assert isinstance(second, TrainingStage)
    assert (second.follows, second.configs[-1]) == ((), folder / "more.yaml")
    for text, message in {
        "base: nowhere.yaml\nstages: {}": "base: there is no file 'nowhere.yaml'",
        "base: ../recipe.yaml\nstages: {4_no: null}": "no other stage '4_no'",
        "base: ../recipe.yaml\nsystem: three\nstages: {}": "unknown key 'system'",
        "base: ../recipe.yaml\nstages: {1_align: null}": "3_last|2_finetune",
    }.items():
        variant.write_text(text)
        with pytest.raises(UserError, match=message):
            load_recipe(variant)


def test_an_unknown_procedure_is_refused_before_anything_starts(recipe: Path) -> None:
    recipe.write_text(RECIPE + "  4_data: {run: capfilt, needs: [3_last], writes: filtered, arguments: [x]}\n")
    with pytest.raises(UserError, match=r"stages\.4_data\.run: there is no procedure 'capfilt'"):
        _run()
    assert not Path("calls.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "four"], "no such system; choose one of three"),
        (["--recipe", "four.yaml"], "no such file"),
        (["--recipe", "three", "--trainer.max_steps=1"], "options of the stages themselves go behind --"),
        (["--recipe", "three", "--stage.4.a=1"], "there is no stage '4'"),
        (["--recipe", "three", "--stage.1_align.a"], "write --stage.NAME.KEY=VALUE"),
    ],
)
def test_a_wrong_command_is_refused(recipe: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_recipe(arguments, command=[sys.executable, "fake.py"])


def test_an_installed_package_has_no_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlm.registry, "CONFIGS", tmp_path / "configs")
    with pytest.raises(UserError, match="an installed package"):
        run_recipe(["--recipe", "llava_1_5"])
    with pytest.raises(UserError, match="no recipes here"):
        print_systems()


def test_every_shipped_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert "llava_1_5" in systems()
    for name in systems():
        recipe = load_recipe(ROOT / "configs" / name / "recipe.yaml")
        assert recipe.system == name
        for node in recipe.nodes:
            if isinstance(node, TrainingStage):
                assert [file for file in node.overlays if not file.is_file()] == [], "every stage has its demo"
    assert print_systems() == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["llava_1_5", "1_align, 2_finetune"] in rows


def test_the_slurm_script_starts_every_stage(tmp_path: Path) -> None:
    srun = 'echo "$@" >> "$CALLS"; case "${@: -1}" in --fail) exit 1;; --stop) exit 143;; esac'
    programs = {"srun": srun, "scontrol": 'echo "$@" >> "$CALLS"', "python": f'exec {sys.executable} "$@"'}
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_JOB_ID": "7",
    }

    def run(*options: str) -> tuple[int, list[str]]:
        (tmp_path / "calls").write_text("")
        script = ROOT / "configs/cluster/slurm.sh"
        status = subprocess.run(["bash", script, "llava_1_5", *options], cwd=ROOT, env=environment).returncode
        return status, (tmp_path / "calls").read_text().splitlines()

    calls = [
        f"--kill-on-bad-exit=1 python -m cli fit --recipe llava_1_5 --stage {stage} -c configs/cluster/hybrid.yaml -- "
        "--trainer.num_nodes=2 --trainer.devices=8 --a=1"
        for stage in ("1_align", "2_finetune")
    ]
    assert run("hybrid", "--a=1") == (0, calls)
    status, made = run("fsdp2", "--fail")
    assert (status, len(made)) == (1, 1), "nothing follows a stage that failed"
    status, made = run("fsdp2", "--stop")
    assert (status, made[1:]) == (143, ["requeue 7"])
    assert run("horovod") == (2, [])


@pytest.mark.slow
def test_the_demo_recipe_survives_a_kill(tmp_path: Path) -> None:
    """The real thing, small: two stages, killed in the second one, continued by the same command, and asked."""
    for name in ("vlm", "callbacks", "cli.py"):  # the demo's paths start at the repository
        (tmp_path / name).symlink_to(ROOT / name)

    def start(*arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "cli", *arguments], cwd=tmp_path, text=True, stdout=subprocess.PIPE
        )

    recipe = ["fit", "--recipe", "llava_1_5", "--demo", "--run", "runs/demo", "--stage.2_finetune.trainer.max_epochs=8"]
    recipe += ["--", "--data.init_args.batch.size=8", "--checkpoint.every_n_train_steps=2"]
    stage = tmp_path / "runs/demo/2_finetune"
    assert start("demo-data", "runs/demo_data", "--num_train", "40", "--num_val", "4", "--num_test", "4").wait() == 0
    process = start(*recipe)
    deadline = time.monotonic() + 2 * PATIENCE
    while not (stage / "checkpoints/last").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(int((stage / ".lock").read_text().split()[1]), signal.SIGKILL)
    process.communicate()
    assert process.returncode == 137
    assert not (stage / "artefact").exists()

    output, _ = (process := start(*recipe)).communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert "1_align: finished, skipped" in output
    assert "stage 2_finetune: step 0 of" not in output, "it went on from the checkpoint"
    assert (stage / "artefact/stage.json").is_file()

    picture = "runs/demo_data/images/val_00000.png"
    arguments = ["--weights", "runs/demo", "--image", picture, "--prompt", "What is this?", "--max_new_tokens", "4"]
    output, _ = start("predict", *arguments).communicate(timeout=PATIENCE)
    assert output.startswith(f"{picture}: ")


def test_a_stage_left_out(recipe: Path) -> None:
    status, calls = _run("--skip", "1_align")
    assert (status, _names(calls)) == (0, ["2_finetune", "3_last"])
    assert calls[0][calls[0].index("--trainer.default_root_dir") + 1] == "runs/three_without_1_align/2_finetune"
    follows = json.loads(calls[0][calls[0].index("--stage.follows") + 1])
    assert [follow["artefact"] for follow in follows] == ["runs/other/1_base/artefact"]
    for name, message in (("2_finetune", "3_last cannot do without 2_finetune; skip 3_last"), ("9", "no stage '9'")):
        with pytest.raises(UserError, match=message):
            _run("--skip", name)
