"""The life of a surgery: registered once, inherited, replayed by whoever loads, refused where it has no place."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed
from transformers import AutoModelForCausalLM

import vlm
from callbacks import LoRAInjection, PartialLoRAInjection, StageTransition
from callbacks.stage_transition import write_stage
from tests.language.test_layer_inputs import continued
from tests.support.ranks import run_ranks
from tests.support.samples import questions, samples
from tests.support.systems import RATE, llava_1_5
from tests.support.training import packs, trainer
from tests.systems.test_contract import collate, disturb
from vlm.commands.convert import convert
from vlm.commands.export import export
from vlm.errors import UserError
from vlm.language import CausalLM, Decoding, PartialLoRA, PeftAdapter, Surgery
from vlm.module import VisionLanguageModule
from vlm.stages import AdamW, InitFrom, Schedule, Stage, Trained

BLOCKS = r"language\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
TOWER = r"vision\.trunk\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
ADAPTERS = {
    "lora": PeftAdapter(rank=2, alpha=4),
    "dora": PeftAdapter(rank=2, alpha=4, dora=True),
    "lora on the tower": PeftAdapter(rank=2, alpha=4, targets=[TOWER]),
    "dora on both": PeftAdapter(rank=3, alpha=6, targets=[BLOCKS, TOWER], dora=True),
}
DECODING = Decoding(max_new_tokens=8)


def make(
    base: CausalLM, *operations: Surgery, train: tuple[str, ...] = ("connector", "*lora_*"), follows: Any = ()
) -> VisionLanguageModule:
    module = llava_1_5(language=base)
    module.surgery = list(operations)
    module.stage = Stage("test", dict.fromkeys(train, RATE), follows=list(follows))
    module.configure_model()
    return module


def logits(module: VisionLanguageModule, folder: Path) -> Tensor:
    with torch.no_grad():
        return module.label_logits(collate(module, samples(folder)))


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_starts_as_the_identity_and_answers_when_trained(case: str, base: CausalLM, tmp_path: Path) -> None:
    adapter = ADAPTERS[case]
    plain, module = make(base, train=("connector",)), make(base, adapter)
    theirs, ours = dict(plain.named_parameters()), dict(module.named_parameters())
    assert theirs.keys() < ours.keys()  # nothing was renamed
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    added = ours.keys() - theirs.keys()
    assert {name.split("_")[-1] for name in added} <= {"A.default.weight", "B.default.weight", "vector.default.weight"}
    assert all(not ours[name].any() for name in added if "lora_B" in name)
    assert torch.equal(logits(module, tmp_path), logits(plain, tmp_path))
    assert module.frozen_hashes.items() >= {n: h for n, h in plain.frozen_hashes.items() if n not in added}.items()

    for _ in range(20):  # what the tower sees has little weight in answers of a small random model
        disturb(module, added)
    asked = questions(tmp_path)
    answers = module.generate(asked, decoding=DECODING)
    assert answers != plain.generate(asked, decoding=DECODING)
    assert answers == [module.generate([one], decoding=DECODING)[0] for one in asked]
    assert answers == [continued(module, one, 8) for one in asked]  # without a cache
    beams = dataclasses.replace(DECODING, num_beams=2)
    assert module.generate(asked, decoding=beams) == [module.generate([one], decoding=beams)[0] for one in asked]
    write_stage(tmp_path / "artefact", module, global_step=1)
    stored = json.loads((tmp_path / "artefact" / "stage.json").read_text())
    assert set(stored["tensors"]) == added | {name for name in theirs if name.startswith("connector.")}
    loaded = vlm.load(tmp_path / "artefact")
    assert loaded.surgery == [adapter]
    assert torch.equal(logits(loaded, tmp_path), logits(module, tmp_path))
    assert loaded.generate(asked, decoding=DECODING) == answers


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_computes_what_peft_computes(dora: bool, base: CausalLM) -> None:
    """Over transformers' own model, whose base weights peft calls `base_layer`."""
    module = make(base, PeftAdapter(rank=2, alpha=4, dora=dora))
    disturb(module, {name for name, _ in module.named_parameters() if "lora_" in name})
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", use_dora=dora)
    reference: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), config).base_model.model.eval()
    adapted = {name.removesuffix(".base_layer") for name, _ in reference.named_modules() if name.endswith("base_layer")}
    state = {}
    for name, tensor in module.language.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        state[f"{layer}.base_layer.{leaf}" if layer in adapted else name] = tensor
    reference.load_state_dict(state)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        theirs = reference(input_ids=ids, use_cache=False).logits
        bounds = {"cu_seqlens": torch.tensor([0, 17], dtype=torch.int32), "max_len": 17}
        ours = module.language(input_ids=ids, use_cache=False, **bounds).logits
    # the packed attention may sum in another order: 0 seen
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)


def test_a_change_happens_once_and_one_layer_takes_one(base: CausalLM) -> None:
    lora, partial = PeftAdapter(rank=2, alpha=4), PartialLoRA(rank=2)
    module = llava_1_5(language=base)
    for callback in (LoRAInjection(rank=2, alpha=4), LoRAInjection(rank=2, alpha=4.0)):
        callback.setup(None, module, "fit")  # type: ignore[arg-type]
        callback.setup(None, module, "validate")  # type: ignore[arg-type]
    assert module.surgery == [lora]
    module.configure_model()
    assert module.surgery == [lora]
    LoRAInjection(rank=2, alpha=4).setup(None, module, "validate")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"PartialLoRA\(rank=2.* comes after the network was built"):
        PartialLoRAInjection(rank=2).setup(None, module, "validate")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"q_proj is changed by PeftAdapter\(.*\) and by PartialLoRA\(rank=2"):
        make(base, lora, partial)
    with pytest.raises(UserError, match=r"q_proj is changed twice by PartialLoRA.*\(scale: 1.0 and 2.0\)"):
        make(base, partial, dataclasses.replace(partial, scale=2.0))
    attention, mlp = (PartialLoRA(rank=r, targets=[t]) for r, t in ((2, r".*self_attn\.\w+"), (3, r".*mlp\.\w+_proj")))
    assert make(base, attention, mlp, train=("*.Plora_*",)).surgery == [attention, mlp]
    with pytest.raises(UserError, match=r"target 'language.conv' matches no linear layer"):
        make(base, PeftAdapter(rank=2, alpha=4, targets=["language.conv"]))


