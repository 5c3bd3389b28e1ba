"""BLIP's pre-training and retrieval against the published code's numbers and rules, and transformers' class."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import golden, golden_json
from vlm.batch import Batch, Row, TokenSequence, Views, SampleInfo
from vlm.batch import IGNORE
from vlm.checkpoints.tables.blip import pair_table
from vlm.language import Med
from vlm.prompts import BertTokenizer
from vlm.systems import BLIP
from vlm.systems import blip as code
from vlm.systems.blip_base import IMAGES
from vlm.systems.pairs import IMAGE_ID
from vlm.vision import TimmTower

CASE = "blip_pretrain_step__a"
TERMS = {"itc": "ita", "itm": "itm", "lm": "lm"}


def convert(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    table = pair_table("official", writes=True, same_image=False)
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return table.to_ours(found.items())[0]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[BLIP, Batch, dict[str, Tensor]]:
    """The published network and its four pairs."""
    tensors, meta = golden(CASE), golden_json(CASE)
    config, med, vit = meta["config"], meta["config"]["med"], meta["config"]["vit"]
    folder = tmp_path_factory.mktemp("bert")
    words = [word for word in meta["bert_vocab"] if word not in ("[DEC]", "[ENC]")]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    options = {"img_size": vit["img"], "patch_size": vit["patch"], "embed_dim": vit["vit_width"]}
    options |= {"depth": vit["vit_depth"], "num_heads": vit["vit_heads"]}
    module = BLIP(
        vision=TimmTower("vit_base_patch16_224", class_token=True, final_norm=True, options=options),
        language=Med(
            dim=med["hidden_size"],
            num_layers=med["num_hidden_layers"],
            num_heads=med["num_attention_heads"],
            mlp_dim=med["intermediate_size"],
            vocab_size=med["vocab_size"],
            max_positions=med["max_position_embeddings"],
        ),
        tokenizer=BertTokenizer(str(folder)),
        dim=config["embed_dim"],
        queue=config["queue_size"],
        momentum=config["momentum"],
        alpha=config["alpha"],
        max_tokens=config["max_text_tokens"],
    )
    module.configure_model()
    module.load_state_dict(convert(tensors, "weights/"), strict=False)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    sequences = []
    for owner, (row, mask) in enumerate(
        zip(tensors["inputs/input_ids"], tensors["inputs/attention_mask"].bool(), strict=True)
    ):
        ids = row[mask]
        sequences.append(TokenSequence(ids, torch.cat([ids[1:], ids.new_full((1,), IGNORE)]), owner=owner))
    pixels = tensors["inputs/image"]
    size = len(pixels)
    each = torch.arange(size)
    views = Views(pixels, each, each, ((1, 1),) * size, ((16, 16),) * size)
    text = Row.pack(sequences)
    counts = {"itc": float(size), "itm": 3.0 * size, "lm": float(len(text.targets))}
    infos = tuple(SampleInfo(str(at), "golden") for at in range(size))
    labels = {IMAGES: each[:, None], IMAGE_ID: each}
    return module.eval(), Batch(text, {}, {"image": views}, infos, counts, labels=labels), tensors


def test_a_step_is_the_published_one(published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, similarities, what negatives are drawn by, gradients of each loss, and all that moves."""
    module, batch, tensors = published
    meta = golden_json(CASE)
    drawn: list[Tensor] = []

    def recorded(weights: Tensor, chance: Tensor) -> Tensor:
        drawn.append(weights)
        return tensors["inputs/neg_text_for_image" if len(drawn) == 1 else "inputs/neg_image_for_text"]

    def spied(*arguments: Any, **keywords: Any) -> Any:
        found.append(contrast(*arguments, **keywords))
        return found[-1]

    contrast, found = code.contrast, []
    monkeypatch.setattr(code, "draw", recorded)
    monkeypatch.setattr(code, "contrast", spied)
    module.on_step_start()
    module.training = True  # its parts are not, so nothing is dropped
    losses = module.losses(batch)
    module.training = False
    close = {"atol": 1e-5, "rtol": 1e-5}
    for name, theirs in TERMS.items():
        torch.testing.assert_close(losses[name] / batch.counts[name], tensors[f"outputs/loss_{theirs}"], **close)
    torch.testing.assert_close(found[0].image_to_text, tensors["outputs/sim_i2t"], **close)
    torch.testing.assert_close(found[0].text_to_image, tensors["outputs/sim_t2i"], **close)
    torch.testing.assert_close(drawn[0], tensors["outputs/multinomial_weights_i2t"], **close)
    torch.testing.assert_close(drawn[1], tensors["outputs/multinomial_weights_t2i"], **close)

    table, checked = pair_table("official", writes=True, same_image=False), 0
    weights = {name.removeprefix("weights/"): tensor for name, tensor in tensors.items() if name.startswith("weights/")}
    for name, theirs in TERMS.items():
        module.zero_grad()
        (losses[name] / batch.counts[name]).backward(retain_graph=True)
        ours = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
        carried = dict(module.state_dict())
        gradients = table.from_ours(carried | ours, {})
        prefix = f"outputs/grad_{theirs}/"
        for key in (key for key in tensors if key.startswith(prefix)):
            torch.testing.assert_close(gradients[key.removeprefix(prefix)], tensors[key], atol=1e-6, rtol=1e-4)
            checked += 1
    assert checked == 20
    assert weights.keys() - gradients.keys() <= {name for name in weights if name.endswith("position_ids")}

    module.queue.push(*module.features[0])
    moved = table.from_ours(dict(module.state_dict()), {})
    after = {n.removeprefix("outputs/after/"): t for n, t in tensors.items() if n.startswith("outputs/after/")}
    assert len(after) == meta.get("changed", 93)
    for name, expected in after.items():
        torch.testing.assert_close(moved[name], expected, atol=1e-6, rtol=1e-6)
