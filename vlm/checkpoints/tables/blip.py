"""BLIP's tensors: the official `.pth` and Hugging Face's classes, which differ in the names of the ViT alone."""

from vlm.checkpoints.tables.bert import bert_unused, med_rules
from vlm.checkpoints.tables.rules import Rule, rename
from vlm.checkpoints.tables.table import Table

LAYOUTS = ("official", "hf")
_BLOCK = {
    "official": ("visual_encoder.blocks.{i}.", {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attn.proj"}),
    "hf": (
        "vision_model.encoder.layers.{i}.",
        {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.projection"},
    ),
}
_TRUNK = {
    "official": {
        "cls_token": "visual_encoder.cls_token",
        "pos_embed": "visual_encoder.pos_embed",
        "patch_embed.proj.{p}": "visual_encoder.patch_embed.proj.{p}",
        "norm.{p}": "visual_encoder.norm.{p}",
    },
    "hf": {
        "cls_token": "vision_model.embeddings.class_embedding",
        "pos_embed": "vision_model.embeddings.position_embedding",
        "patch_embed.proj.{p}": "vision_model.embeddings.patch_embedding.{p}",
        "norm.{p}": "vision_model.post_layernorm.{p}",
    },
}


def vit_rules(layout: str, *, ours: str = "vision.trunk.") -> tuple[Rule, ...]:
    """Of the ViT in one of `LAYOUTS`."""
    block, renamed = _BLOCK[layout]
    qkv = "attn.qkv" if layout == "official" else "self_attn.qkv"
    names = {**renamed, "attn.qkv": qkv, "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    return (
        *(rename(theirs, ours + own) for own, theirs in _TRUNK[layout].items()),
        *(rename(f"{block}{theirs}.{{p}}", f"{ours}blocks.{{i}}.{own}.{{p}}") for own, theirs in names.items()),
    )


def caption_table(layout: str) -> Table:
    """Of a model that describes images: a decoder alone."""
    rules = med_rules(encoder=None, decoder="text_decoder.")
    return Table(f"BLIP caption {layout}", (*vit_rules(layout), *rules), unused=bert_unused(ours="language."))


def vqa_table(layout: str) -> Table:
    """Of a model that answers questions: an encoder and a decoder that share nothing."""
    rules = (
        *med_rules(encoder="text_encoder.", decoder=None, ours="encoder."),
        *med_rules(encoder=None, decoder="text_decoder."),
    )
    unused = (*bert_unused(ours="encoder."), *bert_unused(ours="language."))
    return Table(f"BLIP VQA {layout}", (*vit_rules(layout), *rules), unused=unused)


def nlvr_table() -> Table:
    """Of a model that judges sentences about two images; transformers has no class for it."""
    theirs, ours = "text_encoder.encoder.layer.{i}.crossattention.", "language.layers.{i}.cross_attention."
    own = tuple(
        rule
        for rule in med_rules(encoder="text_encoder.", decoder=None)
        if not any("crossattention" in name for name in rule.theirs)
    )
    looks = [("query", "query"), ("key", "key"), ("value", "value")]
    pairs = [(f"self{at}.{name}", f"{place}{name}") for at, place in ((0, ""), (1, "second.")) for name, _ in looks]
    pairs += [("output.dense0", "dense"), ("output.dense1", "second.dense"), ("output.LayerNorm", "norm")]
    rules: tuple[Rule, ...] = (
        *vit_rules("official"),
        *own,
        *(rename(f"{theirs}{name}.{{p}}", f"{ours}{place}.{{p}}") for name, place in pairs),
        rename(theirs + "output.merge_layer.{p}", ours + "merge.{p}"),
        rename("cls_head.0.{p}", "head.0.{p}"),
        rename("cls_head.2.{p}", "head.2.{p}"),
    )
    return Table(
        "BLIP NLVR2",
        rules,
        unused=bert_unused(ours="language."),
        sparse=(ours + "merge.{p}", theirs + "output.merge_layer.{p}"),
    )
