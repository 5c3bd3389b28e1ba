"""CLIP vision towers: Hugging Face names <-> timm `vit_*_clip_quickgelu_*` names.

The published tower has more than a system that reads an inner layer computes with: the blocks above that layer, the
final norm and, in files of older transformers versions, a buffer of position numbers. Those are carried.
"""

from vlm.checkpoints.tables.rules import Axes, Fused, Rule, rename
from vlm.checkpoints.tables.table import Table


def clip_rules(*, theirs: str, ours: str = "vision.trunk.") -> tuple[Rule, ...]:
    """Rules of a whole tower.

    Args:
        theirs: prefix before `embeddings`, `encoder` and so on, with its dot.
        ours: prefix of the timm module.
    """
    block, layer = ours + "blocks.{i}.", theirs + "encoder.layers.{i}."
    return (
        Axes(theirs=(theirs + "embeddings.class_embedding",), ours=(ours + "cls_token",), form="D -> 1 1 D"),
        rename(theirs + "embeddings.patch_embedding.weight", ours + "patch_embed.proj.weight"),
        Axes(
            theirs=(theirs + "embeddings.position_embedding.weight",), ours=(ours + "pos_embed",), form="N D -> 1 N D"
        ),
        rename(theirs + "embeddings.position_ids", ours + "position_ids", optional=True),
        rename(theirs + "pre_layrnorm.{p}", ours + "norm_pre.{p}"),  # the misspelling is the published name
        Fused(
            theirs=tuple(layer + f"self_attn.{name}_proj.{{p}}" for name in "qkv"),
            ours=(block + "attn.qkv.{p}",),
        ),
        rename(layer + "self_attn.out_proj.{p}", block + "attn.proj.{p}"),
        rename(layer + "layer_norm1.{p}", block + "norm1.{p}"),
        rename(layer + "layer_norm2.{p}", block + "norm2.{p}"),
        rename(layer + "mlp.fc1.{p}", block + "mlp.fc1.{p}"),
        rename(layer + "mlp.fc2.{p}", block + "mlp.fc2.{p}"),
        rename(theirs + "post_layernorm.{p}", ours + "norm.{p}"),
    )


def clip_unused(*, num_blocks: int, ours: str = "vision.trunk.") -> tuple[str, ...]:
    """What a tower that ends after `num_blocks` blocks, without the final norm, carries."""
    return (f"{ours}blocks.{{i>={num_blocks}}}.{{rest}}", f"{ours}norm.{{p}}", f"{ours}position_ids")


def clip_table(*, theirs: str, num_blocks: int) -> Table:
    """The tower inside a CLIP checkpoint of its own; the text side is dropped.

    Args:
        theirs: `"vision_model."`, or `""` for a tower saved alone.
        num_blocks: blocks the system computes.
    """
    text_side = ("text_model.{rest}", "text_projection.weight", "visual_projection.weight", "logit_scale")
    return Table(
        layout="Hugging Face CLIP",
        rules=(*clip_rules(theirs=theirs), *(rename(name, None) for name in text_side)),
        unused=clip_unused(num_blocks=num_blocks),
    )
