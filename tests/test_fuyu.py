"""Fuyu-8B against the official numbers and transformers' own classes."""

from typing import Any

import vlm  # first: repairs torchvision
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.conftest import golden, golden_json
from vlm.batch import Row, TokenSequence
from vlm.connectors import Linear
from vlm.fusion import splice
from vlm.language import CausalLM
from vlm.language.causal_lm import label_logits
from vlm.vision.patches import Patches, channels_last, joined


def persimmon(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "persimmon",
        "vocab_size": config["vocab"],
        "hidden_size": config["hidden"],
        "intermediate_size": config["mlp"],
        "num_hidden_layers": config["layers"],
        "num_attention_heads": config["heads"],
        "layer_norm_eps": config["ln_eps"],
        "hidden_act": config["act"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config["rope_theta"],
            "partial_rotary_factor": config["partial_rotary_factor"],
        },
    }


def cutter(config: dict[str, Any]) -> Patches:
    return Patches(config["patch"], max_width=config["pw"], max_height=config["ph"])


def test_patches_equal_the_official_ones() -> None:
    """Exactly where a picture was not scaled; by a grey level where it was: torchvision's bilinear is not Pillow's."""
    tensors, meta = golden("fuyu_model__a"), golden_json("fuyu_model__a")
    config = meta["config"]
    patches = cutter(config)
    for entry in meta["images"]:
        image = Image.fromarray(tensors[f"inputs/img{entry['index']}"].numpy())
        found = patches(image)
        assert patches.grid(*image.size) == (entry["cols"], entry["rows"])
        theirs = tensors[f"outputs/img{entry['index']}_patches"]
        atol = 1e-5 if entry["scale"] == 1 else 0.0079
        torch.testing.assert_close(channels_last(found), theirs, atol=atol, rtol=0)
    official = Patches()
    for height, width, new_height, new_width, rows, columns, num_patches, num_tokens in meta[
        "geometry_official_1080x1920_patch30"
    ]:
        assert official.scaled(width, height) == (new_width, new_height)
        assert official.grid(width, height) == (columns, rows)
        assert (columns * rows, (columns + 1) * rows) == (num_patches, num_tokens)


@torch.no_grad()
def test_the_whole_model_equals_the_official_numbers() -> None:
    """4e-6 seen. The official rows are padded on the left, ours lie one after another."""
    tensors, meta = golden("fuyu_model__a"), golden_json("fuyu_model__a")
    config = meta["config"]
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    language: Any = CausalLM(config=persimmon(config)).build().eval()
    own = {name.removeprefix("language_model."): t for name, t in weights.items() if name.startswith("language_model.")}
    language.load_state_dict(own)
    connector: nn.Module = Linear().build(3 * config["patch"] ** 2, config["hidden"])
    connector.load_state_dict({kind: weights[f"vision_embed_tokens.{kind}"] for kind in ("weight", "bias")})

    sequences, wanted, embedded = [], [], []
    for row, mask in enumerate(tensors["inputs/attention_mask"].bool()):
        ids = tensors["inputs/input_ids"][row][mask]
        slots = (ids == config["img_id"]).nonzero().squeeze(1)
        sequences.append(TokenSequence(ids, torch.zeros_like(ids), slots={"image": slots}))
        wanted.append(tensors["outputs/logits"][row][mask])
        embedded.append(tensors["outputs/inputs_embeds"][row][mask])
    packed = Row.pack(sequences, ["image"])
    features = connector(tensors["inputs/image_patches"][0])
    embeds = splice(language.get_input_embeddings()(packed.ids), features, packed.slots["image"])
    torch.testing.assert_close(embeds, torch.cat(embedded), atol=1e-5, rtol=0)
    torch.testing.assert_close(label_logits(language, embeds, packed), torch.cat(wanted), atol=3e-5, rtol=0)


def test_patches_are_cut_row_by_row_and_joined_again() -> None:
    image = Image.effect_noise((23, 13), 80).convert("RGB")
    patches = Patches(5, max_width=50, max_height=50)
    found = patches(image)
    assert found.shape == (15, 3, 5, 5)
    whole = joined(found, columns=5)
    assert whole.shape == (3, 15, 25)
    assert torch.equal(found[7], whole[:, 5:10, 10:15])
    assert torch.equal(channels_last(found)[7].reshape(5, 5, 3), whole[:, 5:10, 10:15].permute(1, 2, 0))
    assert (whole[:, 13:] == (1 / 255 - 0.5) / 0.5).all()
