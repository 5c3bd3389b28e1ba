"""Adapters after their stage: merged into what follows, written for other tools, refused where they have no place."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

import cli
import vlm
from callbacks import LoRAInjection, StageTransition
from callbacks.stage_transition import write_stage
from tests.support.samples import samples
from tests.support.systems import LLAMA, RATE, ROOT, SYSTEMS, llava_1_5
from tests.support.training import trainer
from tests.systems.test_contract import Planned, collate, disturb, values
from tests.training.test_surgery import BLOCKS, DECODING, TOWER, logits, make
from vlm import registry
from vlm.building.blocks import stacked_blocks
from vlm.codec import step_counts
from vlm.commands.convert import convert
from vlm.commands.export import export
from vlm.errors import UserError
from vlm.language import CausalLM, PeftAdapter, adapters
from vlm.language.adapters import replace_adapters
from vlm.schedules import Schedule
from vlm.stages import InitFrom, Stage, Trained


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


BOTH = PeftAdapter(rank=2, alpha=4, parts="both")
WRITTEN = {
    "lora on both, connector": (BOTH, ("connector", "adapters")),
    "dora on both": (replace(BOTH, dora=True), ("adapters",)),
    "qlora": (PeftAdapter(rank=2, alpha=4, quantize="language"), ("adapters",)),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_transformers_and_peft_open_what_is_written(case: str, base: CausalLM, tmp_path: Path) -> None:
    adapter, train = WRITTEN[case]
    trained(base, tmp_path / "run", adapter, train)
    for what in ("merged", "adapter", "base"):
        assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / what), "--write", what]) == 0
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("multi_modal_projector" in n for n in written) == ("connector" in train)

    ours = vlm.load(tmp_path / "run", quantized=False)
    merged, plain = (LlavaForConditionalGeneration.from_pretrained(tmp_path / n).eval() for n in ("merged", "base"))
    sample = samples(tmp_path)[0]
    item = ours.codec.encode(sample)
    batch = ours.codec.collate([item], counts=step_counts([item]))
    ids = batch.text.ids.clone()
    ids[batch.text.slots["image"]] = merged.config.image_token_id
    asked = {"input_ids": ids[None], "pixel_values": batch.views["image"].pixels}
    with torch.no_grad():
        expected = ours.label_logits(batch)
        before = plain(**asked).logits[0, batch.text.label_positions, : expected.shape[1]]
        theirs = merged(**asked).logits[0, batch.text.label_positions, : expected.shape[1]]
        adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
        adapted = adapted(**asked).logits[0, batch.text.label_positions, : expected.shape[1]]
    assert (before - expected).abs().max() > 0.05
    # float32 noise between eager CLIP attention and timm's fused one, and merged weights rounded elsewhere; 1e-6 seen
    torch.testing.assert_close(theirs, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(adapted, expected, atol=2e-5, rtol=1e-5)


def test_a_merge_that_computes_something_else_is_not_written(
    base: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = trained(base, tmp_path / "run", PeftAdapter(rank=2, alpha=4), ("adapters",))
    assert any(
        "adapter merged: no logit" in note for note in export(tmp_path / "run", tmp_path / "16", dtype="bfloat16").notes
    )
    write_stage(tmp_path / "plain", make(base, train=("connector",)), global_step=1)
    with pytest.raises(UserError, match="has no adapter; leave out --write base"):
        export(tmp_path / "plain", tmp_path / "out", write="base")
    with torch.no_grad():
        module.get_parameter("language.model.layers.0.mlp.up_proj.lora_B.default.weight").mul_(1e6)
    write_stage(tmp_path / "run", module, global_step=1)
    with pytest.raises(UserError, match="in float16 the merged weights compute something else"):
        export(tmp_path / "run", tmp_path / "out", dtype="float16")
    plain = adapters.merged_weight
    monkeypatch.setattr(adapters, "merged_weight", lambda weight, a, b, scale, m: plain(weight, a, b, 0.99 * scale, m))
    with pytest.raises(UserError, match="the merged weights do not compute what the adapter does"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


# -- every system

OFFERED = [name for name in SYSTEMS if name in registry.SYSTEMS]


@pytest.mark.parametrize("name", OFFERED)
def test_every_system_takes_adapters(name: str, tmp_path: Path) -> None:
    """On the language model and, where there is one, on the tower: that alone is trained, stored and opened again."""
    system = SYSTEMS[name]
    pool = system.pool(tmp_path, 8)
    plain = system.make()
    plain.configure_model()
    parts = "both" if hasattr(plain, "vision") else "language"
    batch = collate(plain, pool[:4])
    with torch.no_grad():
        before = plain.label_logits(batch)

    module = system.make()
    injection = LoRAInjection(rank=2, alpha=4, parts=parts)
    injection.setup(None, module, "fit")  # type: ignore[arg-type]
    module.stage = Stage("identity", {"adapters": RATE})
    module.configure_model()
    with torch.no_grad():
        assert torch.equal(module.label_logits(batch), before)
    added = {name for name, _ in module.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert {name.split(".")[0] for name in added} == ({"language", "vision"} if parts == "both" else {"language"})
    blocks = len(list(stacked_blocks(module.language)))
    assert len([name for name in added if name.startswith("language.")]) >= 2 * 4 * blocks

    module, found = system.make(), values(module)
    stage = StageTransition("lora", {"adapters": Trained(lr=1e-2)}, schedule=Schedule("constant"))
    run = trainer(tmp_path, max_epochs=1, callbacks=[injection, stage])
    # A has no gradient as long as B is zero, and in front of an output that starts at zero neither has one at first
    run.fit(module, Planned(pool, [range(8)] * 3, system.batch))
    # what lies over a layer that no loss depends on stays as it is
    unreached = tuple(name.removesuffix("weight") for name in system.last.unreached)
    changed = {name for name, tensor in values(module).items() if not torch.equal(tensor, found[name])}
    assert changed == {name for name in added if not name.startswith(unreached)}
    stored = json.loads((tmp_path / "artefact" / "stage.json").read_text())
    assert set(stored["tensors"]) == added
    loaded = vlm.load(tmp_path / "artefact")
    with torch.no_grad():
        assert torch.equal(loaded.label_logits(batch), module.eval().label_logits(batch))
    assert loaded.generate(pool[:2], decoding=DECODING) == module.generate(pool[:2], decoding=DECODING)

    packed = system.make()
    packed.surgery = [PeftAdapter(rank=2, alpha=4, parts=parts, quantize=parts)]
    packed.configure_model()
    with torch.no_grad():
        assert 0 < (packed.label_logits(batch) - before).std() < before.std()


def test_what_is_not_adapted_is_said() -> None:
    mixtral = CausalLM(config=LLAMA | {"model_type": "mixtral", "num_local_experts": 4})
    module = SYSTEMS["mini_gemini"].make(language=mixtral)
    module.surgery = [PeftAdapter(rank=2, alpha=4, parts=["language", "vision_high"])]
    module.stage = Stage("lora", {"adapters": RATE})
    module.configure_model()
    (done, beside) = module.surgery[0].summary(module)
    assert "10 linear layers of vision_high and 8 linear layers of language" in done
    for name in (
        "language.model.layers.*.mlp.experts.gate_up_proj",
        "vision_high.trunk.stages.*.blocks.*.conv_dw.weight",
    ):
        assert name in beside


def test_layers_whose_weight_is_read_by_others_are_asked() -> None:
    """timm's attention of BEiT and EVA multiplies with the weight of `qkv` by itself."""
    system = nn.Module()
    system.vision = nn.Sequential(nn.Sequential(timm.models.beit.Attention(32, num_heads=2, qkv_bias=True)))
    x = torch.randn(1, 5, 32)
    before = system.vision(x)
    PeftAdapter(rank=2, alpha=4, parts="vision", targets=["qkv"]).apply(system)
    for name, parameter in system.named_parameters():
        if "lora_" in name:
            nn.init.ones_(parameter)
    assert (system.vision(x) - before).abs().max() > 0.1


