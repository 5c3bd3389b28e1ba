"""Qwen-VL against the official numbers (the published `visual.py` and `modeling_qwen.py`)."""

import base64
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import vlm  # first: repairs torchvision
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from callbacks.stage_transition import write_stage
from tests.conftest import golden, golden_json
from tests.support.parity import assert_same_scores, assert_same_state
from tests.support.samples import samples
from tests.support.systems import qwen_vl, spliced_reference
from vlm.batch import IGNORE, Row, TokenSequence, next_token_targets
from vlm.building.network import empty_weights
from vlm.commands.convert import convert
from vlm.checkpoints.published.family import get_family
from vlm.connectors import Resampler
from vlm.errors import UserError
from vlm.functional import splice
from vlm.language import CausalLM
from vlm.language.causal_lm import label_logits
from vlm.language.qwen import as_qwen2
from vlm.functional import token_loss
from vlm.functional import resized, sincos_2d
from vlm.prompts import QwenTokenizer
from vlm.stages import InitFrom, Stage, Trained
from vlm.systems import QwenVL
from vlm.vision import TimmTower

VISUAL = "transformer.visual."
ROWS = 512


def tower(config: dict[str, Any], *, image_size: int) -> TimmTower:
    options = {
        "class_token": False,
        "global_pool": "avg",
        "img_size": image_size,
        "patch_size": config["patch_size"],
        "embed_dim": config["width"],
        "depth": config["layers"],
        "num_heads": config["heads"],
        "mlp_ratio": config["mlp_ratio"],
    }
    return TimmTower("vit_gigantic_patch14_clip_224", position_grid=16, norm_eps=1e-6, options=options)


def loaded(network: nn.Module, tensors: dict[str, Tensor], part: str) -> nn.Module:
    own = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
    network.load_state_dict(own)
    return network.eval()


def ours_of(tensors: dict[str, Tensor], *, heads: int, visual_only: bool = False) -> dict[str, Tensor]:
    """Golden weights under our names."""
    theirs = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    if visual_only:
        theirs = {VISUAL + name: tensor for name, tensor in theirs.items()}
    table = get_family("qwen_vl").table("official", {"visual": {"heads": heads}})
    if not visual_only:
        return table.to_ours(theirs.items())[0]
    rules = tuple(rule for rule in table.rules if rule.theirs[0].startswith(VISUAL))
    return type(table)(layout="tower", rules=rules).to_ours(theirs.items())[0]


@torch.no_grad()
def test_tower_and_resampler_equal_the_official_numbers() -> None:
    """3e-6 seen, at the grid of the table and at others."""
    tensors, meta = golden("qwen_vl_visual__a"), golden_json("qwen_vl_visual__a")
    config = meta["config"]
    weights = ours_of(tensors, heads=config["heads"], visual_only=True)
    connector = Resampler(config["n_queries"], config["resampler_heads"])
    resample = loaded(connector.build(config["width"], config["output_dim"]), weights, "connector")
    for name, size in meta["sizes"].items():
        description = tower(config, image_size=size["image"])
        assert description.facts().grid == size["grid"]
        vision = loaded(description.build(), weights, "vision")
        features = vision(tensors[f"inputs/image_{name}"])
        attended = resample.attend(features)  # type: ignore[operator]
        found = {"vit": features, "attn_pool": attended, "tokens": resample(features)}
        for key, value in found.items():
            torch.testing.assert_close(value, tensors[f"outputs/{key}_{name}"], atol=2e-5, rtol=0)
        assert connector.num_tokens(features.shape[1]) == found["tokens"].shape[1]


def test_positions_equal_the_official_numbers() -> None:
    """The table's angles are computed in float64, theirs in float32."""
    tensors, config = golden("qwen_vl_positions__a"), golden_json("qwen_vl_positions__a")["config"]
    for dim, grid in config["dims"]:
        theirs = tensors[f"outputs/sincos_d{dim}_g{grid}"]
        torch.testing.assert_close(sincos_2d(dim, grid), theirs, atol=2e-6, rtol=0)
    official = sincos_2d(4096, 16)
    columns = official[:, tensors["inputs/official_cols"]]
    torch.testing.assert_close(columns, tensors["outputs/sincos_d4096_g16_cols"], atol=2e-6, rtol=0)
    torch.testing.assert_close(official.sum(1), tensors["outputs/sincos_d4096_g16_rowsum"], atol=2e-3, rtol=0)
    torch.testing.assert_close(official.sum(0), tensors["outputs/sincos_d4096_g16_colsum"], atol=2e-3, rtol=0)

    table = tensors["inputs/positions16"]
    for size in config["sizes"]:
        torch.testing.assert_close(resized(table, size), tensors[f"outputs/positions16_to_{size}"], atol=1e-5, rtol=0)
        stretched = resized(sincos_2d(32, 16), size)
        torch.testing.assert_close(stretched, tensors[f"outputs/sincos_d32_16_to_{size}"], atol=1e-5, rtol=0)
    for size in (8, 3):
        found = resized(tensors["inputs/positions5"], size)
        torch.testing.assert_close(found, tensors[f"outputs/positions5_to_{size}"], atol=1e-5, rtol=0)
    halves = resized(table.bfloat16(), 32)
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.float(), tensors["outputs/positions16_bf16_to_32"], atol=1e-5, rtol=2**-8)
    assert resized(table, 16) is table


