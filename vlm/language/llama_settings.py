"""Settings of transformers' Llama for networks that compute the same and are published under other names.

InternLM-7B (2023) has biases in its attention, InternLM2 (2024) queries that share keys, CogVLM's is Vicuna.
"""

from collections.abc import Mapping
from typing import Any

_KEPT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")


def llama_settings(config: Mapping[str, Any], *, attention_bias: bool = False) -> dict[str, Any]:
    """Settings of the Llama class from the `config.json` of such a network, or of a system over one.

    A scaling of positions behind `max_position_embeddings` tokens (InternLM2) is left out: up to there, it is 1.
    """
    return {
        "model_type": "llama",
        **{name: config[name] for name in _KEPT},
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "attention_bias": attention_bias,
        "mlp_bias": False,
        "rope_theta": float(config.get("rope_theta", 10000)),
        "tie_word_embeddings": False,
    }
