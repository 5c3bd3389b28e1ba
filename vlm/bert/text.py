"""What stands below and above the layers of BERT: the embeddings and the head that predicts tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.batch import Row
from vlm.bert.layer import BertSize
from vlm.functional import projected_loss

STD = 0.02
"""Of everything new in a BERT."""


class Embeddings(nn.Module):
    """Words and learned positions, behind queries that have neither, normalised together.

    Args:
        text: False: there are no words, queries alone are normalised.
    """

    def __init__(self, size: BertSize, *, text: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(size.vocab_size, size.dim) if text else None
        self.positions = nn.Embedding(size.max_positions, size.dim) if text else None
        self.norm = nn.LayerNorm(size.dim, eps=size.norm_eps)
        self.dropout = size.dropout

    def forward(
        self, ids: Tensor | None = None, *, queries: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """float[S, Q + n, D]: queries, then text; one of both may be None.

        Args:
            ids: int64[S, n].
            queries: float[S, Q, D].
            positions: int64[n] or int64[S, n]; None: from 0, wherever queries stand.
        """
        parts = [] if queries is None else [queries]
        if ids is not None:
            assert self.words is not None
            assert self.positions is not None
            if positions is None:
                positions = torch.arange(ids.shape[1], device=ids.device)
            parts.append(self.words(ids) + self.positions(positions))
        return F.dropout(self.norm(torch.cat(parts, dim=1)), self.dropout, self.training)

    def adopt(self, name: str, value: Tensor) -> tuple[Tensor, str] | None:
        """Words of a smaller vocabulary with rows for the tokens that were added to it."""
        if name != "words.weight" or self.words is None or len(value) >= self.words.num_embeddings:
            return None
        drawn = torch.empty(self.words.num_embeddings - len(value), value.shape[1])
        drawn.normal_(std=STD, generator=torch.Generator().manual_seed(0))
        return torch.cat([value, drawn.to(value.dtype)]), "rows of added tokens drawn"


class LMHead(nn.Module):
    """hidden -> linear -> GELU -> norm -> scores of all words, by their own embeddings."""

    def __init__(self, size: BertSize) -> None:
        super().__init__()
        self.dense = nn.Linear(size.dim, size.dim)
        self.norm = nn.LayerNorm(size.dim, eps=size.norm_eps)
        self.bias = nn.Parameter(torch.empty(size.vocab_size))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """float[..., D] hidden states and float[vocabulary, D] embeddings -> float[..., vocabulary]."""
        return F.linear(self.norm(F.gelu(self.dense(x))), words, self.bias)

    def adopt(self, name: str, value: Tensor) -> tuple[Tensor, str] | None:
        """The bias of a smaller vocabulary, 0 for the tokens that were added to it."""
        if name != "bias" or len(value) >= len(self.bias):
            return None
        return F.pad(value, (0, len(self.bias) - len(value))), "0 for added tokens"


def written_loss(network: Any, hidden: Tensor, row: Row, *, label_smoothing: float) -> Tensor:
    """float32[]: the loss of texts that a network with an `LMHead` writes.

    Args:
        network: its `logits` are the scores of words.
        hidden: float[L, D] states at the label positions.
        row: the texts.
    """
    return projected_loss(
        network.logits,
        hidden,
        row.targets,
        row.weights,
        vocabulary=network.embeddings.words.num_embeddings,
        label_smoothing=label_smoothing,
    )


def draw_bert(module: nn.Module) -> None:
    """Draws the new tensors that one submodule of a BERT holds itself."""
    if isinstance(module, nn.LayerNorm):
        module.reset_parameters()
        return
    for name, parameter in module.named_parameters(recurse=False):
        if name == "bias":
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=STD)
