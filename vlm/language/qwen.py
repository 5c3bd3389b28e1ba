"""Qwen-7B (2023), which computes what transformers' Qwen2 does."""

from collections.abc import Mapping
from typing import Any


def as_qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the Qwen2 class from the `config.json` of a Qwen-7B.

    Its `intermediate_size` counts both halves of the gated layer. Its scaling of positions and of attention behind
    `seq_length` tokens is left out: up to there, both are 1.
    """
    return {
        "model_type": "qwen2",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"] // 2,
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_attention_heads"],
        "max_position_embeddings": config.get("seq_length", 2048),
        "rms_norm_eps": config.get("layer_norm_epsilon", 1e-6),
        "rope_theta": float(config.get("rotary_emb_base", 10000)),
        "tie_word_embeddings": False,
    }
