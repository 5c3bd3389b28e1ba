"""EVA-CLIP-g as BLIP-2 and its descendants have it: Hugging Face's names <-> timm's `eva_giant_patch14_clip_224`.

LAVIS publishes the tower under timm's names. Hugging Face's files have a bias of keys too, which is zero and, whatever
it is, changes no attention: it is carried.
"""

from dataclasses import dataclass

import torch

from vlm.checkpoints.tables.rules import Part, Rule, Side, Split, rename
from vlm.checkpoints.tables.table import Table


@dataclass(frozen=True, kw_only=True)
class QKVBias(Split):
    """Biases of queries, keys and values in one tensor; ours has none of keys, so where none is carried it is zero."""

    def from_ours(self, parts: list[Part]) -> list[Part]:
        query, key, value = parts
        assert query is not None
        return super().from_ours([query, torch.zeros_like(query) if key is None else key, value])

    def spare(self, side: Side) -> frozenset[int]:
        return frozenset({1}) if side == "ours" else frozenset()


def eva_rules(*, theirs: str = "vision_model.", ours: str = "vision.trunk.") -> tuple[Rule, ...]:
    """Of Hugging Face's tower, without the norm behind it, which is the Q-Former's here."""
    layer, block = theirs + "encoder.layers.{i}.", ours + "blocks.{i}."
    return (
        rename(theirs + "embeddings.class_embedding", ours + "cls_token"),
        rename(theirs + "embeddings.position_embedding", ours + "pos_embed"),
        rename(theirs + "embeddings.patch_embedding.{p}", ours + "patch_embed.proj.{p}"),
        rename(layer + "layer_norm1.{p}", block + "norm1.{p}"),
        rename(layer + "self_attn.qkv.weight", block + "attn.qkv.weight"),
        QKVBias(
            theirs=(layer + "self_attn.qkv.bias",),
            ours=tuple(block + f"attn.{part}_bias" for part in "qkv"),
        ),
        rename(layer + "self_attn.projection.{p}", block + "attn.proj.{p}"),
        rename(layer + "layer_norm2.{p}", block + "norm2.{p}"),
        rename(layer + "mlp.fc1.{p}", block + "mlp.fc1.{p}"),
        rename(layer + "mlp.fc2.{p}", block + "mlp.fc2.{p}"),
    )


def eva_unused(*, ours: str = "vision.trunk.") -> tuple[str, ...]:
    """What is carried of it."""
    return (ours + "blocks.{i}.attn.k_bias",)


def eva_table(*, num_blocks: int) -> Table:
    """The tower inside a folder of BLIP-2 or InstructBLIP; everything behind it is dropped.

    Args:
        num_blocks: blocks the system computes.
    """
    behind = ("vision_model.post_layernorm.{p}", "query_tokens", "qformer.{rest}", "language_projection.{p}")
    behind += ("language_model.{rest}", "embeddings.{rest}", "vision_projection.{p}", "text_projection.{p}")
    return Table(
        layout="BLIP-2 hf",
        rules=(*eva_rules(), *(rename(name, None) for name in (*behind, "itm_head.{p}"))),
        unused=(*eva_unused(), f"vision.trunk.blocks.{{i>={num_blocks}}}.{{rest}}"),
    )
