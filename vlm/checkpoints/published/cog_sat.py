"""`model_config.json` of SwissArmyTransformer, in which CogVLM and CogAgent were released first, as a `config.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.checkpoints.published.entries import Entries, read_json
from vlm.errors import UserError

FILE = "model_config.json"
_SIZES = frozenset(
    {"vocab_size", "hidden_size", "inner_hidden_size", "num_layers", "num_attention_heads", "max_sequence_length"}
)
_CROSS = frozenset({"cross_attn_hidden_size", "cross_hidden_size_per_attention_head", "cross_image_pix"})
_SAME: dict[str, tuple[Any, ...]] = {"model_parallel_size": (1,), "num_multi_query_heads": (0,)}
_ENTRIES = Entries(
    _SIZES | _CROSS | {"eva_args", "text_processor_version", "cross_vision"},  # the last one is ours
    {
        **_SAME,
        "model_class": ("CogVLMModel", "CogAgentModel"),
        "layernorm_order": ("pre",),
        "layernorm_epsilon": (1e-5,),
        "use_bias": (False,),
        "encoder_args": ({},),
    },
    # which tokenizer lies beside, layers that look at the fine view, how many tokens an image has, noise in training
    frozenset({"tokenizer_type", "is_decoder", "image_length", "use_neft_noise"}),
)
_TOWER = Entries(
    frozenset({"num_layers", "hidden_size", "num_attention_heads", "inner_hidden_size", "layernorm_epsilon"})
    | {"image_size", "patch_size"},
    {
        **_SAME,
        "model_class": ("EVA2CLIPModel",),
        "vocab_size": (1,),
        "layernorm_order": ("post",),
        "use_final_layernorm": (False,),
        "pre_len": (1,),
        "post_len": (0,),
        "in_channels": (3,),
    },
    frozenset({"max_sequence_length", "row_parallel_linear_final_bias"}),
)


def read_sat_config(folder: Path, *, versions: Mapping[str, str]) -> dict[str, Any]:
    """The entries of a `config.json` that says the same.

    Args:
        versions: {`text_processor_version`: `template_version`}.

    Raises:
        UserError: there is no such file, an entry is missing, or one says something else than what is computed here.
    """
    file = folder / FILE
    stated = read_json(file)
    if stated is None:
        raise UserError(f"{folder}: holds weights of SwissArmyTransformer and no {FILE}; fetch it too")
    _ENTRIES.check(stated, file)
    tower = stated.get("eva_args") or {}
    _TOWER.check(tower, f"{file}: eva_args")
    is_crossed = stated.get("model_class") == "CogAgentModel"
    missing = [name for name in sorted(_SIZES | (_CROSS if is_crossed else set())) if name not in stated]
    missing += [f"eva_args.{name}" for name in sorted(_TOWER.read) if name not in tower]
    if missing:
        raise UserError(f"{file}: has no {missing[0]}, which the network is made by")
    version = stated.get("text_processor_version")
    if version is not None and version not in versions:
        known = ", ".join(versions)
        raise UserError(f"{file}: text_processor_version is {version!r}, and only {known} is known")
    side, *_ = tower["image_size"]
    found = {
        "vocab_size": stated["vocab_size"],
        "hidden_size": stated["hidden_size"],
        "intermediate_size": stated["inner_hidden_size"],
        "num_hidden_layers": stated["num_layers"],
        "num_attention_heads": stated["num_attention_heads"],
        "max_position_embeddings": stated["max_sequence_length"],
        "rms_norm_eps": 1e-5,
        "vision_config": {
            "hidden_size": tower["hidden_size"],
            "image_size": side,
            "intermediate_size": tower["inner_hidden_size"],
            "layer_norm_eps": tower["layernorm_epsilon"],
            "num_heads": tower["num_attention_heads"],
            "num_hidden_layers": tower["num_layers"],
            "num_positions": (side // tower["patch_size"]) ** 2 + 1,
            "patch_size": tower["patch_size"],
        },
    }
    if version is not None:
        found["template_version"] = versions[version]
    if is_crossed:
        found["cross_hidden_size"] = stated["cross_attn_hidden_size"]
        found["cross_compute_hidden_size"] = (
            stated["cross_hidden_size_per_attention_head"] * stated["num_attention_heads"]
        )
        found["cross_image_size"] = stated["cross_image_pix"]
        found |= {name: stated[name] for name in ("cross_vision",) if name in stated}
    return found
