"""Qwen-7B, which is published by itself and inside of Qwen-VL, under the names of transformers' Qwen2."""

from vlm.checkpoints.tables.rules import Rule, Split, rename
from vlm.checkpoints.tables.table import Table

_THEIRS = "transformer.h.{i}."


def language_rules(ours: str = "") -> tuple[Rule, ...]:
    """Of Qwen-7B, by itself or in Qwen-VL.

    Args:
        ours: what stands before Qwen2's own names.
    """
    layer = ours + "model.layers.{i}."
    return (
        rename("transformer.wte.weight", ours + "model.embed_tokens.weight"),
        rename(_THEIRS + "ln_1.weight", layer + "input_layernorm.weight"),
        Split(
            theirs=(_THEIRS + "attn.c_attn.{p}",),
            ours=tuple(layer + f"self_attn.{part}_proj.{{p}}" for part in "qkv"),
        ),
        rename(_THEIRS + "attn.c_proj.weight", layer + "self_attn.o_proj.weight"),
        rename(_THEIRS + "ln_2.weight", layer + "post_attention_layernorm.weight"),
        rename(_THEIRS + "mlp.w2.weight", layer + "mlp.gate_proj.weight"),
        rename(_THEIRS + "mlp.w1.weight", layer + "mlp.up_proj.weight"),
        rename(_THEIRS + "mlp.c_proj.weight", layer + "mlp.down_proj.weight"),
        rename("transformer.ln_f.weight", ours + "model.norm.weight"),
        rename("lm_head.weight", ours + "lm_head.weight"),
    )


def qwen_table() -> Table:
    """Names of a Qwen-7B by itself."""
    return Table(layout="Qwen-7B", rules=language_rules())
