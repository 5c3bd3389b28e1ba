"""BLIP-2's first stage: LAVIS' file of the tensors that were trained, and Hugging Face's class for retrieval."""

from vlm.checkpoints.tables.bert import bert_unused, qformer_hub_rules, qformer_rules
from vlm.checkpoints.tables.eva import eva_rules, eva_unused
from vlm.checkpoints.tables.rules import Axes, Rule, rename
from vlm.checkpoints.tables.table import Table


def qformer_table(layout: str) -> Table:
    """Of a model that compares images with texts, in the layout `official` or `hf`.

    LAVIS' file has no tower. Hugging Face's class neither writes captions nor has a temperature: it is for retrieval.
    """
    if layout == "official":
        rules: tuple[Rule, ...] = (
            *qformer_rules(text=True, head=True),
            rename("vision_proj.{p}", "projections.image.{p}"),
            rename("text_proj.{p}", "projections.text.{p}"),
            rename("itm_head.{p}", "heads.match.{p}"),
            Axes(theirs=("temp",), ours=("heads.temperature",), form="-> 1"),
        )
        unused = bert_unused(ours="qformer.")
    else:
        rules = (
            *eva_rules(),
            *qformer_hub_rules(words="embeddings."),
            rename("vision_projection.{p}", "projections.image.{p}"),
            rename("text_projection.{p}", "projections.text.{p}"),
            rename("itm_head.{p}", "heads.match.{p}"),
        )
        kept = ("heads.temperature", "qformer.head.{rest}")  # what the class has no place for
        unused = (*eva_unused(), *bert_unused(ours="qformer."), *kept)
    sparse = ("qformer.layers.{i}.cross_attention.{rest}",)
    return Table(f"BLIP-2 stage 1 {layout}", rules, unused=unused, sparse=sparse)
