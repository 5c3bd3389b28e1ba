"""Mixtral's experts: one linear layer each in published files, one tensor for all in transformers 5."""

from vlm.checkpoints.tables.rules import Rule, Stacked, rename
from vlm.checkpoints.tables.table import Table


def expert_rules(*, theirs: str, ours: str, num_experts: int) -> tuple[Rule, ...]:
    """Rules of the sparse layers.

    Args:
        theirs: prefix before `layers`, with its dot.
        ours: the same.
        num_experts: in each layer.
    """
    expert, layer = theirs + "layers.{i}.block_sparse_moe.experts.", ours + "layers.{i}.mlp."
    return (
        Stacked(
            theirs=tuple(f"{expert}{number}.{name}.weight" for number in range(num_experts) for name in ("w1", "w3")),
            ours=(layer + "experts.gate_up_proj",),
            count=num_experts,
        ),
        Stacked(
            theirs=tuple(f"{expert}{number}.w2.weight" for number in range(num_experts)),
            ours=(layer + "experts.down_proj",),
            count=num_experts,
        ),
        rename(theirs + "layers.{i}.block_sparse_moe.gate.weight", layer + "gate.weight"),
    )


def mixtral_table(*, num_experts: int) -> Table:
    """A language model of its own, in its published files."""
    return Table(
        layout="Hugging Face Mixtral",
        rules=(
            *expert_rules(theirs="model.", ours="model.", num_experts=num_experts),
            rename("{rest}", "{rest}"),
        ),
    )
