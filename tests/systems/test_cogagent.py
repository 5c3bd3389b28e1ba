"""CogAgent against the official numbers (`cogagent_model__a`) and its released files."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import vlm  # first: repairs torchvision
import pytest
import torch
from safetensors.torch import load_file, save_file

from callbacks.stage_transition import write_stage
from tests.conftest import GOLDEN, golden, golden_json
from tests.support.cogagent import cogagent
from tests.support.parity import assert_same_scores, assert_same_state
from tests.support.samples import samples
from tests.systems.test_cogvlm import STATED as COGVLM_STATED
from tests.systems.test_cogvlm import config_of, paper_shapes as cogvlm_shapes
from tests.systems.test_cogvlm import published_folder as cogvlm_folder
from tests.systems.test_contract import disturb
from vlm.batch import Batch, Row, TokenSequence, Views
from vlm.building.network import empty_weights
from vlm.checkpoints.published.family import find_family, get_family, look_into
from vlm.checkpoints.files.weights import WeightFiles
from vlm.commands.convert import convert
from vlm.connectors import GLU
from vlm.errors import UserError
from vlm.language import CausalLM, CrossAttention, VisualExpert
from vlm.stages import InitFrom, Stage, Trained
from vlm.systems.cogvlm import image_blocks
from vlm.vision import TimmTower

CASE = "cogagent_model__a"
CROSS = {"cross_compute_hidden_size": 1024, "cross_hidden_size": 1024, "cross_image_size": 1120}
STATED: dict[str, Any] = COGVLM_STATED | CROSS | {
    "_name_or_path": "THUDM/cogagent-chat-hf", "architectures": ["CogAgentForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_cogagent.CogAgentConfig",
                 "AutoModelForCausalLM": "modeling_cogagent.CogAgentForCausalLM"},
    "vision_config": COGVLM_STATED["vision_config"] | {"image_size": 224, "num_positions": 257},
}  # fmt: skip
"""A released `config.json`."""
NEAR = {"atol": 1e-5, "rtol": 0.0}


def published_folder(folder: Path, **changes: Any) -> Path:
    """The golden weights in the released form, with a tokenizer that fits their vocabulary."""
    size = golden_json(CASE)["config"]
    cogvlm_folder(folder)
    weights = {name.removeprefix("weights/"): t for name, t in golden(CASE).items() if name.startswith("weights/")}
    tower, grid = "model.cross_vision.vit.model.", size["c_grid"]
    weights[tower + "rope.freqs_cos"] = torch.full((grid**2, 8), 0.5)  # as some files have it
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # rows for the words of the tokenizer
        weights[name] = torch.cat([weights[name], 0.02 * torch.randn(len(words) - size["vocab"], size["hidden"])])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    sizes = size | {"image": size["patch"] * size["grid"], "vocab": len(words)}
    cross = {
        "cross_compute_hidden_size": size["c_width"], "cross_hidden_size": size["c_width"],
        "cross_image_size": size["c_patch"] * grid,
        "cross_vision": {"patch_size": size["c_patch"], "depth": size["c_layers"], "head_dim": size["c_headw"],
                         "mlp_ratio": size["c_mlp"] / size["c_width"], "ref_grid": size["pt_hw"]},
    }  # fmt: skip
    config = STATED | config_of(sizes) | cross | {"architectures": STATED["architectures"], "auto_map": None}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@torch.no_grad()
def test_the_whole_model_equals_the_official_numbers(tmp_path: Path) -> None:
    """Each stage of it. The official rows are padded, ours lie one after another."""
    tensors, size = golden(CASE), golden_json(CASE)["config"]
    module = vlm.load(published_folder(tmp_path / "official"))
    assert module.surgery == [VisualExpert(), CrossAttention(context=24, width=24, heads=4)]
    width, sequences = size["grid"] ** 2 + 2, []
    for ids, kinds, mask in zip(
        *(tensors[f"inputs/{name}"] for name in ("input_ids", "token_type_ids", "attention_mask")), strict=True
    ):
        real = mask.bool()
        slots = kinds[real].nonzero().squeeze(1)
        positions, visual = image_blocks(ids[real], slots, width)
        targets = torch.zeros(int(real.sum()), dtype=torch.int64)
        sequences.append(TokenSequence(ids[real], targets, slots={"image": slots}, positions=positions, visual=visual))
    row, real = Row.pack(sequences, ["image"]), tensors["inputs/attention_mask"].bool()
    of = torch.tensor([0, 1])
    views = {
        name: Views(tensors[f"inputs/{theirs}"], of, of, ((1, 1),) * 2, ((24, 24),) * 2)
        for name, theirs in (("image", "image"), ("high", "cross_image"))
    }
    fine = size["c_grid"] ** 2
    bounds = torch.tensor([0, fine, 2 * fine], dtype=torch.int32)
    views["high"] = replace(views["high"], cu_seqlens=bounds, max_len=fine)
    batch = Batch(text=row, rows={}, views=views, samples=(), counts={"images": 2.0})

    rope = module.vision_high.trunk.rope.get_embed()
    sin, cos = rope.chunk(2, dim=-1)
    torch.testing.assert_close(cos, tensors["outputs/rope_cos"], **NEAR)
    torch.testing.assert_close(sin, tensors["outputs/rope_sin"], **NEAR)
    # 3.8e-6 seen; with the last block, or positions 0, 1, 2, ... of the rotations, about 5
    torch.testing.assert_close(
        module.fine_context(batch).features, tensors["outputs/cross_features"].flatten(0, 1), **NEAR
    )
    torch.testing.assert_close(module.image_features(batch), tensors["outputs/image_features"].flatten(0, 1), **NEAR)
    torch.testing.assert_close(module.embed_row(batch), tensors["outputs/inputs_embeds"][real], **NEAR)
    logits = module.label_logits(batch)[:, : size["vocab"]]
    torch.testing.assert_close(logits, tensors["outputs/logits"][real], atol=3e-5, rtol=0)


def test_every_sequence_looks_at_its_own_images(tmp_path: Path) -> None:
    """Of none, one and several; a sample alone hears what it hears in a pack."""
    module = cogagent()
    module.configure_model()
    disturb(module, {name for name, _ in module.named_parameters()})
    pool = samples(tmp_path, 8)
    assert {len(sample.images) for sample in pool} >= {0, 1, 2}
    # other shapes, which may sum in another order
    assert_same_scores(module.eval().score(pool), [module.score([sample])[0] for sample in pool])
    items = [module.codec.encode(sample) for sample in pool]
    inputs = module.layer_inputs(module.codec.collate(items, counts={"images": 1.0}))
    assert inputs.context is not None
    assert inputs.context.cu_seqlens.diff().tolist() == [36 * len(sample.images) for sample in pool]


# -- released files


def test_published_files_come_back_bit_equal(tmp_path: Path) -> None:
    source = published_folder(tmp_path / "official", template_version="chat_old")
    files = WeightFiles(source)
    assert find_family(look_into(source, files)).system == "cogagent"  # and not CogVLM
    convert(source, tmp_path / "ours", system="cogagent", target_layout="ours")
    convert(tmp_path / "ours", tmp_path / "back", system="cogagent", target_layout="official")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert [name for name in after if not torch.equal(before[name], after[name])] == []
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())
    assert vlm.load(tmp_path / "back").codec.template.name == "cogvlm_chat_old"


def test_a_stage_goes_on_from_released_weights_and_back(tmp_path: Path) -> None:
    source = published_folder(tmp_path / "official")
    opened = vlm.load(source)
    module = type(opened)(**opened.arguments)
    parts = ("vision", "vision_high", "places", "connector", "language")
    module.stage = Stage("3_agent", {part: Trained(1.0) for part in parts}, follows=[InitFrom(str(source))])
    module.configure_model()
    assert_same_state(module, opened)
    disturb(module, module.trained_names())
    write_stage(tmp_path / "artefact", module, global_step=1)
    convert(tmp_path / "artefact", tmp_path / "back", system="cogagent", target_layout="official")
    again = vlm.load(tmp_path / "back")
    assert_same_state(module, again)
    pool = [sample for sample in samples(tmp_path, 6) if sample.images]
    assert_same_scores(module.eval().score(pool), again.score(pool))


def test_it_begins_with_what_cogvlm_knows(tmp_path: Path) -> None:
    """From CogVLM's weights the new paths alone start new, and change nothing at first."""
    source = cogvlm_folder(tmp_path / "cogvlm")
    cogvlm = vlm.load(source)
    given = cogvlm.arguments | {
        "vision_high": cogagent().arguments["vision_high"], "cross_width": 16, "cross_heads": 2,
    }  # fmt: skip
    module = type(cogagent())(**given)
    fresh = [f"language.model.layers.*.{name}.*" for name in ("cross_attn", "post_cross_attention_layernorm")]
    parts = {part: part for part in ("vision", "connector", "language")}
    follows = [InitFrom(str(source), parts=parts, fresh=fresh)]
    module.stage = Stage("1a_cross", {"language.model.layers.*cross_att*": Trained(1.0)}, follows=follows)
    module.configure_model()
    pool = [sample for sample in samples(tmp_path, 6) if sample.images]
    assert not module.places.low.any()
    assert_same_scores(module.eval().score(pool), cogvlm.score(pool))


