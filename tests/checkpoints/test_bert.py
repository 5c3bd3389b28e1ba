"""A BERT's folder as what text models start from."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForPreTraining

from vlm.building.network import allocate, empty_weights, initialisers, load_or_init
from vlm.building.weight_sources import base_source
from vlm.connectors import QFormer
from vlm.language import Med

SIZE = {"dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 48, "vocab_size": 52, "max_positions": 16}


@pytest.mark.parametrize("kind", ["med", "qformer"])
def test_copies_rows_for_added_tokens_and_what_is_new(tmp_path: Path, kind: str) -> None:
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    theirs = BertForPreTraining(config)
    theirs.save_pretrained(tmp_path)
    given = {**SIZE, "weights": str(tmp_path)}
    description = Med(**given) if kind == "med" else QFormer(**given, text=True, head=True)
    with empty_weights():
        module = nn.Module()
        module.add_module("part", description.build(24))
    allocate(module, torch.device("cpu"))
    source = base_source("part", description, module.part)
    report, _ = load_or_init(
        module, [source], seed=1, initialisers=initialisers({"part": module.part}, {"part": description})
    )
    state, layer = module.part.state_dict(), theirs.bert.encoder.layer[1]
    copies = {
        "med": [("attention.query", "decoder_attention.query", layer.attention.self.query)],
        "qformer": [("mlp.fc1", "query_mlp.fc1", layer.intermediate.dense)],
    }
    for first, second, published in copies[kind]:
        assert torch.equal(state[f"layers.1.{first}.weight"], published.weight)
        assert torch.equal(state[f"layers.1.{second}.weight"], published.weight)
    assert torch.equal(state["embeddings.words.weight"][:50], theirs.bert.embeddings.word_embeddings.weight)
    assert state["embeddings.words.weight"][50:].std().item() == pytest.approx(0.02, rel=0.4)
    assert sorted(report.resized) == ["part.embeddings.words.weight", "part.head.bias"]
    fresh = ("part.queries", "part.feature_norm.")
    assert all(".cross_attention." in name or name.startswith(fresh) for name in report.new)
