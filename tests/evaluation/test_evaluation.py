"""Validation and test: every sample is answered once and judged, and training does not notice."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from torch import distributed

import cli
from callbacks import Evaluation
from tests.support.ranks import run_ranks
from tests.support.samples import picture, samples
from tests.support.systems import make
from tests.commands.test_cli import World
from tests.support.training import ListSource, trainer
from vlm.data import BatchSpec, InstructionData
from vlm.data.modules.passes import split
from vlm.data.wrappers.shuffled_images import ShuffledImages
from vlm.data.sources.base import Concat
from vlm.errors import UserError
from vlm.evaluation.judges import AnswerJudge, Judges
from vlm.language import Decoding
from vlm.metrics import CIDErD, ExactMatch
from vlm.sample import Sample
from vlm.evaluation.scores import table

ANSWERS = {"vqa": ("red", "blue"), "caption": ("a red ball",)}


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    for i, record in enumerate(made.records):
        task = ("vqa", "caption", "chat")[i % 3]
        record |= {"task": task, "answers": list(ANSWERS.get(task, ()))}
    return made


def judged(folder: Path) -> list[Sample]:
    """Seven samples of `vqa`, two of them with two pictures, and one of `caption`."""
    tasks = ["vqa"] * 7 + ["caption"]
    return [
        dataclasses.replace(sample, task=task, answers=tuple((text, 1.0) for text in ANSWERS[task]))
        for sample, task in zip(samples(folder, 8), tasks, strict=True)
    ]


def evaluate(folder: Path, strategy: str | None) -> dict[str, float]:
    here = (distributed.get_world_size(), distributed.get_rank()) if distributed.is_initialized() else (1, 0)
    callback = Evaluation({"vqa": ExactMatch(), "caption": [CIDErD()]}, Decoding(max_new_tokens=4))
    options = {"strategy": "ddp"} if strategy == "ddp" else {"fsdp": strategy}
    run = trainer(folder / f"{strategy}", world=here[0], callbacks=[callback], **options)
    data = InstructionData([], batch=BatchSpec(1), val_sources=[ListSource(judged(folder))], val_batch_size=2)
    module = make("llava_1_5")
    run.validate(module, data, verbose=False)
    return {name: value.item() for name, value in run.callback_metrics.items()}


def written(folder: Path, strategy: str | None) -> list[dict[str, Any]]:
    lines = (folder / f"{strategy}" / "evaluation" / "validate" / "answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_sample_is_answered_once_under_any_strategy(tmp_path: Path) -> None:
    samples(tmp_path, 8)  # before the ranks would write the same files
    logged, rows = evaluate(tmp_path, None), written(tmp_path, None)
    assert Counter(row["id"] for row in rows) == Counter(map(str, range(8)))
    assert [row["references"] for row in rows if row["task"] == "vqa"] == [["red", "blue"]] * 7
    assert set(logged) == {"val/loss", "val/vqa/exact_match", "val/caption/cider_d"}
    module = make("llava_1_5")
    module.stage = None
    module.configure_model()
    alone = {s.id: module.generate([s], decoding=Decoding(max_new_tokens=4))[0] for s in judged(tmp_path)}
    assert {row["id"]: row["answer"] for row in rows} == alone
    for strategy in ("ddp", "32-true"):
        ranks = run_ranks(evaluate, 2, tmp_path, strategy)
        assert ranks == [pytest.approx(logged, rel=1e-5)] * 2
        assert written(tmp_path, strategy) == rows


def test_training_does_not_notice_validation(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, float]] = []

    def note(self: Evaluation, run: Trainer, module: LightningModule) -> None:
        seen.append({name: value.item() for name, value in run.callback_metrics.items() if name.count("/") == 2})

    monkeypatch.setattr(Evaluation, "on_train_batch_start", lambda self, run, module, *_: note(self, run, module))
    world.stage = "2_finetune"
    world.options = ["--trainer.max_epochs=2"]
    dropout = "--model.init_args.language.init_args.config.attention_dropout=0.2"
    assert world.fit("--stage.follows=[]", dropout) == 0
    plain = (world.run / "artefact" / "model.safetensors").read_bytes()
    source = {"class_path": "vlm.data.LlavaJson", "init_args": {"path": str(world.folder / "data.json")}}
    world.run = world.folder / "validated"
    metrics = {"vqa": "vlm.metrics.ExactMatch", "caption": ["vlm.metrics.CIDErD", "vlm.metrics.BLEU"]}
    options = [
        f"--data.init_args.val_sources={json.dumps([source])}",
        f"--evaluation.metrics={json.dumps(metrics)}",
        "--evaluation.decoding.max_new_tokens=3",
        "--trainer.val_check_interval=1",
    ]
    assert world.fit("--stage.follows=[]", dropout, *options) == 0, capfd.readouterr().err
    assert set(seen[-1]) == {
        "val/vqa/exact_match",
        "val/caption/cider_d",
        *(f"val/caption/bleu_{n}" for n in range(1, 5)),
    }
    assert (world.run / "artefact" / "model.safetensors").read_bytes() == plain


def test_commands_print_and_write_scores(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    assert world.fit() == 0
    source = {"class_path": "vlm.data.LlavaJson", "init_args": {"path": str(world.folder / "data.json")}}
    config = world.folder / "judge.yaml"
    content = {
        "evaluation": {"metrics": {"vqa": "vlm.metrics.ExactMatch"}, "decoding": {"max_new_tokens": 3}},
        "data": {
            "class_path": "vlm.data.InstructionData",
            "init_args": {"sources": [], "batch": {"size": 1}, "test_sources": [source]},
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    config.write_text(json.dumps(content))
    capfd.readouterr()
    # the system comes out of the artefact
    assert cli.main(["test", "-c", str(config), "--weights", str(world.run)]) == 0
    out = capfd.readouterr().out
    assert "vqa/exact_match   0.0000        2" in out
    folder = world.run / "evaluation" / "test"
    found = json.loads((folder / "scores.json").read_text())
    assert found["counts"] == {"vqa": 2}
    assert set(found["scores"]) == {"loss", "vqa/exact_match"}
    options = ["--data.init_args.shuffle_images=true", "--evaluation.name=shuffled"]
    assert cli.main(["test", "-c", str(config), "--weights", str(world.run), *options]) == 0
    capfd.readouterr()
    shuffled = world.run / "evaluation" / "shuffled"
    assert cli.main(["scores", f"trained={folder}", f"shuffled={shuffled}"]) == 0
    head, *_, last = capfd.readouterr().out.splitlines()
    assert head.split() == ["trained", "shuffled", "answers"]
    assert last.split() == ["vqa/exact_match", "0.0000", "0.0000", "2"]
    world.command = "test"
    assert world.fit("--weights=untrained", f"--data.init_args.test_sources={json.dumps([source])}") == 0
    assert "loss" in capfd.readouterr().out

    def error(*options: str) -> str:
        assert cli.main(["test", "-c", str(config), "--weights", str(world.run), *options]) == 2
        return capfd.readouterr().err.strip()

    assert error("--evaluation.metrics.vqq=vlm.metrics.ExactMatch").endswith(
        "evaluation.metrics: no sample is of the source or task 'vqq'; there are caption, chat, data, vqa"
    )
    assert "name at least one metric" in error("--evaluation.metrics.vqa=[]")
    assert "evaluation.name is the name of a folder" in error("--evaluation.name=../x")
    assert cli.main(["scores", "trained"]) == 2
    assert "'trained' is not NAME=FOLDER" in capfd.readouterr().err
    assert cli.main(["scores", f"a={world.folder / 'data.json'}"]) == 2
    assert "holds no scores" in capfd.readouterr().err
    world.records[0] |= {"answers": []}
    (world.folder / "data.json").write_text(json.dumps(world.records))
    assert "data.json: sample 's0': has no 'answers' to compare with" in error()
    world.records[2]["conversations"].pop()
    (world.folder / "data.json").write_text(json.dumps(world.records))
    assert "sample 's2': has no answer to score, and evaluation.metrics names neither its source 'data' nor" in error()


def test_metrics_of_a_source_come_before_those_of_its_task(tmp_path: Path) -> None:
    source = Concat([ListSource(judged(tmp_path))])
    assert split(source, Judges()) == {None: range(8)}
    everything = list(range(8))
    assert split(source, Judges({"list": AnswerJudge([ExactMatch()])})) == {None: everything, "list": everything}
    both = {"caption": AnswerJudge([CIDErD()]), "vqa": AnswerJudge([ExactMatch()])}
    assert split(source, Judges(both)) == {None: everything, "caption": [7], "vqa": everything[:7]}
    with pytest.raises(UserError, match="no sample is of the source or task 'vqa'"):
        split(source, Judges(dict.fromkeys(("list", "vqa"), AnswerJudge([ExactMatch()]))))


def test_shuffled_pictures_are_those_of_another_picture(tmp_path: Path) -> None:
    files = [picture(tmp_path, f"p{i}", (20, 20), i) for i in range(4)]
    one = samples(tmp_path, 1)[0]
    shown = [files[0], files[0], files[1], files[2]]  # two questions about one picture
    made = [dataclasses.replace(one, id=str(i), images=(file,)) for i, file in enumerate(shown)]
    text = dataclasses.replace(one, id="text", messages=one.messages[1:], images=())
    shuffled = ShuffledImages(ListSource([*made, text]), seed=3)
    assert len(shuffled) == 5
    assert shuffled[4] == text
    for before, after in zip(made, (shuffled[i] for i in range(4)), strict=True):
        assert after.images != before.images
        assert (after.id, after.messages) == (before.id, before.messages)
    with pytest.raises(UserError, match="all show the same"):
        ShuffledImages(ListSource(made[:2]))


def test_table() -> None:
    columns = {"trained": {"loss": 1.0, "mme/perception": 1510.74}, "untrained": {"mme/perception": None}}
    assert table(columns, {"mme": 2374}).splitlines() == [
        "                trained  untrained  answers",
        "loss             1.0000          -",
        "mme/perception   1510.7          -     2374",
    ]