@torch.no_grad()
def test_the_whole_model_equals_the_official_numbers() -> None:
    """2e-6 seen. The official rows are padded, ours lie one after another."""
    tensors, config = golden("qwen_vl_model__a"), golden_json("qwen_vl_model__a")["config"]
    visual = config["visual"]
    weights = ours_of(tensors, heads=visual["heads"])
    vision = loaded(tower(visual, image_size=visual["image_size"]).build(), weights, "vision")
    connector = Resampler(config["n_queries"], config["res_heads"])
    resample = loaded(connector.build(visual["width"], visual["output_dim"]), weights, "connector")
    settings = as_qwen2(
        {
            "vocab_size": config["vocab"],
            "hidden_size": config["hidden"],
            "intermediate_size": config["intermediate_size_published_sum"],
            "num_hidden_layers": config["layers"],
            "num_attention_heads": config["heads"],
            "seq_length": config["seq_length"],
            "layer_norm_epsilon": config["rms_eps"],
            "rotary_emb_base": config["rope_base"],
        }
    )
    language: Any = loaded(CausalLM(config=settings).build(), weights, "language")
    features = resample(vision(tensors["inputs/images"]))
    torch.testing.assert_close(features, tensors["outputs/image_features"], atol=2e-5, rtol=0)

    sequences, wanted = [], []
    for row, mask in enumerate(tensors["inputs/attention_mask"].bool()):
        ids, labels = tensors["inputs/input_ids"][row][mask], tensors["inputs/labels"][row][mask]
        starts = (ids == config["img_start"]).nonzero().squeeze(1) + 1
        slots = torch.cat([torch.zeros(0, dtype=torch.int64), *(s + torch.arange(config["n_queries"]) for s in starts)])
        sequences.append(TokenSequence(ids, next_token_targets(labels), slots={"image": slots}))
        wanted.append(tensors["outputs/logits"][row][mask])
    packed = Row.pack(sequences, ["image"])
    embeds = splice(language.get_input_embeddings()(packed.ids), features.flatten(0, 1), packed.slots["image"])
    logits = label_logits(language, embeds, packed)
    theirs = torch.cat(wanted)[packed.label_positions]
    assert len(theirs) == int((tensors["inputs/labels"][:, 1:] != IGNORE).sum())
    torch.testing.assert_close(logits, theirs, atol=3e-5, rtol=0)
    loss = token_loss(logits, packed.targets, packed.weights) / len(packed.targets)
    torch.testing.assert_close(loss, tensors["outputs/loss"], atol=1e-5, rtol=0)


def test_the_positions_of_values_and_sizes_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="square grid, 200 do not"):
        Resampler(200)
    with pytest.raises(UserError, match="5 heads do not share"):
        Resampler(16, 5).build(8, 48)
    with pytest.raises(UserError, match="only a tower without class token"):
        TimmTower("vit_large_patch14_clip_quickgelu_224", position_grid=16).facts()
    with pytest.raises(UserError, match="no square map"):
        Resampler(16, 1).build(8, 8)(torch.zeros(1, 5, 8))


# -- checkpoints


