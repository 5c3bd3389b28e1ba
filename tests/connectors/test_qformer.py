"""The Q-Former against the official numbers of BLIP-2's first stage, InstructBLIP and XComposer."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForPreTraining

from tests.conftest import golden, golden_json
from vlm.building.blocks import recompute_blocks
from vlm.building.network import allocate, empty_weights, initialisers, load_or_init
from vlm.checkpoints.tables.bert import bert_rules, bert_unused, qformer_rules
from vlm.checkpoints.tables.table import Table
from vlm.connectors import QFormer
from vlm.connectors.qformer import QFormerModule

TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
"""Float32 noise between SDPA and the published softmax: at most 3.6e-6 seen on hidden states of size 4."""


def published(case: str, *, text: bool, head: bool) -> tuple[QFormerModule, Table, dict[str, Tensor]]:
    """A Q-Former with the official weights, its table, and the tensors of the case."""
    tensors, config = golden(case), golden_json(case)["config"]
    names = {"qh": "hidden_size", "ql": "num_hidden_layers", "qheads": "num_attention_heads", "qi": "intermediate_size"}
    size = {names.get(name, name): value for name, value in config.items()}
    description = QFormer(
        dim=size["hidden_size"],
        num_layers=size["num_hidden_layers"],
        num_heads=size["num_attention_heads"],
        mlp_dim=size["intermediate_size"],
        vocab_size=size.get("vocab_size", 0),
        max_positions=size.get("max_position_embeddings", 0),
        num_queries=size.get("num_query_tokens") or size["nq"],
        text=text,
        head=head,
    )
    network = description.build(in_dim=size.get("encoder_width") or size["vw"]).eval()
    table = Table(
        layout="LAVIS",
        rules=qformer_rules(text=text, head=head),
        unused=bert_unused(ours="qformer."),
        sparse=("qformer.layers.{i}.cross_attention.{rest}",),
    )
    weights = official(tensors)
    ours, carried = table.to_ours(weights.items())
    network.load_state_dict({name.removeprefix("qformer."): tensor for name, tensor in ours.items()})
    back = table.from_ours({f"qformer.{n}": t for n, t in network.state_dict().items()}, carried)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    return network, table, tensors


def official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [name.removeprefix("weights/") for name in tensors if name.startswith("weights/")]
    return {n: tensors[f"weights/{n}"] for n in names if n.startswith(("Qformer.", "query_tokens", "ln_vision."))}


def check_gradients(network: QFormerModule, table: Table, tensors: Mapping[str, Tensor], kind: str) -> int:
    """How many gradients were compared with those of `outputs/grad_<kind>`."""
    prefix, compared = f"outputs/grad_{kind}/", 0
    ours, _ = table.to_ours(official(tensors).items())
    for name in (name.removeprefix(prefix) for name in tensors if name.startswith(prefix)):
        if name in official(tensors):
            renamed = next(n for n, tensor in ours.items() if tensor is tensors[f"weights/{name}"])
            gradient = network.get_parameter(renamed.removeprefix("qformer.")).grad
            expected = tensors[prefix + name]
            # one token is nearly constant, and its norm amplifies float32 noise in both codes: 3e-6 of the largest seen
            torch.testing.assert_close(gradient, expected, atol=1e-6 + 1e-5 * expected.abs().max().item(), rtol=1e-4)
            compared += 1
    return compared


@pytest.mark.parametrize("case", ["blip2_stage1__a", "blip2_stage1_image_id__a"])
def test_first_stage_of_blip_2(case: str) -> None:
    """Queries alone, text alone, both, text after queries; what the three losses make of them, and their gradients."""
    network, table, tensors = published(case, text=True, head=True)
    inputs: Any = {n.removeprefix("inputs/"): t for n, t in tensors.items() if n.startswith("inputs/")}
    weights = {n.removeprefix("weights/"): t for n, t in tensors.items()}
    features, ids, mask = inputs["image_features"], inputs["input_ids"], inputs["attention_mask"].bool()

    torch.testing.assert_close(network.feature_norm(features), tensors["outputs/ln_vision"], **TOLERANCE)
    seen, read = network.look(features), network.read(ids, mask)
    torch.testing.assert_close(seen.hidden, tensors["outputs/query_output"], **TOLERANCE)
    torch.testing.assert_close(read[mask], tensors["outputs/text_output"][mask], **TOLERANCE)
    images = F.normalize(F.linear(seen.hidden, weights["vision_proj.weight"], weights["vision_proj.bias"]), dim=-1)
    texts = F.normalize(F.linear(read[:, 0], weights["text_proj.weight"], weights["text_proj.bias"]), dim=-1)
    similar = torch.einsum("vqd,sd->vsq", images, texts).amax(-1) / weights["temp"]
    # divided by a temperature of 0.07; 1.1e-5 seen on scores of size 14
    torch.testing.assert_close(similar, tensors["outputs/sim_i2t"], atol=3e-5, rtol=1e-5)

    chosen_image, chosen_text = inputs["neg_image_for_text"], inputs["neg_text_for_image"]
    num_queries = network.queries.shape[1]
    matched = network.match(
        torch.cat([features, features[chosen_image], features]),
        torch.cat([ids, ids, ids[chosen_text]]),
        torch.cat([mask, mask, mask[chosen_text]]),
    )
    real = torch.cat([mask, mask, mask[chosen_text]])
    real = torch.cat([real.new_ones(len(real), num_queries), real], dim=1)
    torch.testing.assert_close(matched[real], tensors["outputs/itm_hidden_all"][real], **TOLERANCE)
    match = F.linear(matched[:, :num_queries], weights["itm_head.weight"], weights["itm_head.bias"]).mean(1)
    torch.testing.assert_close(match, tensors["outputs/itm_logits"], **TOLERANCE)

    start = ids.clone()
    start[:, 0] = golden_json(case)["config"]["bos_token_id"]
    written = network.write(start, seen)
    logits = network.logits(written)
    torch.testing.assert_close(written[mask], tensors["outputs/lm_hidden"][mask], **TOLERANCE)
    # 1.7e-5 seen on logits of size 11
    torch.testing.assert_close(logits[mask], tensors["outputs/lm_logits"][mask], atol=5e-5, rtol=1e-5)

    labels = torch.tensor([1] * len(ids) + [0] * 2 * len(ids))
    losses = {
        "itm": F.cross_entropy(match, labels),
        "lm": F.cross_entropy(logits[:, :-1][mask[:, 1:]], start[:, 1:][mask[:, 1:]], label_smoothing=0.1),
    }
    for name, loss in losses.items():
        torch.testing.assert_close(loss, tensors[f"outputs/loss_{name}"], atol=1e-5, rtol=1e-5)
        network.zero_grad()
        loss.backward(retain_graph=True)
        assert check_gradients(network, table, tensors, name) >= 6


def test_queries_of_instructblip_see_the_instruction() -> None:
    network, table, tensors = published("instructblip_qformer__a", text=True, head=False)
    inputs: Any = {n.removeprefix("inputs/"): t for n, t in tensors.items() if n.startswith("inputs/")}
    arguments = inputs["image_features"], inputs["qformer_input_ids"], inputs["qformer_attention_mask"].bool()
    found = network(*arguments)
    torch.testing.assert_close(found, tensors["outputs/query_output"], **TOLERANCE)
    assert (network(arguments[0]) - found).abs().max() > 0.1
    tokens = F.linear(found, tensors["weights/llm_proj.weight"], tensors["weights/llm_proj.bias"])
    torch.testing.assert_close(tokens, tensors["outputs/llm_visual_tokens"], **TOLERANCE)
    (tokens * inputs["grad_probe"]).sum().backward()
    assert check_gradients(network, table, tensors, "probe") == 5
    # like the official code, it reaches the last layer's network for text, though nothing comes back from it
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_queries_alone_have_no_text() -> None:
    """XComposer, and BLIP-2 from its second stage on."""
    network, _, tensors = published("xcomposer1_model__a", text=False, head=False)
    found = network(tensors["outputs/vit"])
    flags = 1, -1
    expected = tensors["outputs/image_tokens"][:, slice(*flags)]
    tokens = F.linear(found, tensors["weights/internlm_proj.weight"], tensors["weights/internlm_proj.bias"])
    torch.testing.assert_close(tokens, expected, atol=3e-5, rtol=1e-5)


def test_new_tensors_and_recomputation() -> None:
    """Normal with 0.02 as BERT's, none left out; recomputed layers give the same gradients, dropout included."""
    size: dict[str, Any] = {"dim": 64, "num_layers": 3, "num_heads": 4, "mlp_dim": 96, "vocab_size": 50}
    gradients = []
    for recomputed in (False, True):
        description = QFormer(**size, max_positions=16, text=True, head=True)
        with empty_weights():
            parts = {"qformer": description.build(in_dim=24)}
        module = torch.nn.Module()
        module.add_module("qformer", parts["qformer"])
        allocate(module, torch.device("cpu"))
        load_or_init(module, [], seed=1, initialisers=initialisers(parts, {"qformer": description}))
        network = parts["qformer"].train()
        if recomputed:
            recompute_blocks(network, every=1)
        torch.manual_seed(3)
        features, ids = torch.randn(2, 5, 24), torch.randint(50, (2, 7))
        torch.manual_seed(4)
        written = network.logits(network.write(ids, network.look(features)))
        (written.sum() + network.match(features, ids, torch.ones_like(ids).bool()).sum()).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(g is not None for g in gradients[0])
    torch.testing.assert_close(*gradients)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name


