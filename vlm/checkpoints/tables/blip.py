"""BLIP's tensors: the official `.pth` and Hugging Face's classes, which differ in the names of the ViT alone."""

from vlm.checkpoints.tables.bert import bert_unused, med_rules
from vlm.checkpoints.tables.rules import Axes, Rule, rename
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


def vit_rules(layout: str, *, ours: str = "vision.trunk.", theirs: str = "visual_encoder.") -> tuple[Rule, ...]:
    """Of the ViT in one of `LAYOUTS`; `theirs` is what its official names begin with."""
    block, renamed = _BLOCK[layout]
    qkv = "attn.qkv" if layout == "official" else "self_attn.qkv"
    names = {**renamed, "attn.qkv": qkv, "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    trunk = [(published, ours + own) for own, published in _TRUNK[layout].items()]
    blocks = [(f"{block}{published}.{{p}}", f"{ours}blocks.{{i}}.{own}.{{p}}") for own, published in names.items()]
    return tuple(rename(name.replace("visual_encoder.", theirs), own) for name, own in (*trunk, *blocks))


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


def pair_table(layout: str, *, writes: bool, same_image: bool) -> Table:
    """Of a model that compares images with texts.

    Hugging Face's class holds neither the temperature nor the momentum copies and the queue, so they are lost there.

    Args:
        writes: it has a decoder (pre-training).
        same_image: its queue knows images (fine-tuning for retrieval).
    """
    decoder = "text_decoder." if writes else None
    rules: list[Rule] = [
        *vit_rules(layout),
        *med_rules(encoder="text_encoder.", decoder=decoder),
        rename("vision_proj.{p}", "projections.image.{p}"),
        rename("text_proj.{p}", "projections.text.{p}"),
        rename("itm_head.{p}", "heads.match.{p}"),
    ]
    unused = [*bert_unused(ours="language.")]
    if layout == "official":
        place = "ptr_queue" if same_image else "queue_ptr"
        rules += [
            Axes(theirs=("temp",), ours=("heads.temperature",), form="-> 1"),
            *vit_rules(layout, ours="momentum.vision.trunk.", theirs="visual_encoder_m."),
            *med_rules(encoder="text_encoder_m.", decoder=None, ours="momentum.language."),
            rename("vision_proj_m.{p}", "momentum.projections.image.{p}"),
            rename("text_proj_m.{p}", "momentum.projections.text.{p}"),
            rename("image_queue", "queue.image"),
            rename("text_queue", "queue.text"),
            rename(place, "queue.place"),
            *([rename("idx_queue", "queue.ids")] if same_image else []),
        ]
        unused += bert_unused(ours="momentum.language.")
    return Table(f"BLIP pairs {layout}", tuple(rules), unused=tuple(unused))
