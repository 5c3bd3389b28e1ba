"""What a stage trains: patterns, modes, groups, schedule."""

import math

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from vlm.errors import UserError
from vlm.stages import Schedule, Stage, Trained


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


def test_linear_and_constant() -> None:
    assert [Schedule("linear", final=0.5).factor(s, 4) for s in range(5)] == [1.0, 0.875, 0.75, 0.625, 0.5]
    assert [Schedule("constant", warmup=2, start=0.5).factor(s, 9) for s in range(4)] == [0.5, 0.75, 1.0, 1.0]