def published_folder(folder: Path, *, chat: bool = False) -> Path:
    """A tiny checkpoint in the published form: the golden weights, and a vocabulary that its tokenizer fits in."""
    stored, config = golden("qwen_vl_model__a"), golden_json("qwen_vl_model__a")["config"]
    folder.mkdir()
    weights = {name.removeprefix("weights/"): t for name, t in stored.items() if name.startswith("weights/")}
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = 0.02 * torch.randn(ROWS, config["hidden"])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    content = {
        "model_type": "qwen",
        "vocab_size": ROWS,
        "hidden_size": config["hidden"],
        "intermediate_size": config["intermediate_size_published_sum"],
        "num_hidden_layers": config["layers"],
        "num_attention_heads": config["heads"],
        "layer_norm_epsilon": config["rms_eps"],
        "rotary_emb_base": config["rope_base"],
        "seq_length": config["seq_length"],
        "visual": config["visual"] | {"n_queries": config["n_queries"], "resampler_heads": config["res_heads"]},
    }
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": "chatml" if chat else "raw"}))
    ranks = [bytes([value]) for value in range(256)] + [b"he", b" t", b"re", b" a"]
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks))
    (folder / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    return folder


def test_published_files_come_back_bit_equal(tmp_path: Path) -> None:
    source = published_folder(tmp_path / "official")
    convert(source, tmp_path / "ours", system="qwen_vl", target_layout="ours")
    convert(tmp_path / "ours", tmp_path / "back", system="qwen_vl", target_layout="official")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    for name in ("config.json", "generation_config.json"):
        assert json.loads((source / name).read_text()) == json.loads((tmp_path / "back" / name).read_text())
    assert (source / "qwen.tiktoken").read_bytes() == (tmp_path / "back" / "qwen.tiktoken").read_bytes()

    with pytest.raises(UserError, match="no class or layout 'hf' is published"):
        convert(source, tmp_path / "x", system="qwen_vl", target_layout="hf")
    with pytest.raises(UserError, match=r"attn_pool\.query; is it qwen_vl"):
        convert(published_without(source, tmp_path / "y"), tmp_path / "x", system="qwen_vl", target_layout="ours")
    with pytest.raises(UserError, match="published whole; leave out --vision"):
        convert(source, tmp_path / "x", system="qwen_vl", target_layout="ours", vision="clip")
    with pytest.raises(UserError, match="no projector of LLaVA"):
        convert(source, tmp_path / "x", system="llava_1_5", target_layout="ours")


def published_without(source: Path, folder: Path) -> Path:
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    del tensors[VISUAL + "attn_pool.query"]
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_base_weights_of_qwen_7b_and_openclip(tmp_path: Path) -> None:
    """The language model by itself in its published names; a CLIP tower loses its class token and that one's place."""
    source = published_folder(tmp_path / "whole")
    theirs = {name: t for name, t in load_file(source / "model.safetensors").items() if VISUAL not in name}
    (tmp_path / "qwen").mkdir()
    save_file(theirs, tmp_path / "qwen/model.safetensors")
    shutil.copyfile(source / "config.json", tmp_path / "qwen/config.json")
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            image_size=21, patch_size=7, hidden_size=32, intermediate_size=157, num_hidden_layers=3,
            num_attention_heads=4, hidden_act="gelu",
        )
    )  # fmt: skip
    clip.save_pretrained(tmp_path / "clip")
    made = qwen_vl()
    vision = dataclasses.replace(made.arguments["vision"], weights=str(tmp_path / "clip"))
    module = qwen_vl(
        vision=vision, language=CausalLM(str(tmp_path / "qwen")), tokenizer=QwenTokenizer(str(tmp_path / "whole"))
    )
    module.configure_model()
    expected = get_family("qwen_vl").table("official", {"visual": {"heads": 4}})
    rules = tuple(rule for rule in expected.rules if not rule.theirs[0].startswith(VISUAL))
    language, _ = type(expected)(layout="language", rules=rules).to_ours(theirs.items())
    state = module.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in language.items())
    stored = clip.state_dict()
    table = next(t for name, t in stored.items() if name.endswith("position_embedding.weight"))
    assert torch.equal(state["vision.trunk.pos_embed"][0], table[1:])
    assert not any("cls_token" in name for name in state)


def test_the_tower_s_layers_learn_the_slower_the_lower_they_are() -> None:
    """BEiT's rule: 0.95 for each layer above, the embeddings below the first one; at paper size."""
    with empty_weights():
        parts = paper().build_parts()
    module = nn.Module()
    for name, part in parts.items():
        module.add_module(name, part)
    stage = Stage("2", {"vision": Trained(1.0, layer_decay=0.95), "connector": Trained(1.0), "language": Trained(1.0)})
    stage.set_trainable(module)
    rates = {name: group["lr"] for group in stage.optimizer_groups(module) for name, _ in group["params"]}
    assert rates["vision.trunk.pos_embed"] == rates["vision.trunk.patch_embed.proj.weight"] == pytest.approx(0.95**49)
    assert rates["vision.trunk.blocks.0.attn.qkv.weight"] == pytest.approx(0.95**48)
    assert rates["vision.trunk.blocks.47.mlp.fc2.bias"] == pytest.approx(0.95)
    assert rates["connector.query"] == rates["language.model.layers.3.mlp.up_proj.weight"] == 1.0


