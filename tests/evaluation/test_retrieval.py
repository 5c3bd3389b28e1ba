"""Retrieval: the figures against a count by hand, alone and on ranks that have unequally many samples, or none."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from callbacks import Evaluation
from tests.support.blip import blip
from tests.support.ranks import run_ranks
from tests.support.samples import pairs
from tests.support.systems import llava_1_5
from tests.support.training import ListSource, trainer
from vlm.data import InstructionData
from vlm.errors import UserError
from vlm.evaluation import retrieval_table
from vlm.evaluation.inference import as_pack
from vlm.evaluation.retrieval import Retrieval
from vlm.evaluation.retrieval_table import similarities
from vlm.systems import BLIP

RANKS = (1, 2, 4)


def finding() -> BLIP:
    module = blip(dropout=0.0)
    module.configure_model()
    return module


def found(module: BLIP, samples: list[Any], *, rerank: int = 0, pack: int = 3) -> dict[str, float]:
    judge = Retrieval(RANKS, rerank=rerank, batch_size=5)
    judge.start(torch.device("cpu"))
    for start in range(0, len(samples), pack):
        batch = as_pack(module, samples[start : start + pack], generate=False)
        with torch.no_grad():
            judge.hear(judge.ask(module, batch), batch.samples)
    return judge.finish(module)


def by_hand(module: BLIP, samples: list[Any], *, rerank: int) -> dict[str, float]:
    """The same with a table of all pairs and plain loops."""
    embeddings = module.embed(samples)
    scores = (embeddings.image @ embeddings.text.T).tolist()
    table: dict[str, list[list[float]]] = {"TR": scores, "IR": [list(column) for column in zip(*scores, strict=True)]}
    images, owners = list(range(len(samples))), embeddings.owner.tolist()
    figures = {}
    for direction, rows in table.items():
        firsts = []
        for at, row in enumerate(rows):
            if rerank:
                row = list(row)
                for other in range(len(row)):
                    image, text = (at, other) if direction == "TR" else (other, at)
                    near = (
                        {
                            *sorted(range(len(owners)), key=lambda t: -scores[image][t])[:rerank],
                        },
                        {*sorted(range(len(samples)), key=lambda i: -scores[i][text])[:rerank]},
                    )
                    if text in near[0] or image in near[1]:
                        match = module.match(
                            embeddings.image_state[image : image + 1], embeddings.text_state[text : text + 1]
                        )
                        row[other] = scores[image][text] + float(match)
                    else:
                        row[other] = scores[image][text] - 100.0
            order = sorted(range(len(row)), key=lambda other: -row[other])
            own, theirs = (images, owners) if direction == "TR" else (owners, images)
            firsts.append(next(place for place, other in enumerate(order) if theirs[other] == own[at]))
        figures |= {f"{direction}@{k}": sum(first < k for first in firsts) / len(firsts) for k in RANKS}
    return figures


@pytest.mark.parametrize(("rerank", "products"), [(0, 1), (2, 1), (2, 30), (2, 10**6)])
def test_figures_are_those_of_a_count_by_hand(
    rerank: int, products: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many scores are made at a time."""
    monkeypatch.setattr(retrieval_table, "_PRODUCTS", products)
    module = finding()
    samples = pairs(tmp_path, 7)
    samples[5] = dataclasses.replace(samples[5], answers=(("a card", 1.0), ("two red balls", 1.0)))
    expected = by_hand(module, samples, rerank=rerank)
    assert len(set(expected.values())) > 2, "the case tells nothing apart"
    assert found(module, samples, rerank=rerank) == pytest.approx(expected, abs=1e-6)


def test_of_several_queries_the_best_one_counts() -> None:
    images, texts = torch.randn(3, 4, 8), torch.randn(5, 8)
    expected = torch.stack([(image @ texts.T).max(0).values for image in images])
    torch.testing.assert_close(similarities(images, texts), expected)


def _validated(folder: Path, strategy: str) -> dict[str, float]:
    """By the trainer, in which a sharded network has its parameters only inside of a step."""
    options = {"strategy": "ddp"} if strategy == "ddp" else {"fsdp": "32-true"}
    judge = Evaluation({"list": Retrieval(RANKS, rerank=2, batch_size=5)})
    run = trainer(folder / strategy, world=distributed.get_world_size(), callbacks=[judge], **options)
    module = blip(dropout=0.0)
    data = InstructionData(val_sources=[ListSource(pairs(folder, 7))], val_batch_size=2)
    run.validate(module, data, verbose=False)
    return {name: value.item() for name, value in run.callback_metrics.items() if "@" in name}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_trainer_finds_the_same_under_any_strategy(strategy: str, tmp_path: Path) -> None:
    alone = found(finding(), pairs(tmp_path, 7), rerank=2)
    named = {f"val/list/{name}": value for name, value in alone.items()}
    assert run_ranks(_validated, 2, tmp_path, strategy) == [pytest.approx(named, abs=1e-6)] * 2
    lines = (tmp_path / strategy / "evaluation" / "validate" / "answers.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["image"] for line in lines) == [str(i) for i in range(7)]


def _on_a_rank(folder: Path, shares: tuple[int, ...], rerank: int) -> dict[str, float]:
    rank = distributed.get_rank()
    start = sum(shares[:rank])
    return found(finding(), pairs(folder, sum(shares))[start : start + shares[rank]], rerank=rerank)


@pytest.mark.parametrize("shares", [(4, 3), (7, 0)])
def test_ranks_find_what_one_finds(shares: tuple[int, ...], tmp_path: Path) -> None:
    alone = found(finding(), pairs(tmp_path, sum(shares)), rerank=2)
    assert run_ranks(_on_a_rank, 2, tmp_path, shares, 2) == [pytest.approx(alone, abs=1e-6)] * 2


def test_a_rank_without_samples_embeds_a_filler(tmp_path: Path) -> None:
    module = finding()
    some = module.embed(pairs(tmp_path, 3), batch_size=2)
    assert some.owner.tolist() == [0, 1, 2]
    assert as_pack(module, [], generate=False).samples[0].id == "filler"


def test_an_image_without_a_text_is_named(tmp_path: Path) -> None:
    module = finding()
    judge = Retrieval()
    judge.start(torch.device("cpu"))
    batch = as_pack(module, pairs(tmp_path, 2), generate=False)
    with torch.no_grad():
        said = judge.ask(module, batch)
    judge.hear(said._replace(text=said.text[:1], owner=said.owner[:1]), batch.samples)
    with pytest.raises(UserError, match="sample '1' has no text to find"):
        judge.finish(module)


def test_what_cannot_be_asked() -> None:
    with pytest.raises(UserError, match="ranks and batch_size start at 1"):
        Retrieval([0])
    with pytest.raises(UserError, match="blip does not answer"):
        blip().answers(None, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="llava_1_5 has no embeddings"):
        llava_1_5().embeddings(None)  # type: ignore[arg-type]


def test_an_image_that_is_there_twice_is_named(tmp_path: Path) -> None:
    samples = [dataclasses.replace(sample, group="same") for sample in pairs(tmp_path, 2)]
    with pytest.raises(UserError, match="'same' is there 2 times"):
        found(finding(), samples)
