"""Frozen weights in 4 bits, under an adapter."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import vlm
from callbacks import LoRAInjection, StageTransition
from callbacks.stage_transition import write_stage
from tests.language.test_layer_inputs import continued
from tests.support.samples import questions, samples
from tests.support.systems import llava_1_5
from tests.support.training import packs, trainer
from tests.systems.test_contract import disturb
from tests.training.test_surgery import DECODING, logits, make
from vlm.building.build import assemble
from vlm.building.network import allocate, empty_weights
from vlm.checkpoints.resume.single_file import AtomicCheckpointIO
from vlm.errors import UserError
from vlm.language import CausalLM, PeftAdapter
from vlm.language.quantized import FourBitLinear, packed_bytes
from vlm.planning.parameters import sizes_of
from vlm.schedules import Schedule
from vlm.stages import AdamW, Trained

QLORA = PeftAdapter(rank=2, alpha=4, quantize="language")


def test_a_layer_computes_with_what_bitsandbytes_keeps() -> None:
    with empty_weights():
        layer = FourBitLinear.like(nn.Linear(512, 384))
    allocate(layer, torch.device("cpu"))
    assert (layer.weight.is_meta, layer.weight.shape, layer.bias.is_meta) == (True, (384, 512), False)
    weight, x = torch.randn(384, 512), torch.randn(5, 512, requires_grad=True)
    assert layer.keep("weight", weight, torch.device("cpu"))
    nn.init.normal_(layer.bias)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    full = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert torch.equal(layer.full_weight(), full)
    # half the widest gap of the table, 0.152, of the largest of 64 normal numbers, and the rounding of its scale
    assert (full - weight).abs().max() < 0.16 * weight.abs().max()
    out, expected = layer(x), F.linear(x, full, layer.bias)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    gradient = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, gradient)[0] for y in (out, expected)), atol=2e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.num_bytes == sum(
        tensor.nbytes
        for tensor in (packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    )
    assert packed_bytes(4096 * 11008) / (4096 * 11008) == pytest.approx(0.516, abs=1e-3)


@pytest.mark.parametrize("dora", [False, True])
def test_only_the_adapter_is_trained_and_stored(dora: bool, base: CausalLM, tmp_path: Path) -> None:
    adapter = PeftAdapter(rank=2, alpha=4, dora=dora, quantize="language")
    plain, module = make(base, train=("connector",)), make(base, adapter, train=("adapters",))
    packed = [m for m in module.modules() if isinstance(getattr(m, "base_layer", None), FourBitLinear)]
    assert len(packed) == 14
    assert {n: tuple(p.shape) for n, p in plain.named_parameters()}.keys() < {n for n, _ in module.named_parameters()}
    frozen = {n: h for n, h in plain.frozen_hashes.items() if n.startswith("language.")}
    assert frozen.items() <= module.frozen_hashes.items()  # content as it was read
    with torch.no_grad():  # the plain network, with the weights that are computed with
        for name, layer in module.named_modules():
            if layer in packed:
                plain.get_parameter(f"{name}.weight").copy_(layer.base_layer.full_weight())
    # DoRA divides by lengths that it computes anew; 5e-7 seen
    torch.testing.assert_close(logits(module, tmp_path), logits(plain, tmp_path), atol=1e-5, rtol=1e-4)

    disturb(module, module.trained_names())
    write_stage(tmp_path / "artefact", module, global_step=1)
    stored = json.loads((tmp_path / "artefact" / "stage.json").read_text())
    assert set(stored["tensors"]) == {name for name, _ in module.named_parameters() if ".lora_" in name}
    loaded = vlm.load(tmp_path / "artefact")
    assert loaded.surgery == [adapter]
    assert torch.equal(logits(loaded, tmp_path), logits(module, tmp_path))
    asked = questions(tmp_path)
    assert loaded.generate(asked, decoding=DECODING) == [continued(module, one, 8) for one in asked]
    unquantized = vlm.load(tmp_path / "artefact", quantized=False)
    assert not any(isinstance(getattr(m, "base_layer", m), FourBitLinear) for m in unquantized.modules())
    published = make(base, dataclasses.replace(adapter, quantize=()), train=("adapters",))
    with torch.no_grad():
        for name in module.trained_names():
            published.get_parameter(name).copy_(module.get_parameter(name))
    assert torch.equal(logits(unquantized, tmp_path), logits(published, tmp_path))


def _fit(folder: Path, data: Path, base: CausalLM, resume: Path | None = None, **more: Any) -> Any:
    module = llava_1_5(language=base)
    injection = LoRAInjection(rank=2, alpha=4, dropout=0.1, quantize="language")
    stage = StageTransition(
        "qlora", {"adapters": Trained(lr=3e-2)}, optimizer=AdamW(eps=1e-3), schedule=Schedule("constant")
    )
    saved = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
    run = trainer(
        folder,
        max_epochs=4,
        enable_checkpointing=True,
        callbacks=[injection, stage, saved],
        plugins=[AtomicCheckpointIO()],
        **more,
    )
    run.fit(module, packs(module, data, (((0, 1, 2, 3),),) * 2), ckpt_path=resume)
    assert run.global_step == 8
    return module


def test_only_the_adapter_moves_and_a_resume_is_exact(base: CausalLM, tmp_path: Path) -> None:
    pool = samples(tmp_path)
    fresh = make(base, QLORA, train=("adapters",))
    module = _fit(tmp_path / "whole", tmp_path, base)
    before, after = dict(fresh.named_parameters()), dict(module.named_parameters())
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in before if ".lora_" in name}
    first, last = (-torch.cat(m.score(pool)).mean() for m in (fresh, module))
    assert last < first - 0.1  # 10.41 to 10.18 seen
    middle = tmp_path / "whole" / "step=3.ckpt"
    stored = torch.load(middle, weights_only=True)
    assert set(stored["state_dict"]) == changed
    again = dict(_fit(tmp_path / "again", tmp_path, base, middle).named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.items())


def test_under_autocast_the_four_bits_are_those_of_the_published_weights(base: CausalLM, tmp_path: Path) -> None:
    """Other frozen weights are rounded to bfloat16 once; these are quantized from what was read."""
    pool = samples(tmp_path)
    fresh = make(base, QLORA, train=("adapters",))
    module = _fit(tmp_path / "run", tmp_path, base, precision="bf16-mixed")
    assert module.frozen_dtype == torch.bfloat16
    layers = {n: m.base_layer for n, m in module.named_modules() if hasattr(m, "base_layer")}
    assert len(layers) == 14
    for name, layer in layers.items():
        before = fresh.get_submodule(name).base_layer
        assert isinstance(layer, FourBitLinear)
        assert torch.equal(layer.weight, before.weight)
        assert layer.weight.dtype == torch.uint8
    assert module.get_parameter("vision.trunk.blocks.0.mlp.fc1.weight").dtype == torch.bfloat16
    assert module.frozen_hashes == fresh.frozen_hashes
    assert all(p.dtype == torch.float32 for name, p in module.named_parameters() if ".lora_" in name)
    first, last = (-torch.cat(m.score(pool)).mean() for m in (fresh, module))
    assert last < first - 0.1  # 10.41 to 10.18 seen


def test_a_plan_counts_what_is_kept(base: CausalLM) -> None:
    """On the meta device, where nothing is quantized."""
    module, planned = make(base, QLORA, train=("adapters",)), llava_1_5(language=base)
    planned.surgery, planned.stage = [QLORA], module.stage
    with torch.device("meta"):
        assemble(planned)
    packed = [m.base_layer for m in module.modules() if isinstance(getattr(m, "base_layer", None), FourBitLinear)]
    inside = {id(layer.weight) for layer in packed}
    plain = sum(p.nbytes for p in module.language.parameters() if id(p) not in inside)
    buffers = sum(buffer.nbytes for buffer in module.language.buffers())
    assert sizes_of(planned)["language"].weights == plain + buffers + sum(layer.num_bytes for layer in packed)


def test_what_cannot_be_is_said(base: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = PeftAdapter(rank=2, alpha=4, targets=["q_proj"], quantize="language")
    with pytest.raises(UserError, match="is kept in 4 bits and cannot be trained"):
        make(base, narrow, train=("adapters", "language.model.layers.*.up_proj.weight"))
    module = llava_1_5(language=base)
    module.surgery, module._device_mesh = [QLORA], object()  # type: ignore[assignment]
    module.shard = lambda *_: None
    with pytest.raises(UserError, match=r"trainer\.strategy: weights in 4 bits cannot be sharded; use DDP"):
        module.configure_model()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"need bitsandbytes: pip install 'vlm\[quantized\]'"):
        make(base, QLORA, train=("adapters",))
