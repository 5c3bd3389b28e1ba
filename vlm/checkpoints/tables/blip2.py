"""BLIP-2's first stage: LAVIS' file of the tensors that were trained, and Hugging Face's class for retrieval."""

from vlm.checkpoints.tables.bert import bert_unused, qformer_hub_rules, qformer_rules
from vlm.checkpoints.tables.eva import eva_rules, eva_unused
from vlm.checkpoints.tables.rules import Axes, Rule, rename
from vlm.checkpoints.tables.table import Table

_SPARSE = ("qformer.layers.{i}.cross_attention.{rest}",)