def paper_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released checkpoint, written out from section 7.5 of its facts."""
    tower = "model.cross_vision.vit.model."
    theirs = cogvlm_shapes() | {
        "model.vision.patch_embedding.position_embedding.weight": (257, 1792),
        "model.vision.pos_embed": (256, 1792),
        "model.cross_vision.pos_embed": (6400, 1024),
        tower + "cls_token": (1, 1, 1024),
        tower + "pos_embed": (1, 6401, 1024),
        tower + "patch_embed.proj.weight": (1024, 3, 14, 14),
        tower + "patch_embed.proj.bias": (1024,),
        tower + "norm.weight": (1024,),
        tower + "norm.bias": (1024,),
        tower + "head.weight": (768, 1024),
        tower + "head.bias": (768,),
    }
    for i in range(24):
        block = f"{tower}blocks.{i}."
        linears = {"attn.proj": (1024, 1024), "mlp.w1": (2730, 1024), "mlp.w2": (2730, 1024), "mlp.w3": (1024, 2730)}
        for name, shape in linears.items():
            theirs |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        theirs |= {f"{block}attn.{part}_proj.weight": (1024, 1024) for part in "qkv"}
        theirs |= {f"{block}attn.{part}_bias": (1024,) for part in "qv"}
        norms = {"norm1": 1024, "norm2": 1024, "attn.inner_attn_ln": 1024, "mlp.ffn_ln": 2730}
        theirs |= {f"{block}{name}.{kind}": (dim,) for name, dim in norms.items() for kind in ("weight", "bias")}
    for i in range(32):
        layer = f"model.layers.{i}."
        theirs[layer + "post_cross_attention_layernorm.weight"] = (4096,)
        for name, shape in {"query": (1024, 4096), "key_value": (2048, 1024), "dense": (4096, 1024)}.items():
            theirs[f"{layer}cross_attn.{name}.weight"] = shape
    return theirs


def test_paper_size_has_the_published_tensors(tmp_path: Path) -> None:
    """As the folder's own `config.json` describes the network."""
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "_shared" / "llama_sp_tokenizer.model").read_bytes())
    family: Any = get_family("cogagent")
    arguments = family.describe_folder(STATED, tmp_path)["init_args"]
    module = cogagent(
        vision=TimmTower(**arguments["vision"]["init_args"]),
        vision_high=TimmTower(**arguments["vision_high"]["init_args"]),
        connector=GLU(**arguments["connector"]["init_args"]),
        language=CausalLM(**arguments["language"]["init_args"]),
        cross_width=arguments["cross_width"],
        cross_heads=arguments["cross_heads"],
    )
    assert module.codec.num_tokens(640, 480) == 258
    assert module.high.num_tokens == 6400
    with empty_weights():
        for name, part in module.build_parts().items():
            module.add_module(name, part)
        for operation in module.surgery:
            operation.apply(module)
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs, table = paper_shapes(), family.table("official", STATED)
    found = table.check(theirs, side="theirs")
    carried = {name: shape for name, shape in found.items() if table.is_carried(name)}
    assert {name: shape for name, shape in found.items() if name not in carried} == ours
    assert table.check(ours | carried, side="ours") == theirs
    assert sum(math.prod(shape) for shape in theirs.values()) == 18_291_033_280
    cross = ("cross_attn", "post_cross_attention_layernorm", "cross_vision")
    new = sum(math.prod(shape) for name, shape in theirs.items() if any(part in name for part in cross))
    # the paper says 646M: all of it but one of the two tables of 6400 places
    assert new - math.prod(theirs["model.cross_vision.pos_embed"]) == 646_072_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template_version": "vqa"}, "template_version is 'vqa', and only chat, chat_old, base is known"),
        ({"cross_image_size": None}, "has no cross_image_size"),
        ({"cross_layers": 4}, "cross_layers is 4, an entry that is not known"),
    ],
)
def test_files_that_say_something_else_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "_shared" / "llama_sp_tokenizer.model").read_bytes())
    stated = {key: value for key, value in (STATED | changes).items() if value is not None}
    with pytest.raises(UserError, match=message):
        get_family("cogagent").describe_folder(stated, tmp_path)  # type: ignore[attr-defined]
