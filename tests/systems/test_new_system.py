"""A system unlike the others (`tests/support/qformer_t5.py`) needs no change to the core: two stages, and its own."""

from pathlib import Path

import pytest
import torch

import vlm
from callbacks import StageTransition
from tests.support.parity import assert_same_scores, assert_same_state
from tests.support.samples import samples
from tests.support.systems import SYSTEMS, TOKENIZER, build, make, qformer_t5
from tests.support.training import ListSource, trainer
from vlm.batch import IGNORE
from vlm.data import BatchSpec, InstructionData
from vlm.schedules import Schedule
from vlm.stages import InitFrom

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def test_two_stages_learn(tmp_path: Path) -> None:
    pool = samples(tmp_path, 8)
    losses, previous = [sum(-scores.sum().item() for scores in build("qformer_t5").score(pool))], ""
    for name, stage in SYSTEMS["qformer_t5"].stages.items():
        folder = tmp_path / name
        follows = [InitFrom(previous, dict(stage.parts))] if previous else []
        transition = StageTransition(name, dict(stage.train), follows=follows, schedule=Schedule("constant"))
        module = qformer_t5(split_prefix=True)
        run = trainer(folder, max_epochs=8, accumulate_grad_batches=2, callbacks=[transition])
        run.fit(module, InstructionData([ListSource(pool)], batch=BatchSpec(4)))
        previous = str(folder / "artefact")
        loaded = vlm.load(folder)
        losses.append(sum(-scores.sum().item() for scores in loaded.score(pool)))
        assert_same_state(loaded, module)
        assert_same_scores(loaded.score(pool), module.score(pool))
    assert losses[0] > losses[1] > losses[2]


def test_the_prefix_belongs_to_the_sample(tmp_path: Path) -> None:
    """It is cut in the first half of the answer, by the sample's seed alone, and never in evaluation."""
    sample, codec = samples(tmp_path)[0], make("qformer_t5", split_prefix=True).codec
    whole = codec.encode(sample)
    (text,), (decoder,) = whole.text, whole.rows["decoder"]
    length, points = len(decoder.ids) - 1, set()
    for seed in range(200):
        item = codec.encode(sample, seed=seed)
        (longer,), (shorter,) = item.text, item.rows["decoder"]
        point = len(longer.ids) - len(text.ids)
        points.add(point)
        assert torch.equal(longer.ids[-1 - point : -1], decoder.ids[1 : 1 + point])
        assert torch.equal(shorter.targets, decoder.targets[point:])
        assert item.counts == {"lm": float((shorter.targets != IGNORE).sum())}
        assert torch.equal(codec.encode(sample, seed=seed).text[0].ids, longer.ids)
    assert points == set(range(1, length // 2 + 1))
    assert len(text.slots["image"]) == 4
    assert text.ids[-1] == TOKENIZER.eos_id == decoder.targets[-1]
    assert torch.equal(codec.encode(sample, generate=True).text[0].ids, text.ids)
