"""What CogAgent's files have beside those of CogVLM: the fine tower, the places of features, the cross-attention.

The tower is EVA-CLIP's EVA02-CLIP-L, here timm's `eva02_large_patch14_clip_336`: `w1` is the gate, `w2` what it opens.
"""

from vlm.checkpoints.tables.rules import Rule, rename

_TOWER, _TRUNK = "model.cross_vision.vit.model.", "vision_high.trunk."
_BLOCK, _OUR_BLOCK = _TOWER + "blocks.{i}.", _TRUNK + "blocks.{i}."
_SAME = (
    *("norm1.{p}", "norm2.{p}", "attn.proj.{p}"),
    *(f"attn.{part}_proj.weight" for part in "qkv"),
)
_OTHER = {
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
    "attn.inner_attn_ln.{p}": "attn.norm.{p}",
    "mlp.w1.{p}": "mlp.fc1_g.{p}",
    "mlp.w2.{p}": "mlp.fc1_x.{p}",
    "mlp.ffn_ln.{p}": "mlp.norm.{p}",
    "mlp.w3.{p}": "mlp.fc2.{p}",
}


def cross_rules() -> tuple[Rule, ...]:
    """The rules of CogAgent that CogVLM does not have."""
    layer = "model.layers.{i}."
    return (
        rename("model.vision.pos_embed", "places.low"),
        rename("model.cross_vision.pos_embed", "places.high"),
        *(rename(_TOWER + name, _TRUNK + name) for name in ("cls_token", "pos_embed", "patch_embed.proj.{p}")),
        *(rename(_BLOCK + name, _OUR_BLOCK + name) for name in _SAME),
        *(rename(_BLOCK + theirs, _OUR_BLOCK + ours) for theirs, ours in _OTHER.items()),
        # never computed with: the head, the norm before it, tables of rotations that the code makes itself
        *(rename(_TOWER + name, _TRUNK + name, optional=True) for name in ("norm.{p}", "head.{p}", "rope.{rest}")),
        rename(_BLOCK + "attn.rope.{rest}", _OUR_BLOCK + "attn.rope.{rest}", optional=True),
        rename(layer + "cross_attn.{rest}", "language." + layer + "cross_attn.{rest}"),
        rename(
            layer + "post_cross_attention_layernorm.{p}", "language." + layer + "post_cross_attention_layernorm.{p}"
        ),
    )


def cross_unused(*, num_blocks: int) -> tuple[str, ...]:
    """What of it is carried.

    Args:
        num_blocks: of the fine tower, that are computed; the published code skips the last one.
    """
    return (
        f"{_TRUNK}blocks.{{i>={num_blocks}}}.{{rest}}",
        *(_TRUNK + name for name in ("norm.{p}", "head.{p}", "rope.{rest}", "blocks.{i}.attn.rope.{rest}")),
    )
