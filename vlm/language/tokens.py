"""Rows for tokens that the base weights do not know, beside the published tables instead of inside them.

So the pretrained tables keep their shape and content, and a stage may train the new rows alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm.language.surgery import Surgery, names_of


@dataclass(frozen=True)
class NewTokens(Surgery):
    """A row in the embedding table and in the vocabulary projection for every token that the tables lack.

    A new row starts as the mean of the old ones (as in LLaVA's first release). The new parameters are
    `embed_tokens.added.weight` and `lm_head.added.weight`. Where the tables have a row for every id of the tokenizer
    already, nothing happens.
    """

    @property
    def cannot_merge(self) -> str | None:
        return None

    def find_layers(self, module: nn.Module) -> list[str]:
        if _missing_rows(module) <= 0:
            return []
        language: Any = module.language
        return names_of(module, (language.get_input_embeddings(), language.get_output_embeddings()))

    def has_changed(self, module: nn.Module) -> bool:
        return _missing_rows(module) > 0

    def apply(self, module: nn.Module) -> None:
        system: Any = module
        language, rows = system.language, len(system.codec.tokenizer)
        table, head = language.get_input_embeddings(), language.get_output_embeddings()
        extra = _missing_rows(module)
        if extra <= 0:
            return
        added = AddedRows(extra, table)
        language.set_input_embeddings(ExtendedEmbedding(table, added))
        if head is not None:
            tied = head.weight is table.weight
            language.set_output_embeddings(ExtendedHead(head, added if tied else AddedRows(extra, head)))
        language.config.vocab_size = rows


def _missing_rows(system: Any) -> int:
    return len(system.codec.tokenizer) - system.language.get_input_embeddings().num_embeddings


class AddedRows(nn.Module):
    """float[rows, D] below a table.

    Args:
        rows: how many.
        table: an embedding or a linear layer without bias, whose `weight` has one row per old token.
    """

    def __init__(self, rows: int, table: nn.Module) -> None:
        super().__init__()
        old = table.get_parameter("weight")
        self.weight = nn.Parameter(torch.empty(rows, old.shape[1], dtype=old.dtype, device=old.device))
        self._table: list[nn.Module] = [table]  # in a list: its parameters are not ours

    def initialise_new(self) -> None:
        # the table above has its values: it is filled, or drawn, before what lies below it
        old = self._table[0].get_parameter("weight")
        full = old.full_tensor() if isinstance(old, DTensor) else old
        mean = full.to("cpu").mean(0, dtype=torch.float32)  # the same on every device
        nn.init.zeros_(self.weight)
        self.weight.data += mean


class ExtendedEmbedding(nn.Embedding):
    """ids int64[...] -> float[..., D]; ids from `num_embeddings` on are rows of `added`."""

    added: AddedRows

    def __init__(self, table: nn.Embedding, added: AddedRows) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, padding_idx=table.padding_idx)
        self.weight = table.weight
        self.added = added
        added._table = [self]
        self.scale = float(getattr(table, "scalar_embed_scale", 1.0))  # Gemma's table multiplies what it looks up

    def forward(self, input: Tensor) -> Tensor:
        is_new = input >= self.num_embeddings
        old = super().forward(input.masked_fill(is_new, 0))
        new = F.embedding((input - self.num_embeddings).clamp_min(0), self.added.weight)
        found = torch.where(is_new[..., None], new, old)
        # in its own dtype, as Gemma has the factor
        return found if self.scale == 1.0 else found * found.new_full((), self.scale)


class ExtendedHead(nn.Linear):
    """float[..., D] -> float[..., old + new rows] logits."""

    added: AddedRows

    def __init__(self, head: nn.Linear, added: AddedRows) -> None:
        super().__init__(head.in_features, head.out_features, bias=False)
        assert head.bias is None, "a vocabulary projection with bias has no place for the biases of new rows"
        self.weight = head.weight
        self.added = added
        if added._table == [head]:
            added._table = [self]

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([super().forward(input), F.linear(input, self.added.weight)], dim=-1)