def test_an_adapter_of_peft_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"}))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match=r"is an adapter of peft .* and no model; its base is llava-hf/llava-1\.5-7b-hf"
    ):
        vlm.load(tmp_path)
    with pytest.raises(UserError, match="is an adapter of peft"):
        convert(tmp_path, tmp_path / "out", system="llava_1_5", target_layout="ours")


@pytest.mark.parametrize("name", ["qwen_vl", "fuyu"])
def test_convert_merges(name: str, tmp_path: Path) -> None:
    module = SYSTEMS[name].make(**({"template": "qwen_vl"} if name == "qwen_vl" else {}))
    module.surgery = [PeftAdapter(rank=2, alpha=4)]
    module.stage = Stage("lora", {"adapters": RATE})
    module.configure_model()
    disturb(module, module.trained_names())
    write_stage(tmp_path / "run", module, global_step=1)
    report = convert(tmp_path / "run", tmp_path / "official", system=name, target_layout="official")
    (note,) = report.notes
    assert note.startswith("adapter merged: no logit of a probe differs")
    assert_written(module, tmp_path / "official", tmp_path)


def assert_written(module: Any, folder: Path, data: Path) -> None:
    """A folder opens as a module with its adapter merged, and computes what that does."""
    opened, expected = vlm.load(folder), logits(module, data)
    # W x + B A x and (W + B A) x: rounded elsewhere; 2e-7 seen
    torch.testing.assert_close(logits(opened, data), expected, atol=2e-6, rtol=1e-5)
    replace_adapters(module, merge=True)
    theirs, ours = dict(opened.named_parameters()), dict(module.named_parameters())
    assert theirs.keys() == ours.keys()
    assert [name for name, parameter in ours.items() if not torch.equal(theirs[name], parameter)] == []


