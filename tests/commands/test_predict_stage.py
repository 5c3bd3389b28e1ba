"""`vlm predict -c ...`: every sample of `data.predict_sources` once, in one file, on any number of ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import cli
from callbacks import AnswerWriter
from tests.commands.test_cli import World
from tests.support.ranks import run_ranks


class Asked:
    """A finished stage, questions about its images, and the command that asks them."""

    def __init__(self, folder: Path) -> None:
        world = World(folder)
        assert world.fit("--trainer.max_steps=1") == 0
        self.folder, self.weights = folder, world.run
        records = [
            {
                "id": f"q{i}",
                "image": f"{i}.png",
                "conversations": [{"from": "human", "value": f"<image>\nWhat is number {i}?"}],
            }
            for i in range(6)
        ]
        (folder / "questions.json").write_text(json.dumps(records))
        source = {"class_path": "vlm.data.LlavaJson", "init_args": {"path": str(folder / "questions.json")}}
        config = {
            "data": {
                "class_path": "vlm.data.InstructionData",
                "init_args": {"predict_sources": [source], "val_batch_size": 2},
            },
            "answers": {"decoding": {"max_new_tokens": 4}},
            "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
        }
        (folder / "asked.yaml").write_text(yaml.safe_dump(config))

    def predict(self, out: str, *options: str) -> int:
        named = ["--weights", str(self.weights), "--answers.out", str(self.folder / out)]
        return cli.main(["predict", "-c", str(self.folder / "asked.yaml"), *named, *options])

    def rows(self, out: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / out).read_text().splitlines()]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return Asked(tmp_path_factory.mktemp("asked"))


@pytest.fixture(scope="module")
def whole(asked: Asked) -> list[dict[str, Any]]:
    """What one device answers."""
    assert asked.predict("whole.jsonl") == 0
    return asked.rows("whole.jsonl")


def _on_ranks(asked: Asked, out: str, *options: str) -> int:
    return asked.predict(out, "--trainer.devices=2", *options)


def test_one_file_in_the_order_of_the_data(
    asked: Asked, whole: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert [row["id"] for row in whole] == [f"q{i}" for i in range(6)]
    assert whole[3]["images"] == ["3.png"]
    assert whole[3]["prompt"] == "What is number 3?"
    module = cli.vlm.load(asked.weights)
    quick = ["--image", str(asked.folder / "3.png"), "--prompt", "What is number 3?", "--max_new_tokens", "4"]
    assert cli.main(["predict", "--weights", str(asked.weights), *quick]) == 0
    assert capfd.readouterr().out.strip().endswith(whole[3]["answer"])
    assert module.decoding is None
    assert not (asked.folder / "whole.jsonl.parts").exists()
    assert asked.predict("whole.jsonl") == 2
    assert "whole.jsonl: exists already" in capfd.readouterr().err


def test_killed_and_started_again_on_two_ranks(
    asked: Asked, whole: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def die(self: AnswerWriter, *args: Any, **kwargs: Any) -> None:
        write(self, *args, **kwargs)
        raise RuntimeError("killed")

    write = AnswerWriter.on_predict_batch_end
    monkeypatch.setattr(AnswerWriter, "on_predict_batch_end", die)
    with pytest.raises(RuntimeError, match="killed"):
        asked.predict("killed.jsonl")
    monkeypatch.undo()
    part = asked.folder / "killed.jsonl.parts" / "answers-0.jsonl"
    assert len(part.read_text().splitlines()) == 2
    part.write_text(part.read_text() + '[4, {"id": "q')
    assert not (asked.folder / "killed.jsonl").exists()
    assert asked.predict("killed.jsonl", "--answers.decoding.max_new_tokens=5") == 2
    assert "its answers have other decoding" in capfd.readouterr().err
    assert run_ranks(_on_ranks, 2, asked, "killed.jsonl", "--trainer.strategy=ddp") == [0, 0]
    assert asked.rows("killed.jsonl") == whole
    assert not part.parent.exists()


def test_what_cannot_be_answered_is_named_and_asked_again(
    asked: Asked, whole: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    image = asked.folder / "4.png"
    kept = image.read_bytes()
    image.write_bytes(b"no image")
    assert asked.predict("bad.jsonl") == 1
    said = capfd.readouterr()
    assert "not answered" in said.err
    assert "sample 'q4': image '4.png' is not a readable" in said.err
    assert "1 of 6 samples could not be answered" in said.out
    assert asked.rows("bad.jsonl") == [row for row in whole if row["id"] != "q4"]
    image.write_bytes(kept)
    assert asked.predict("bad.jsonl") == 0
    assert "5 of 6 samples are answered already" in capfd.readouterr().out
    assert asked.rows("bad.jsonl") == whole


def test_more_ranks_than_samples_of_a_sharded_system_and_choices(asked: Asked, whole: list[dict[str, Any]]) -> None:
    one = json.loads((asked.folder / "questions.json").read_text())[:1]
    (asked.folder / "one.json").write_text(json.dumps(one))
    source = [{"class_path": "vlm.data.LlavaJson", "init_args": {"path": str(asked.folder / "one.json")}}]
    options = (f"--data.init_args.predict_sources={json.dumps(source)}",)
    sharded = '--trainer.callbacks={"class_path": "MixedPrecisionFSDP", "init_args": {"precision": "32-true"}}'
    assert run_ranks(_on_ranks, 2, asked, "one.jsonl", "--trainer.strategy=fsdp2", sharded, *options) == [0, 0]
    assert asked.rows("one.jsonl")[0]["answer"] == whole[0]["answer"]
    assert asked.predict("chosen.jsonl", *options, '--answers.decoding.candidates=["yes", "no"]') == 0
    assert asked.rows("chosen.jsonl")[0]["answer"] in ("yes", "no")


def test_a_trial_leaves_nothing_and_a_shortened_one_goes_on(
    asked: Asked, whole: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert asked.predict("short.jsonl", "--trainer.fast_dev_run=true") == 0
    assert not list(asked.folder.glob("short.jsonl*"))
    assert asked.predict("short.jsonl", "--trainer.limit_predict_batches=1") == 0
    assert "4 of 6 samples were not asked" in capfd.readouterr().out
    assert not (asked.folder / "short.jsonl").exists()
    assert asked.predict("short.jsonl") == 0
    assert asked.rows("short.jsonl") == whole
