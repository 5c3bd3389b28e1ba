"""InternLM-7B (2023) and InternLM2 (2024), which compute what transformers' Llama does: the first with biases in its
attention, the second with queries that share keys."""

from collections.abc import Mapping
from typing import Any

_KEPT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")


def as_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the Llama class from the `config.json` of an InternLM-7B, or of a system over one."""
    return {
        "model_type": "llama",
        **{name: config[name] for name in _KEPT},
        "num_key_value_heads": config["num_attention_heads"],
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "attention_bias": True,
        "mlp_bias": False,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


def internlm2_as_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the Llama class from the `config.json` of an InternLM2, or of a system over one.

    Its scaling of positions behind `max_position_embeddings` tokens is left out: up to there, it is 1.
    """
    return {
        "model_type": "llama",
        **{name: config[name] for name in _KEPT},
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": float(config.get("rope_theta", 10000)),
        "tie_word_embeddings": False,
    }
