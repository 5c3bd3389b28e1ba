"""Adapters after their stage: merged into what follows, written for other tools, refused where they have no place."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm
from callbacks.stage_transition import write_stage
from tests.support.systems import RATE, llava_1_5
from tests.systems.test_contract import disturb
from tests.training.test_surgery import BLOCKS, TOWER, logits, make
from vlm.errors import UserError
from vlm.language import CausalLM, PeftAdapter
from vlm.stages import InitFrom, Stage


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder = tmp_path_factory.mktemp("base")
    module = llava_1_5()
    module.configure_model()
    module.language.save_pretrained(folder)
    return CausalLM(path=str(folder))


def trained(base: CausalLM, folder: Path, adapter: PeftAdapter, train: tuple[str, ...], **more: Any) -> Any:
    module = make(base, adapter, train=train, **more)
    disturb(module, module.trained_names())
    write_stage(folder, module, global_step=1)
    return module


@pytest.mark.parametrize("dora", [False, True])
def test_a_stage_starts_from_the_merged_weights(dora: bool, base: CausalLM, tmp_path: Path) -> None:
    adapter = PeftAdapter(rank=2, alpha=4, dora=dora)
    first = trained(base, tmp_path / "1", adapter, ("connector", "adapters"))
    other = PeftAdapter(rank=3, alpha=3, targets=["q_proj"], parts="language")
    follows = [InitFrom(str(tmp_path / "1"), merge=True)]
    second = make(base, other, train=("adapters",), follows=follows)
    assert second.surgery == [other]
    # W x + B A x and (W + B A) x: rounded elsewhere; 2e-7 seen
    torch.testing.assert_close(logits(second, tmp_path), logits(first, tmp_path), atol=2e-6, rtol=1e-5)
    disturb(second, second.trained_names())
    write_stage(tmp_path / "2", second, global_step=1)
    stored = json.loads((tmp_path / "2" / "stage.json").read_text())
    assert all(".q_proj.lora_" in name for name in stored["tensors"])
    assert torch.equal(logits(vlm.load(tmp_path / "2"), tmp_path), logits(second, tmp_path))

    third = make(base, train=("language",), follows=[InitFrom(str(tmp_path / "2"), merge=True)])  # two merges
    assert third.surgery == []
    torch.testing.assert_close(logits(third, tmp_path), logits(second, tmp_path), atol=2e-6, rtol=1e-5)
    write_stage(tmp_path / "3", third, global_step=1)
    assert torch.equal(logits(vlm.load(tmp_path / "3"), tmp_path), logits(third, tmp_path))

    with torch.no_grad():  # the first stage is trained again
        first.get_parameter("language.model.layers.0.mlp.up_proj.lora_B.default.weight").add_(1)
    write_stage(tmp_path / "1", first, global_step=1)
    with pytest.raises(UserError, match="whose content has changed since"):
        vlm.load(tmp_path / "2")
    changed = make(base, other, train=("adapters",), follows=follows).frozen_hashes  # what a resume compares
    assert {n for n, h in second.frozen_hashes.items() if changed[n] != h} == {
        "language.model.layers.0.mlp.up_proj.weight"
    }


def test_what_cannot_be_merged_is_said(base: CausalLM, tmp_path: Path) -> None:
    write_stage(tmp_path / "plain", make(base, train=("connector",)), global_step=1)
    with pytest.raises(UserError, match=r"trained without an adapter, so there is nothing to merge"):
        make(base, train=("connector",), follows=[InitFrom(str(tmp_path / "plain"), merge=True)])
    trained(base, tmp_path / "tower", PeftAdapter(rank=2, alpha=4, targets=[TOWER]), ("adapters",))
    with pytest.raises(UserError, match=r"vision.trunk.*comes from no weights, so there is nothing to merge"):
        make(base, train=("connector",), follows=[InitFrom(str(tmp_path / "tower"), merge=True)])


def test_a_stage_that_cannot_be_meant_is_refused(base: CausalLM) -> None:
    adapter = PeftAdapter(rank=2, alpha=4)
    for train, words in {
        ("connector",): "the adapter would not be trained; add `adapters: {lr: 2.0e-4}`",
        ("language", "adapters"): "'language' trains language as a whole and its adapter with it; leave one of",
        ("language",): r"trained as a whole although an adapter lies over it; train `adapters` in the place of",
    }.items():
        with pytest.raises(UserError, match=words):
            make(base, adapter, train=train)
    with pytest.raises(UserError, match=r"no adapters to train; add callbacks\.LoRAInjection"):
        make(base, train=("adapters",))
    for wrong, words in {
        PeftAdapter(rank=2, alpha=4, parts="sight"): "has no part 'sight'; its parts are vision, connector, language",
        PeftAdapter(rank=2, alpha=4, parts="connector"): "connector has no linear layer in blocks",
        PeftAdapter(rank=2, alpha=4, parts="vision", targets=["q_proj"]): "target 'q_proj' matches no linear layer",
    }.items():
        with pytest.raises(UserError, match=words):
            make(base, wrong, train=("adapters",))
    both = PeftAdapter(rank=2, alpha=4, parts="both")
    assert both.find_layers(_plain(base)) == PeftAdapter(rank=2, alpha=4, targets=[BLOCKS, TOWER]).find_layers(
        _plain(base)
    )
    assert Stage("x", {"adapters": RATE}).assign(["language.q.lora_A.default.weight", "language.q.Plora_A.weight"]) == {
        "language.q.lora_A.default.weight": "adapters"
    }


def _plain(base: CausalLM) -> Any:
    return make(base, train=("connector",))
