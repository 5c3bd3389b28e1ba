"""CogVLM's published names <-> ours: EVA02-CLIP-E as timm has it, the gated connector, Llama with a visual expert."""

from vlm.checkpoints.tables.eva import QKVBias, eva_unused
from vlm.checkpoints.tables.rules import Axes, Rule, Split, rename

_VISION = "model.vision."
_LAYER = "model.layers.{i}."
_MLP = ("gate_proj", "up_proj", "down_proj")
_CONNECTOR = {
    "linear_proj.weight": "linear.weight",
    "norm1.{p}": "norm.{p}",
    "gate_proj.weight": "gate_proj.weight",
    "dense_h_to_4h.weight": "up_proj.weight",
    "dense_4h_to_h.weight": "down_proj.weight",
}
VISION_UNUSED = eva_unused()
"""What is carried of the tower."""


def vision_rules() -> tuple[Rule, ...]:
    """Of tower and connector."""
    trunk, patches = "vision.trunk.", _VISION + "patch_embedding."
    layer, block = _VISION + "transformer.layers.{i}.", trunk + "blocks.{i}."
    return (
        rename(_VISION + "boi", "connector.start"),
        rename(_VISION + "eoi", "connector.end"),
        *(rename(f"{_VISION}linear_proj.{theirs}", f"connector.{ours}") for theirs, ours in _CONNECTOR.items()),
        Axes(theirs=(patches + "cls_embedding",), ours=(trunk + "cls_token",), form="N D -> 1 N D"),
        Axes(theirs=(patches + "position_embedding.weight",), ours=(trunk + "pos_embed",), form="N D -> 1 N D"),
        rename(patches + "proj.{p}", trunk + "patch_embed.proj.{p}"),
        rename(layer + "attention.query_key_value.weight", block + "attn.qkv.weight"),
        QKVBias(
            theirs=(layer + "attention.query_key_value.bias",),
            ours=tuple(block + f"attn.{part}_bias" for part in "qkv"),
        ),
        rename(layer + "attention.dense.{p}", block + "attn.proj.{p}"),
        rename(layer + "input_layernorm.{p}", block + "norm1.{p}"),  # both norms follow what they belong to
        rename(layer + "mlp.fc1.{p}", block + "mlp.fc1.{p}"),
        rename(layer + "mlp.fc2.{p}", block + "mlp.fc2.{p}"),
        rename(layer + "post_attention_layernorm.{p}", block + "norm2.{p}"),
    )


def language_rules() -> tuple[Rule, ...]:
    """Of the language model and its visual expert."""
    ours = "language." + _LAYER
    return (
        rename("model.embed_tokens.weight", "language.model.embed_tokens.weight"),
        *(rule for theirs, path in (("language", ""), ("vision", ".expert")) for rule in _expert_rules(theirs, path)),
        rename(_LAYER + "input_layernorm.weight", ours + "input_layernorm.weight"),
        rename(_LAYER + "post_attention_layernorm.weight", ours + "post_attention_layernorm.weight"),
        rename(_LAYER + "self_attn.rotary_emb.inv_freq", None),
        rename("model.norm.weight", "language.model.norm.weight"),
        rename("lm_head.weight", "language.lm_head.weight"),
    )


def _expert_rules(theirs: str, path: str) -> tuple[Rule, ...]:
    """Of the linear layers of one kind of tokens.

    Args:
        theirs: the kind.
        path: behind the names of our layers.
    """
    ours = "language." + _LAYER
    attention = f"{_LAYER}self_attn.{theirs}_expert_"
    return (
        Split(
            theirs=(attention + "query_key_value.weight",),
            ours=tuple(f"{ours}self_attn.{part}_proj{path}.weight" for part in "qkv"),
        ),
        rename(attention + "dense.weight", f"{ours}self_attn.o_proj{path}.weight"),
        *(rename(f"{_LAYER}mlp.{theirs}_mlp.{leaf}.weight", f"{ours}mlp.{leaf}{path}.weight") for leaf in _MLP),
    )
