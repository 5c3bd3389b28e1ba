"""Where a network's tensors come from."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from tests.support.systems import LLAMA, TOWER, llava_1_5
from vlm.building.network import empty_weights, find_ties
from vlm.errors import UserError
from vlm.language import CausalLM
from vlm.stages import Stage, Trained
from vlm.vision import TimmTower

FAMILIES = ("llama", "mistral", "qwen2", "gemma")


def language_folder(folder: Path, family: str = "llama", **changes) -> Path:
    config = AutoConfig.for_model(family, **{k: v for k, v in LLAMA.items() if k != "model_type"}, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="3MB")
    return folder


def hub_cache(root: Path, name: str, files: Path) -> None:
    """A folder as the hub's client keeps it, so that `name` opens without a network."""
    repository = root / f"models--{name.replace('/', '--')}"
    shutil.copytree(files, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_from_a_folder(family: str, tmp_path: Path) -> None:
    folder = language_folder(tmp_path / "lm", family)
    module = llava_1_5(language=CausalLM(path=str(folder)))
    module.configure_model()
    reference = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(module.language.state_dict()[name], tensor), name
    report = module.load_report
    assert report is not None
    assert not any(name.startswith("language.") for name in report.new)
    assert report.sources == {f"base weights of language ({folder})": len(list(reference.parameters()))}


def test_a_language_model_from_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(tmp_path / "hub", "someone/small", language_folder(tmp_path / "lm"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    module = llava_1_5(language=CausalLM(path="someone/small"))
    module.configure_model()
    assert torch.equal(
        module.language.get_input_embeddings().weight,
        AutoModelForCausalLM.from_pretrained(tmp_path / "lm").get_input_embeddings().weight,
    )


@pytest.mark.parametrize("layout", ["hf", "timm"])
def test_a_tower_in_either_layout(layout: str, tmp_path: Path) -> None:
    config = CLIPVisionConfig(
        image_size=28, patch_size=7, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128
    )
    reference = CLIPVisionModel(config).eval()
    folder = tmp_path / "tower"
    reference.save_pretrained(folder)
    if layout == "timm":  # through our own names into timm's whole network
        whole = timm.create_model("vit_large_patch14_clip_quickgelu_336", num_classes=0, **TOWER)
        tower = llava_1_5(vision=tower_config(str(folder), layer=-1))
        tower.configure_model()
        whole.load_state_dict(tower.vision.trunk.state_dict(), strict=False)
        shutil.rmtree(folder)
        folder.mkdir()
        save_file(whole.state_dict(), folder / "model.safetensors")
    module = llava_1_5(vision=tower_config(str(folder)))
    module.configure_model()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        theirs = reference(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        # float32 noise between fused and separate projections: 1e-6 seen
        torch.testing.assert_close(module.vision(pixels), theirs, atol=1e-5, rtol=1e-5)


def tower_config(weights: str | None, layer: int = -2) -> TimmTower:
    return TimmTower("vit_large_patch14_clip_quickgelu_336", layer=layer, weights=weights, options=TOWER)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = language_folder(tmp_path / "lm")
    with pytest.raises(UserError, match=r"language\.model\..* has shape .*, the network"):
        llava_1_5(language=CausalLM(path=str(folder), config={"intermediate_size": 64})).configure_model()
    with pytest.raises(UserError, match=r"no place in the network, such as language\.model\.layers\.1"):
        llava_1_5(language=CausalLM(path=str(folder), config={"num_hidden_layers": 1})).configure_model()
    with pytest.raises(UserError, match=r"in the network but not in the checkpoint"):
        llava_1_5(language=CausalLM(path=str(folder), config={"num_hidden_layers": 3})).configure_model()
    for file in folder.glob("*.safetensors"):
        save_file({k: v.clone() for k, v in load_file(file).items() if "lm_head" not in k}, file)
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        llava_1_5(language=CausalLM(path=str(folder))).configure_model()


def test_values_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    one, same, other = llava_1_5(seed=1), llava_1_5(seed=1), llava_1_5(seed=2)
    one.configure_model()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(9)
    same.stage = Stage("s", {"connector": Trained(1.0)})
    same.configure_model()
    other.configure_model()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(one.connector[0].weight, other.connector[0].weight)
    assert one.language.model.norm.weight.eq(1).all()


def test_nothing_is_left_empty_and_buffers_are_real() -> None:
    module = llava_1_5()
    module.configure_model()
    everything = [*module.parameters(), *module.buffers()]
    assert not any(tensor.is_meta for tensor in everything)
    assert all(tensor.isfinite().all() for tensor in everything)
    inverse = module.language.model.rotary_emb.inv_freq
    torch.testing.assert_close(inverse, 10000.0 ** -(torch.arange(0, 8, 2) / 8))
    report, weight = module.load_report, module.connector[0].weight
    module.configure_model()  # Lightning calls again for validate after fit
    assert module.load_report is report
    assert module.connector[0].weight is weight


def test_empty_weights_keep_ties_and_take_no_memory() -> None:
    with empty_weights():
        model = CausalLM(config={**LLAMA, "tie_word_embeddings": True}).build()
    assert find_ties(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.nn.Linear(2, 2).weight.is_cpu


def test_two_tensors_for_one_are_refused(tmp_path: Path) -> None:
    """A head of its own in the file, and a description that ties it to the embeddings."""
    folder = language_folder(tmp_path / "lm")
    module = llava_1_5(language=CausalLM(path=str(folder), config={"tie_word_embeddings": True}))
    with pytest.raises(UserError, match=r"lm_head.weight and .*embed_tokens.weight differ"):
        module.configure_model()


def test_a_tensor_that_nothing_draws_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalLM, "initialise", lambda *_: None)
    with pytest.raises(AssertionError, match=r"nothing draws \['weight'\] of Embedding"):
        llava_1_5().configure_model()
