"""InternLM2, which is published by itself and inside of InternLM-XComposer2, under the names of transformers' Llama.

Queries, keys and values are one tensor, group by group: the queries that share a key, the key, the value.
"""

from dataclasses import dataclass

import torch

from vlm.checkpoints.tables.rules import Part, Rule, rename
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError

_THEIRS = "model.layers.{i}."
_FEED = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@dataclass(frozen=True, kw_only=True)
class Grouped(Rule):
    """Rows of q, k and v that lie together by group, where ours has all of q, all of k and all of v.

    Attributes:
        groups: heads of k.
        per_group: heads of q that share one of k.
    """

    groups: int
    per_group: int

    def to_ours(self, parts: list[Part]) -> list[Part]:
        (rows,) = parts
        assert rows is not None
        if len(rows) % (self.groups * (self.per_group + 2)):
            raise UserError(
                f"tensor {self.theirs[0]!r} has {len(rows)} rows, which {self.groups} groups of "
                f"{self.per_group} heads, a key and a value do not share"
            )
        heads = rows.unflatten(0, (self.groups, self.per_group + 2, -1))
        found = heads.split([self.per_group, 1, 1], dim=1)
        return [part.flatten(0, 2).contiguous() for part in found]

    def from_ours(self, parts: list[Part]) -> list[Part]:
        heads = []
        for part, count in zip(parts, (self.per_group, 1, 1), strict=True):
            assert part is not None
            heads.append(part.unflatten(0, (self.groups, count, -1)))
        return [torch.cat(heads, dim=1).flatten(0, 2)]


def language_rules(*, heads: int, groups: int, ours: str = "", partial: bool = False) -> tuple[Rule, ...]:
    """Of InternLM2, by itself or in InternLM-XComposer2.

    Args:
        heads: of q.
        groups: heads of k and v.
        ours: what stands before Llama's own names.
        partial: with the tensors of partial LoRA.
    """
    layer = ours + "model.layers.{i}."
    leaves = [".weight", ".Plora_B.weight"] if partial else [".weight"]

    def fused(leaf: str) -> Rule:
        names = tuple(f"{layer}self_attn.{part}_proj{leaf}" for part in "qkv")
        theirs = (f"{_THEIRS}attention.wqkv{leaf}",)
        return Grouped(theirs=theirs, ours=names, groups=groups, per_group=heads // groups)

    linears = {"attention.wo": "self_attn.o_proj"} | {f"feed_forward.{t}": f"mlp.{o}" for t, o in _FEED.items()}
    own = [*leaves, ".Plora_A.weight"] if partial else leaves
    shared = [rename(_THEIRS + "attention.wqkv.Plora_A.weight", layer + "self_attn.q_proj.Plora_A.weight")]
    return (
        rename("model.tok_embeddings.weight", ours + "model.embed_tokens.weight"),
        *(fused(leaf) for leaf in leaves),
        *(shared if partial else ()),
        *(rename(_THEIRS + t + leaf, layer + o + leaf) for t, o in linears.items() for leaf in own),
        rename(_THEIRS + "attention_norm.weight", layer + "input_layernorm.weight"),
        rename(_THEIRS + "ffn_norm.weight", layer + "post_attention_layernorm.weight"),
        rename("model.norm.weight", ours + "model.norm.weight"),
        rename("output.weight", ours + "lm_head.weight"),
        rename(_THEIRS + "attention.rotary_emb.inv_freq", None),
    )


def internlm2_table(*, heads: int, groups: int) -> Table:
    """Names of an InternLM2 by itself."""
    return Table(layout="InternLM2", rules=language_rules(heads=heads, groups=groups))
