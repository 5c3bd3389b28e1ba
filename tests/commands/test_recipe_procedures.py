"""Procedures as nodes of a recipe: their order, their data in the stages' files, stopped and continued."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

import cli
import vlm.registry
from tests.commands.test_recipes import FAKE_FIT, ROOT, _finish, _names
from tests.conftest import PATIENCE
from tests.support.chat_server import Asked, Server, serving
from tests.support.instruct import about, records, talk, write
from vlm.errors import UserError
from vlm.recipes import load_recipe, run_recipe
from vlm.recipes.configs import stage_options

# Trains like `vlm fit`, runs procedures for real.
FAKE = (
    f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nif sys.argv[1] == 'run':\n    import cli; sys.exit(cli.main())\n"
)
RECIPE = """
system: bootstrapped
stages:
  2_tune:                     # stands before what it needs
    configs: [model.yaml, 2_tune.yaml]
    needs: [chats]
    follows: [{artefact: bootstrapped/1_align}]
  chats:
    run: instruct
    needs: [1_align, requests]
    writes: chats.json
    arguments: [--kind, conversation, --records, in.json, --out, "${writes}", --endpoint, URL, --model, "${1_align}"]
    demo: [--kind, conversation, --records, demo.json, --out, "${writes}", --endpoint, URL, --model, writer]
  1_align:
    configs: [model.yaml, 1_align.yaml]
    needs: [requests]
  requests: {run: llava-captions, needs: [], writes: requests.json, arguments: [captions.json, "${writes}", --replace]}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "configs/bootstrapped"
    (folder / "demo").mkdir(parents=True)
    for name in ("model", "1_align", "2_tune"):
        (folder / f"{name}.yaml").write_text("seed_everything: 1\n")
        (folder / f"demo/{name}.yaml").touch()
    (folder / "1_align.yaml").write_text("path: ${requests}  # made by a procedure\n")
    (folder / "demo/2_tune.yaml").write_text("path: ${chats}\n")
    (folder / "2_tune.yaml").write_text("path: ${chats}\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "fake.py").write_text(FAKE + FAKE_FIT)
    write(tmp_path / "in.json", records(6))
    write(tmp_path / "captions.json", [{"id": 1, "image": "1.png", "caption": "A dog."}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vlm.registry, "CONFIGS", tmp_path / "configs")
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID", "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return folder / "recipe.yaml"


def run(*arguments: str) -> tuple[int, list[list[str]]]:
    """Exit status and the argument lists of the stages it trained."""
    Path("calls.jsonl").unlink(missing_ok=True)
    status = run_recipe(["--recipe", "bootstrapped", *arguments], command=[sys.executable, "fake.py"])
    calls = Path("calls.jsonl")
    return status, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def configs_of(call: list[str]) -> list[str]:
    return [call[at + 1] for at, word in enumerate(call) if word == "-c"]


def test_nodes_come_after_what_they_need_and_stages_read_what_was_made(
    recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert [node.name for node in load_recipe(recipe).nodes] == ["requests", "1_align", "chats", "2_tune"]
    with serving(talk) as server:
        recipe.write_text(RECIPE.replace("URL", server.url))
        status, calls = run("--run", "out", "--", "--c=0")
    assert (status, _names(calls)) == (0, ["1_align", "2_tune"])
    assert {asked.body["model"] for asked in server.asked} == {"out/1_align/artefact"}
    assert len(json.loads(Path("out/chats/chats.json").read_text())) == 6
    assert configs_of(calls[0]) == ["configs/bootstrapped/model.yaml", "out/1_align/configs/1_align.yaml"]
    made = yaml.safe_load(Path("out/2_tune/configs/2_tune.yaml").read_text())
    assert made == {"path": "out/chats/chats.json"}
    assert all(call[-1] == "--c=0" for call in calls)
    assert yaml.safe_load(Path("out/chats/config.yaml").read_text())["records"] == ["in.json"]
    capfd.readouterr()
    assert run("--run", "out") == (0, []), "finished nodes are not run again"
    assert "chats: finished, skipped (out/chats/chats.json)" in capfd.readouterr().out


def test_a_dry_run_prints_procedures_and_writes_nothing(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--dry-run", "--stage.chats.seed=3") == (0, [])
    commands = [shlex.split(line)[2:] for line in capfd.readouterr().out.splitlines() if line.startswith("  ")]
    assert commands[0] == shlex.split(
        "run --node runs/bootstrapped/requests --writes requests.json llava-captions "
        "captions.json runs/bootstrapped/requests/requests.json --replace"
    )
    assert commands[1][:5] == [
        "fit", "-c", "configs/bootstrapped/model.yaml", "-c", "runs/bootstrapped/1_align/configs/1_align.yaml"
    ]  # fmt: skip
    assert commands[2][-3:] == ["--model", "runs/bootstrapped/1_align/artefact", "--seed=3"]
    assert not Path("runs").exists()


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "cli", *arguments],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_killed_procedure_goes_on_and_refuses_other_settings(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _finish(Path("runs/bootstrapped/1_align"))
    reached, go_on = threading.Event(), threading.Event()

    def play(asked: Asked) -> str:
        if asked.number > 2 and not go_on.is_set():
            reached.set()
            go_on.wait(PATIENCE)
        return talk(asked)

    with serving(play) as server:
        recipe.write_text(RECIPE.replace("URL", server.url))
        command = ["fit", "--recipe", str(recipe), "--stage", "chats"]
        assert start("fit", "--recipe", str(recipe), "--stage", "requests").wait(PATIENCE) == 0
        process = start(*command)
        assert reached.wait(PATIENCE)
        folder = Path("runs/bootstrapped/chats")
        assert cli.main(["run", "--node", str(folder), "--writes", "chats.json", "instruct", "--kind", "detail"]) == 2
        worker = int((folder / ".lock").read_text().split()[1])
        assert f"another process works in this run folder (pid {worker} on" in capfd.readouterr().err
        os.kill(worker, signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 128 + signal.SIGKILL, output
        assert "the same command continues" in output
        go_on.set()
        _check_continued(server, folder, command, capfd)


def _check_continued(server: Server, folder: Path, command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert not (folder / "chats.json").exists()
    assert not (folder / "finished.json").exists()
    process = start(*command, "--stage.chats.seed=1")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "config.yaml: this run was started with other settings" in output
    assert "seed.0: null -> '1'" in output
    before = len(server.asked)
    process = start(*command, "--stage.chats.parallel=2")  # how it runs, not what it makes
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    asked_again = [about(asked) for asked in server.asked[before:]]
    assert len(asked_again) == 4, "two answers were there"
    assert len(json.loads((folder / "chats.json").read_text())) == 6
    assert json.loads((folder / "finished.json").read_text()) == {"run": "instruct", "writes": "chats.json"}
    assert cli.main(["run", "--node", str(folder), "--writes", "chats.json", "instruct"]) == 2
    assert "this node is finished" in capfd.readouterr().err


def test_a_procedure_that_fails_is_not_finished(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("captions.json").unlink()
    assert run() == (2, [])
    assert "requests: failed with exit status 2; the same command continues" in capfd.readouterr().out
    write(Path("captions.json"), [{"id": 1, "image": "1.png", "caption": "A dog."}])
    assert run("--stage", "requests")[0] == 0
    with pytest.raises(UserError, match=r"(?s)requests/config\.yaml: this run was finished with other settings.*seed"):
        run("--stage", "requests", "--stage.requests.seed=3")
    Path("runs").rename("moved")
    assert run("--stage", "requests", "--run", "moved/bootstrapped")[0] == 0, "moved along with its data"
    # ended well, but wrote something else
    node = ["run", "--node", "elsewhere", "--writes", "here.json", "llava-captions", "captions.json", "there.json"]
    assert cli.main(node) == 2
    assert "elsewhere/here.json: the procedure ended without it" in capfd.readouterr().err
    assert not Path("elsewhere/finished.json").exists()


def test_given_data_takes_the_place_of_a_node(recipe: Path) -> None:
    write(Path("mine.json"), [])
    status, calls = run("--from", "bootstrapped/chats=mine.json", "--from", "bootstrapped/requests=mine.json")
    assert (status, _names(calls)) == (0, ["1_align", "2_tune"])
    made = Path("runs/bootstrapped/2_tune/configs/2_tune.yaml").read_text()
    assert made == "path: mine.json\n"
    _finish(Path("elsewhere"))
    with pytest.raises(UserError, match=r"nothing\.json is not there"):
        run("--from", "bootstrapped/chats=nothing.json")
    assert run("--from", "bootstrapped/1_align=elsewhere", "--stage", "1_align") == (0, [])
    with pytest.raises(UserError, match=r"chats/chats\.json: bootstrapped/chats is not finished; make it with"):
        run("--run", "new", "--from", "bootstrapped/1_align=elsewhere", "--stage", "2_tune")


def test_one_rank_runs_a_procedure(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run("--stage", "requests")[0] == 0
    assert not Path("runs").exists()
    monkeypatch.setenv("RANK", "0")
    assert run("--stage", "requests")[0] == 0
    assert Path("runs/bootstrapped/requests/finished.json").exists()


class Parsed:
    recipe, demo, stage = "bootstrapped", False, "1_align"


def test_tools_read_the_data_of_finished_nodes(recipe: Path) -> None:
    parsed: Any = Parsed()
    with pytest.raises(UserError, match="the data of requests is not made yet"):
        stage_options(parsed)
    assert run("--stage", "requests")[0] == 0
    assert "runs/bootstrapped/1_align/configs/1_align.yaml" in stage_options(parsed)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "run: instruct",
            "run: capture",
            r"chats\.run: there is no procedure 'capture'; choose one of android-screens",
        ),
        ("needs: [1_align, requests]", "needs: [1_align, requests, 2_tune]", "wait for one another"),
        ("needs: [chats]", "needs: [1_align]", r"stages\.2_tune\.needs\[0\]: there is no other stage '1_align'"),
        ('"${1_align}"]', '"${2_tune}"]', r"stages\.chats\.arguments\[9\]: \$\{2_tune\} is not what it needs"),
        ('--out, "${writes}", --endpoint, URL, --model, writer', "--out, x", r"chats\.demo: says nowhere where it"),
        ("writes: chats.json", "writes: ../chats.json", r"chats\.writes: '\.\./chats\.json' is no name"),
        ("writes: chats.json", "", "stages.chats: key 'writes' is missing"),
    ],
)
def test_a_wrong_node_is_refused(recipe: Path, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    recipe.write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        load_recipe(recipe)


def test_a_place_without_a_need_is_refused(recipe: Path) -> None:
    (recipe.parent / "1_align.yaml").write_text("path: ${chats}\n")
    with pytest.raises(UserError, match=r"1_align\.yaml: \$\{chats\} is not what this stage needs \(requests\)"):
        run("--dry-run")
    (recipe.parent / "1_align.yaml").write_text("path: x\n")
    with pytest.raises(UserError, match=r"no configuration file of this stage names \$\{requests\}, which it needs"):
        run("--dry-run")
    with pytest.raises(UserError, match=r"stages\.requests\.demo is missing"):
        run("--demo", "--dry-run")
    with pytest.raises(UserError, match="1_align cannot do without requests"):
        run("--skip", "requests")
