"""Qwen-VL against the official numbers (the published `visual.py` and `modeling_qwen.py`)."""

from typing import Any

import vlm  # noqa: F401  (first: repairs torchvision)
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import golden, golden_json
from vlm.batch import IGNORE, Row, TokenSequence, next_token_targets
from vlm.checkpoints.family import get_family
from vlm.connectors import Resampler
from vlm.errors import UserError
from vlm.fusion import splice
from vlm.language import CausalLM
from vlm.language.causal_lm import label_logits
from vlm.language.qwen import as_qwen2
from vlm.losses import token_loss
from vlm.positions import resized, sincos_2d
from vlm.vision import TimmTower

VISUAL = "transformer.visual."


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
