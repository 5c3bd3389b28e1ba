"""Families: whose a folder is, by its tensors and its settings; one that brings surgery; and what cannot be told."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

import cli
import vlm
from callbacks.stage_transition import write_stage
from tests.support.samples import samples
from tests.support.systems import TOKENIZER, llava_1_5
from vlm import registry
from vlm.building.instantiate import describe_module
from vlm.checkpoints.artefact import read_artefact
from vlm.checkpoints.published.one_folder import OneFolderFamily
from vlm.checkpoints.tables.rules import rename
from vlm.checkpoints.tables.table import Table
from vlm.commands.convert import convert
from vlm.errors import UserError
from vlm.language import PartialLoRA
from vlm.registry import System
from vlm.stages import Stage, Trained
from vlm.systems import LLaVA15


class Toy(LLaVA15):
    system = "toy"


class ToyFamily(OneFolderFamily):
    """Our own names behind a prefix; its settings say whether the network was trained with low-rank updates."""

    system = "toy"
    marks: ClassVar = {"official": "toy.language.lm_head.weight"}
    files = ("tokenizer.model",)

    def is_own(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == self.system

    def table(self, layout: str, config: Mapping[str, Any]) -> Table:
        return Table(layout=self.system, rules=(rename("toy.{rest}", "{rest}"),))

    def describe_folder(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        arguments = describe_module(Toy(**llava_1_5().arguments))["init_args"]
        tokenizer = arguments["tokenizer"] | {"init_args": arguments["tokenizer"]["init_args"] | {"path": str(folder)}}
        return {"class_path": f"{__name__}.Toy", "init_args": arguments | {"tokenizer": tokenizer}}

    def config(self, module: Any, layout: str) -> dict[str, Any]:
        return {"model_type": self.system, "lora_rank": next((found.rank for found in module.surgery), 0)}

    def surgery_of(self, config: Mapping[str, Any]) -> list[dict[str, Any]]:
        rank = config.get("lora_rank")
        return [{"class_path": "vlm.language.PartialLoRA", "init_args": {"rank": rank}}] if rank else []


class Toy4KFamily(ToyFamily):
    """The same tensors, and another system: its settings alone tell."""

    system = "toy_4k"


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    more = {
        "toy": System(f"{__name__}.Toy", f"{__name__}.ToyFamily"),
        "toy_4k": System(f"{__name__}.Toy", f"{__name__}.Toy4KFamily"),
    }
    monkeypatch.setattr(registry, "SYSTEMS", registry.SYSTEMS | more)


def trained(folder: Path, *, rank: int) -> Toy:
    module = Toy(**llava_1_5().arguments)
    module.surgery = [PartialLoRA(rank=rank)] if rank else []
    module.stage = Stage("1", {"vision": Trained(1.0), "connector": Trained(1.0), "language": Trained(1.0)})
    module.configure_model()
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    write_stage(folder / "artefact", module, global_step=1)
    return module


@pytest.mark.parametrize("rank", [2, 0])
def test_a_folder_brings_its_surgery_there_and_back(rank: int, toys: None, tmp_path: Path) -> None:
    module = trained(tmp_path / "run", rank=rank)
    convert(tmp_path / "run/artefact", tmp_path / "official", system="toy", target_layout="official")
    published = load_file(tmp_path / "official" / "model.safetensors")
    assert any("Plora_" in name for name in published) == (rank > 0)
    opened = vlm.load(tmp_path / "official")
    assert opened.system == "toy"
    state = opened.state_dict()
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    pool = samples(tmp_path, 2)
    for mine, theirs in zip(module.score(pool), opened.score(pool), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)  # the same numbers, whatever they are added up by

    convert(tmp_path / "official", tmp_path / "ours", system="toy", target_layout="ours")
    assert [spec["init_args"]["rank"] for spec in read_artefact(tmp_path / "ours").meta["surgery"]] == [rank] * (
        rank > 0
    )
    assert vlm.load(tmp_path / "ours").state_dict().keys() == state.keys()
    convert(tmp_path / "ours", tmp_path / "back", system="toy", target_layout="official")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == published.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in published.items())


def test_surgery_without_a_place_is_refused(toys: None, tmp_path: Path) -> None:
    module = trained(tmp_path / "run", rank=2)
    monkey = {"model_type": "toy"}
    family = ToyFamily()
    family.config = lambda module, layout: monkey  # type: ignore[method-assign]
    with pytest.raises(UserError, match="was changed by PartialLoRA, which published files have no place for"):
        family.open_artefact(tmp_path / "run/artefact", target="official", load=lambda path: module)


def folder_of(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    save_file({"toy.language.lm_head.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_belongs_to_one_family_or_to_none(
    toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm.checkpoints.published.open import family_of

    for system in ("toy", "toy_4k"):
        assert family_of(folder_of(tmp_path / system, model_type=system)).system == system
    with pytest.raises(UserError, match=r"its config\.json is not that of toy_4k; check --system"):
        convert(tmp_path / "toy", tmp_path / "x", system="toy_4k", target_layout="ours")
    nobody = folder_of(tmp_path / "nobody", model_type="toy_8k")
    assert cli.main(["predict", "--weights", str(nobody), "--prompt", "Hello"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(nobody) in line
    for looked_for in ("toy_4k: toy.language.lm_head.weight, and its config.json", "llava_next: image_newline"):
        assert looked_for in line
    monkeypatch.setattr(Toy4KFamily, "is_own", lambda self, config: True)
    with pytest.raises(
        UserError, match=r"looks like a folder of toy \(.*\) and toy_4k \(.*\); convert it with --system"
    ):
        family_of(tmp_path / "toy")
    with pytest.raises(
        UserError, match="partial: no published folders are known of it, only of blip, blip2, cogagent, cogvlm, "
    ):
        convert(tmp_path / "toy", tmp_path / "x", system="partial", target_layout="ours")


def test_the_tokenizer_is_copied(toys: None, tmp_path: Path) -> None:
    trained(tmp_path / "run", rank=0)
    convert(tmp_path / "run/artefact", tmp_path / "official", system="toy", target_layout="official")
    assert (tmp_path / "official/tokenizer.model").read_bytes() == Path(TOKENIZER.path).read_bytes()
