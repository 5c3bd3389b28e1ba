"""The language model that a published `config.json` describes, with every entry that its class of transformers has."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.checkpoints.published.entries import BOOKKEEPING, OFF, refusal
from vlm.errors import UserError

_LLAMA = {  # values a config.json leaves out when they are these (hub files do)
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_GEMMA = {
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
_MISTRAL = {
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
_MIXTRAL = {
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | _MISTRAL,
    "gemma": _LLAMA | _GEMMA,
    "mixtral": _LLAMA | _MIXTRAL,
}
"""What the config.json of a kind in official layouts leaves out when it is this, in the words of transformers 4."""
PROVEN = (*DEFAULTS, "gemma2", "granite", "phi3", "qwen2", "qwen3", "smollm3")
"""Kinds that have been held against transformers' own LLaVA (`tests/checkpoints/test_published_entries.py`)."""
HEAD_OF_HUB = {"logits_scaling": 1.0, "final_logit_softcapping": None}
"""What transformers' LLaVA classes make of a language model: they have a plain head of their own on its body."""
_CORE = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
         "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
_ROPE_4 = ("rope_theta", "rope_scaling", "partial_rotary_factor")  # entries of transformers 4
_BY_LENGTH = ("dynamic", "longrope", "su")
_HARMLESS = ("router_aux_loss_coef", "output_router_logits")  # a loss of its own, which no stage has


def language_entries(kind: str) -> frozenset[str]:
    """Entries that the configuration class of a kind has."""
    from transformers import CONFIG_MAPPING

    return frozenset(CONFIG_MAPPING[kind].__dataclass_fields__) | {*_ROPE_4, "hidden_activation"}


def read_language(text: Mapping[str, Any], file: Path, *, kind: str) -> dict[str, Any]:
    """Fields of the configuration, `model_type` among them where it is not Llama's.

    Args:
        text: what the file says about the language model; entries that its class does not have are left out.
        file: for messages.
        kind: `model_type` of the language model by itself.

    Raises:
        UserError: another kind than `PROVEN`, or an entry whose value is not computed here.
    """
    if kind not in PROVEN:
        raise UserError(
            f"{file}: the language model is of the kind {kind!r}, which may compute otherwise than the kinds that have "
            f"been tried ({', '.join(PROVEN)}); weights of that kind cannot be opened"
        )
    known = language_entries(kind) - BOOKKEEPING - set(_HARMLESS)
    own = {key: value for key, value in text.items() if key in known | {"bos_token_id", "eos_token_id", "pad_token_id"}}
    for key in ("use_bidirectional_attention", "quantization_config"):
        if text.get(key) not in OFF:
            raise refusal(file, key, text[key], expected=(False,))
    _check_rope(own, file, in_words_of_4=kind in DEFAULTS)
    language = {**_defaults(kind), **own}
    if kind in DEFAULTS:
        if language.pop("hidden_activation", None):  # of Gemma: it came later and counts
            language["hidden_act"] = own["hidden_activation"]
        language |= _rope(language.pop("rope_parameters", None))
        language.setdefault("num_key_value_heads", language["num_attention_heads"])
    if kind == "mistral" and not language.get("sliding_window"):  # without a window it computes as Llama
        language.pop("sliding_window", None)
        return language
    return language if kind == "llama" else {"model_type": kind, **language}


def read_t5(text: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a T5, whose activation (`dense_act_fn`) counts beside the kind of its layers (`feed_forward_proj`).

    LAVIS computes FlanT5 with another activation than its own file says, and the published folders state it.
    """
    from transformers import CONFIG_MAPPING

    known = frozenset(CONFIG_MAPPING["t5"]().to_dict()) | {"feed_forward_proj", "scale_decoder_outputs"}
    known -= {"model_type", "is_gated_act", *BOOKKEEPING}  # the second follows from feed_forward_proj
    entries = {name: value for name, value in text.items() if name in known}
    # transformers 5 writes whether the head is a table of its own under another name
    untied = entries.pop("scale_decoder_outputs", None) is False or entries.get("tie_word_embeddings") is False
    return {"model_type": "t5", **entries, "tie_word_embeddings": not untied}


def _defaults(kind: str) -> dict[str, Any]:
    if kind in DEFAULTS:
        return dict(DEFAULTS[kind])
    from transformers import CONFIG_MAPPING

    stated = CONFIG_MAPPING[kind]().to_dict()
    return {key: stated[key] for key in _CORE if key in stated}


def _check_rope(language: Mapping[str, Any], file: Path, *, in_words_of_4: bool) -> None:
    """Refuses positions whose scale follows the longest sequence at hand: in a pack that is another sample's."""
    for key in ("rope_scaling", "rope_parameters"):
        scaling = language.get(key) or {}
        if not isinstance(scaling, Mapping):
            raise refusal(file, key, scaling, expected=({},))
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind in _BY_LENGTH:
            raise refusal(file, key, scaling, expected=("default", "linear", "yarn", "llama3"))
        if in_words_of_4 and scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise refusal(file, key, scaling, expected=({"partial_rotary_factor": 1.0},))


def _rope(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields of transformers 4 for the `rope_parameters` of transformers 5, which official code does not know."""
    if parameters is None:
        return {}
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    plain = scaling.get("rope_type", "default") == "default"
    theta = {"rope_theta": parameters["rope_theta"]} if "rope_theta" in parameters else {}
    return theta | {"rope_scaling": None if plain else scaling}