def test_a_bert_is_where_it_starts() -> None:
    """Words and head from it, both kinds of networks from its one; rows for added tokens; the rest starts new."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    theirs = {name: tensor.clone() for name, tensor in BertForPreTraining(config).state_dict().items()}
    old = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in theirs.items()}
    network = QFormer(
        dim=32, num_layers=3, num_heads=4, mlp_dim=48, vocab_size=52, max_positions=16, text=True, head=True
    ).build(in_dim=24)
    table = Table(layout="BERT", rules=bert_rules(mlps=("mlp", "query_mlp"), head=True))
    made, _ = table.to_ours(theirs.items())
    assert made.keys() == table.to_ours(old.items())[0].keys()
    state = network.state_dict()
    new = sorted({name for name in state if name not in made})
    assert all(name.startswith(("queries", "feature_norm.")) or ".cross_attention." in name for name in new)
    assert torch.equal(made["layers.1.mlp.fc1.weight"], made["layers.1.query_mlp.fc1.weight"])
    for part, name in (("embeddings", "words.weight"), ("head", "bias")):
        value, _ = network.get_submodule(part).adopt(name, made[f"{part}.{name}"])
        assert torch.equal(value[:50], made[f"{part}.{name}"])
        made[f"{part}.{name}"] = value
    network.load_state_dict(state | made)
    network.eval()
    # what it reads is what BERT reads, but for the segments that BERT adds and nobody trains
    model = BertForPreTraining(config).eval()
    model.load_state_dict(theirs)
    model.bert.embeddings.token_type_embeddings.weight.data.zero_()
    ids, mask = torch.randint(50, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True)
        read = network.read(ids, mask)
        torch.testing.assert_close(read, outputs.hidden_states[-1], **TOLERANCE)
        torch.testing.assert_close(network.logits(read)[..., :50], outputs.prediction_logits, **TOLERANCE)