def paper() -> QwenVL:
    """As configs/qwen_vl/model.yaml has it."""
    options = {"class_token": False, "global_pool": "avg", "img_size": 448}
    published = {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
                 "num_attention_heads": 32}  # fmt: skip
    return qwen_vl(
        vision=TimmTower("vit_gigantic_patch14_clip_224", position_grid=16, norm_eps=1e-6, options=options),
        connector=Resampler(),
        language=CausalLM(config=as_qwen2(published)),
    )


def test_paper_size_has_the_published_tensors() -> None:
    """Names and shapes as the checkpoint's index and section 1.8 of its files have them, written out here."""
    module = paper()
    assert module.codec.num_tokens(640, 480) == 256
    with empty_weights():
        parts = module.build_parts()
    ours = {f"{part}.{n}": tuple(t.shape) for part, network in parts.items() for n, t in network.state_dict().items()}
    theirs: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (151936, 4096),
        "transformer.ln_f.weight": (4096,),
        "lm_head.weight": (151936, 4096),
    }
    for i in range(32):
        layer = f"transformer.h.{i}."
        theirs |= {
            f"{layer}ln_1.weight": (4096,),
            f"{layer}ln_2.weight": (4096,),
            f"{layer}attn.c_attn.weight": (12288, 4096),
            f"{layer}attn.c_attn.bias": (12288,),
            f"{layer}attn.c_proj.weight": (4096, 4096),
            f"{layer}mlp.w1.weight": (11008, 4096),
            f"{layer}mlp.w2.weight": (11008, 4096),
            f"{layer}mlp.c_proj.weight": (4096, 11008),
        }
    theirs |= {VISUAL + "conv1.weight": (1664, 3, 14, 14), VISUAL + "positional_embedding": (256, 1664)}
    for i in range(48):
        block = f"{VISUAL}transformer.resblocks.{i}."
        linears = {"attn.in_proj": (4992, 1664), "attn.out_proj": (1664, 1664), "mlp.c_fc": (8192, 1664),
                   "mlp.c_proj": (1664, 8192)}  # fmt: skip
        for name, shape in linears.items():
            theirs |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        theirs |= {f"{block}{name}.{kind}": (1664,) for name in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    pool = VISUAL + "attn_pool."
    theirs |= {
        pool + "query": (256, 4096),
        pool + "pos_embed": (256, 4096),
        pool + "kv_proj.weight": (4096, 1664),
        pool + "attn.in_proj_weight": (12288, 4096),
        pool + "attn.in_proj_bias": (12288,),
        pool + "attn.out_proj.weight": (4096, 4096),
        pool + "attn.out_proj.bias": (4096,),
        VISUAL + "proj": (4096, 4096),
    }
    norms = {pool + "ln_q": 4096, pool + "ln_kv": 4096, VISUAL + "ln_post": 4096, VISUAL + "ln_pre": 1664}
    theirs |= {f"{name}.{kind}": (width,) for name, width in norms.items() for kind in ("weight", "bias")}
    table = get_family("qwen_vl").table("official", {"visual": {"heads": 16}})
    assert table.check(theirs, side="theirs") == ours
    assert table.check(ours, side="ours") == theirs
    assert sum(math.prod(shape) for shape in ours.values()) == 9_656_935_168


def test_a_published_folder_opens_and_a_trained_stage_goes_back(tmp_path: Path) -> None:
    """Both computed by the stock language model without packs, and once more from the files that were written."""
    source = published_folder(tmp_path / "chat", chat=True)
    module = vlm.load(source)
    assert (module.system, module.codec.template.name) == ("qwen_vl", "qwen_vl_chat")
    assert vlm.load(published_folder(tmp_path / "base")).codec.template.name == "qwen_vl"
    pool = samples(tmp_path, 3)
    for sample, found in zip(pool, module.score(pool), strict=True):
        torch.testing.assert_close(found, spliced_reference(module, sample), atol=1e-5, rtol=1e-5)

    convert(source, tmp_path / "ours", system="qwen_vl", target_layout="ours")
    trained = vlm.systems.QwenVL(**module.arguments)
    trained.stage = Stage("3_sft", {"connector": Trained(1.0)}, follows=[InitFrom(str(tmp_path / "ours"))])
    trained.configure_model()
    for parameter in trained.connector.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    write_stage(tmp_path / "run/artefact", trained, global_step=1)
    convert(tmp_path / "run/artefact", tmp_path / "back", system="qwen_vl", target_layout="official")
    again, before = vlm.load(tmp_path / "back"), load_file(source / "model.safetensors")
    after = load_file(tmp_path / "back/model.safetensors")
    different = {name for name in before if not torch.equal(before[name], after[name])}
    assert different
    assert all("attn_pool" in name or "ln_post" in name or name.endswith("visual.proj") for name in different)
    assert_same_state(trained, again)
    assert_same_scores(trained.score(pool), again.score(pool))