def test_convert_merges_into_the_published_layout_of_llava(published: Path, tmp_path: Path) -> None:
    again = follow(published, parts="both")
    disturb(again, again.trained_names())
    write_stage(tmp_path / "run", again, global_step=1)
    report = convert(tmp_path / "run", tmp_path / "official", system="llava_1_5", target_layout="official")
    (note,) = report.notes
    assert note.startswith("adapter merged: no logit of a probe differs")
    assert_written(again, tmp_path / "official", tmp_path)


@pytest.fixture(scope="module")
def published(base: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, a folder of Hugging Face's with a tower that the official layout can say, and `ours`, made of it."""
    folder = tmp_path_factory.mktemp("published")
    tower = llava_1_5().arguments["vision"]
    module = llava_1_5(language=base, vision=replace(tower, options=tower.options | {"num_heads": 1}))
    module.stage = Stage("x", {"connector": RATE})
    module.configure_model()
    write_stage(folder / "run", module, global_step=1)
    export(folder / "run", folder / "hf")
    convert(folder / "hf", folder / "ours", system="llava_1_5", target_layout="ours")
    return folder


def follow(
    published: Path, *, parts: str | None = "language", train: str = "adapters", of: str = "ours", **changes: Any
) -> Any:
    arguments = vlm.load(published / "ours").arguments
    module = llava_1_5(**(arguments | changes))
    module.surgery = [] if parts is None else [PeftAdapter(rank=2, alpha=4, parts=parts)]
    module.stage = Stage("test", {train: RATE}, follows=[InitFrom(str(published / of))])
    module.configure_model()
    return module


@pytest.mark.parametrize("of", ["ours", "hf"])
def test_what_was_trained_without_adapters_is_written_as_it_is(of: str, published: Path, tmp_path: Path) -> None:
    """What the stage left frozen comes from the artefact, or the published folder, that it follows."""
    module = follow(published, parts=None, train="connector", of=of)
    disturb(module, module.trained_names())
    write_stage(tmp_path / "run", module, global_step=1)
    report = convert(tmp_path / "run", tmp_path / "official", system="llava_1_5", target_layout="official")
    assert report.notes == []
    assert_written(module, tmp_path / "official", tmp_path)


def test_what_a_layout_cannot_say_is_not_written(published: Path, tmp_path: Path) -> None:
    def written(module: Any, name: str) -> Any:
        write_stage(tmp_path / name, module, global_step=1)
        return convert(tmp_path / name, tmp_path / "official" / name, system=module.system, target_layout="official")

    with pytest.raises(UserError, match="shown as image: crop, and the files of this layout say pad"):
        written(follow(published, image="crop"), "crop")
    (_, note) = written(follow(published, template="v0"), "v0").notes
    assert note.startswith("trained with template v0 and LlamaTokenizer")

    shutil.copytree(published / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 4
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "hf", tmp_path / "ours", system="llava_1_5", target_layout="ours")
    with pytest.raises(UserError, match=r"attn\.head_dim is 8 here, and the files of this layout say 32"):
        written(follow(tmp_path), "heads")

    tower = SYSTEMS["qwen_vl"].make().arguments["vision"]
    module = SYSTEMS["qwen_vl"].make(template="qwen_vl", vision=replace(tower, norm_eps=1e-5))
    module.stage = Stage("x", {"connector": RATE})
    module.configure_model()
    with pytest.raises(UserError, match=r"norm1\.eps is 1e-05 here, and the files of this layout say 1e-06"):
        written(module, "qwen")
    assert [path.name for path in (tmp_path / "official").iterdir()] == ["v0"]


def test_the_overlays_are_what_they_say() -> None:
    for file in sorted((ROOT / "configs/finetune").glob("*.yaml")):
        content = yaml.safe_load(file.read_text())
        assert content["stage"]["name"] == file.stem
        assert content["stage"]["train"].keys() == {"adapters"}
        (callback,) = content["trainer"]["callbacks+"]
        adapter = LoRAInjection(**callback["init_args"]).surgery
        assert adapter.dora == (file.stem == "dora")
        assert adapter.quantize == (("language",) if file.stem == "qlora" else ())
        assert adapter.parts == (("language", "vision") if file.stem == "lora_tower" else ("language",))
