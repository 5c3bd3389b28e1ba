"""What a stage trains: patterns, modes, groups, schedule."""

import math

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from vlm.errors import UserError
from vlm.schedules import Schedule
from vlm.stages import Stage, Trained


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.ModuleDict(
            {"embed": nn.Embedding(3, 4), "blocks": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))}
        )
        self.connector = nn.Linear(4, 4)
        self.language = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.LayerNorm(4))


def test_exactly_the_named_parameters_take_gradients() -> None:
    network = Network()
    Stage("s", {"connector": Trained(1.0), "language.*.bias": Trained(1.0)}).set_trainable(network)
    assert {n for n, p in network.named_parameters() if p.requires_grad} == {
        "connector.weight",
        "connector.bias",
        "language.0.bias",
        "language.2.bias",
    }
    assert network.connector.training
    assert not network.vision.training
    assert not network.language[1].training  # a module without trained parameters is in eval mode, dropout too


def test_published_modes_win() -> None:
    network = Network()
    stage = Stage("s", {"language": Trained(1.0)}, modes={"language.1": "train", "language.2": "eval"})
    stage.set_trainable(network)
    assert network.language[1].training
    assert not network.language[2].training


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"conector": Trained(1.0)}, "'conector' matches no parameter; the parts are connector, language, vision"),
        ({"language": Trained(1.0), "language.0": Trained(2.0)}, r"both match language\.0\.weight"),
    ],
)
def test_bad_patterns(train: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Stage("s", train).set_trainable(Network())


def test_a_stray_gradient_is_an_error() -> None:
    network = Network()
    stage = Stage("s", {"connector": Trained(1.0)})
    stage.set_trainable(network)
    network.vision.requires_grad_(True)
    with pytest.raises(UserError, match=r"vision\..* takes gradients but is in no group"):
        stage.optimizer_groups(network)


def test_layer_decay_and_exempt_vectors() -> None:
    network = Network()
    stage = Stage("s", {"vision": Trained(1.0, weight_decay=0.1, decay_vectors=False, layer_decay=0.5)})
    stage.set_trainable(network)
    found = {}
    for group in stage.optimizer_groups(network):
        for name, _ in group["params"]:
            found[name] = (group["lr"], group["weight_decay"])
    assert found["vision.blocks.2.weight"] == (0.5, 0.1)
    assert found["vision.blocks.0.weight"] == (0.125, 0.1)
    assert found["vision.blocks.0.bias"] == (0.125, 0.0)
    assert found["vision.embed.weight"] == (0.0625, 0.1)
    assert len(found) == 7


def test_cosine_equals_the_published_trainer() -> None:
    total, optimizer = 37, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * total), total)
    schedule = Schedule("cosine", warmup=0.03)
    for step in range(total):
        assert schedule.factor(step, total) == pytest.approx(reference.lr_lambdas[0](step), abs=1e-12)


def official(kind: str, epoch: int, index: int, *, steps: int, epochs: int) -> float:
    """Learning rate at step `index` of an epoch, as the published loops set it: numbers of BLIP, LAVIS, MiniGPT-4."""
    step = epoch * steps + index
    if kind == "blip pretraining":  # 1e-6 -> 3e-4 over 30 steps in epoch 0, then 0.9 per epoch, not below 1e-6
        warm = min(3e-4, 1e-6 + (3e-4 - 1e-6) * index / 30)
        return warm if epoch == 0 and index < 30 else max(1e-6, 3e-4 * 0.9**epoch)
    if kind == "blip fine-tuning":  # cosine per epoch to 0
        return (1e-5 - 0.0) * 0.5 * (1 + math.cos(math.pi * epoch / epochs)) + 0.0
    if kind == "lavis":  # warm-up by step in epoch 0 alone, then cosine per epoch
        if epoch == 0:
            return min(1e-4, 1e-6 + (1e-4 - 1e-6) * index / 20)
        return (1e-4 - 1e-5) * 0.5 * (1 + math.cos(math.pi * epoch / epochs)) + 1e-5
    assert kind == "minigpt-4"  # both by step, the cosine over all steps
    if step < 50:
        return min(1e-4, 1e-6 + (1e-4 - 1e-6) * step / 50)
    return (1e-4 - 8e-5) * 0.5 * (1 + math.cos(math.pi * step / (epochs * steps))) + 8e-5


@pytest.mark.parametrize(
    ("kind", "peak", "schedule"),
    [
        ("blip pretraining", 3e-4, Schedule("staircase", warmup=30, start=1 / 300, final=1 / 300, decay=0.9)),
        ("blip fine-tuning", 1e-5, Schedule("cosine_per_epoch")),
        ("lavis", 1e-4, Schedule("cosine_per_epoch", warmup=20, start=0.01, final=0.1)),
        ("minigpt-4", 1e-4, Schedule("cosine", warmup=50, start=0.01, final=0.8, from_start=True)),
    ],
)
def test_rates_of_the_published_loops(kind: str, peak: float, schedule: Schedule) -> None:
    steps, epochs = 40, 60  # so many that the staircase reaches its floor
    for epoch in range(epochs):
        for index in range(steps):
            expected = official(kind, epoch, index, steps=steps, epochs=epochs)
            found = schedule.factor(epoch * steps + index, steps * epochs, epoch=epoch, epochs=epochs)
            assert peak * found == pytest.approx(expected, rel=1e-12), (epoch, index)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"kind": "staircase"}, "stage.schedule.decay belongs to kind: staircase, which needs it"),
        ({"decay": 0.9}, "found kind: cosine"),
        ({"kind": "cosine_per_epoch", "from_start": True}, "from_start is for kind: cosine or linear"),
    ],
)
def test_schedules_that_say_nothing(mistake: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Schedule(**mistake)


def test_epochs_do_not_continue() -> None:
    schedule = Schedule("staircase", decay=0.9, total_steps=8)
    with pytest.raises(UserError, match=r"stage\.continues: epochs begin at 0 again"):
        Stage("s", {"connector": Trained(1.0)}, continues="a", schedule=schedule)


def test_linear_and_constant() -> None:
    assert [Schedule("linear", final=0.5).factor(s, 4) for s in range(5)] == [1.0, 0.875, 0.75, 0.625, 0.5]
    assert [Schedule("constant", warmup=2, start=0.5).factor(s, 9) for s in range(4)] == [0.5, 0.75, 1.0, 1.0]