@pytest.mark.parametrize("operation", [PartialLoRA(rank=2), PeftAdapter(rank=2, alpha=4, dora=True)])
def test_what_follows_inherits_it(operation: Any, base: CausalLM, tmp_path: Path) -> None:
    first = make(base, operation, train=("connector", "*lora_*"))
    disturb(first, first.trained_names())
    folder = str(tmp_path / "1")
    write_stage(Path(folder), first, global_step=1)

    second = make(base, train=("connector",), follows=[InitFrom(folder)])
    assert second.surgery == [operation]
    assert torch.equal(logits(second, tmp_path), logits(first, tmp_path))
    disturb(second, second.trained_names())
    write_stage(tmp_path / "2", second, global_step=2)
    loaded = vlm.load(tmp_path / "2")
    assert loaded.surgery == [operation]
    assert torch.equal(logits(loaded, tmp_path), logits(second, tmp_path))
    assert make(base, operation, follows=[InitFrom(folder)]).surgery == [operation]  # said again, it happens once

    other = dataclasses.replace(operation, rank=3)
    with pytest.raises(UserError, match=rf"changed twice .* in {folder} and in this run, .*\(rank: 2 and 3\)"):
        make(base, other, follows=[InitFrom(folder)])
    connector = make(base, train=("connector",), follows=[InitFrom(folder, {"connector": "connector"})])
    assert connector.surgery == []
    assert make(base, other, follows=[InitFrom(folder, {"connector": "connector"})]).surgery == [other]


def test_it_lies_over_weights_that_were_trained_without(base: CausalLM, tmp_path: Path) -> None:
    first = make(base, train=("connector", "language"))
    disturb(first, first.trained_names())
    write_stage(tmp_path / "1", first, global_step=1)
    second = make(base, PeftAdapter(rank=2, alpha=4, dora=True), follows=[InitFrom(str(tmp_path / "1"))])
    assert torch.equal(logits(second, tmp_path), logits(first, tmp_path))
    write_stage(tmp_path / "2", second, global_step=2)
    assert torch.equal(logits(vlm.load(tmp_path / "2"), tmp_path), logits(first, tmp_path))


def test_published_files_have_no_place_for_it(base: CausalLM, tmp_path: Path) -> None:
    module = make(base, PartialLoRA(rank=2), train=("connector", "*lora_*"))
    write_stage(tmp_path / "partial", module, global_step=1)
    words = r"partial: was changed by PartialLoRA, .*image tokens alone, so no plain weights .* `vlm predict"
    with pytest.raises(UserError, match=words):
        export(tmp_path / "partial", tmp_path / "out")
    with pytest.raises(UserError, match=words):
        convert(tmp_path / "partial", tmp_path / "out", system="llava_1_5", target_layout="official")


# -- on several devices

RATES = {"connector": Trained(lr=1e-2), "*lora_*": Trained(lr=1e-2)}
STEPS = (((0, 3), (2, 1)), ((1,), (4, 1)))


def _run(folder: Path, base: CausalLM, strategy: str | None) -> dict[str, Any]:
    world, rank = (2, distributed.get_rank()) if strategy else (1, 0)
    module = llava_1_5(language=base)
    injection = LoRAInjection(rank=2, alpha=4, targets=[BLOCKS, TOWER], dora=True)
    # without warm-up and with a large epsilon: the first steps of AdamW are the sign of a gradient that may be noise
    transition = StageTransition("lora", RATES, optimizer=AdamW(eps=1e-3), schedule=Schedule("constant"))
    options = {"strategy": "ddp"} if strategy == "ddp" else {"fsdp": "32-true"} if strategy else {}
    run = trainer(
        folder / str(strategy),
        world=world,
        max_epochs=1,
        accumulate_grad_batches=2 // world,
        callbacks=[injection, transition],
        **options,
    )
    run.fit(module, packs(module, folder, STEPS, world=world, rank=rank))
    return {"hashes": module.frozen_hashes, "groups": [len(g["params"]) for g in run.optimizers[0].param_groups]}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_training_on_two_ranks_equals_one_process(strategy: str, base: CausalLM, tmp_path: Path) -> None:
    asked = questions(tmp_path)
    samples(tmp_path)  # before the ranks would write the same files
    one = _run(tmp_path, base, None)
    for rank in run_ranks(_run, 2, tmp_path, base, strategy):
        assert rank == one
    ours, theirs = (vlm.load(tmp_path / name / "artefact") for name in (strategy, "None"))
    trained = {name: p for name, p in theirs.named_parameters() if "lora_" in name or name.startswith("connector.")}
    fresh = dict(make(base, *theirs.surgery).named_parameters())
    assert all(not torch.equal(tensor, fresh[name]) for name, tensor in trained.items() if "lora_B" in name)
    for name, tensor in trained.items():
        # only the order of sums may differ: 0 seen
        torch.testing.assert_close(ours.get_parameter(name), tensor, atol=1e-5, rtol=0)
    assert ours.generate(asked, decoding=DECODING) == theirs.generate(asked, decoding=DECODING)
