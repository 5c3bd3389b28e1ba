"""The layer of BERT (Devlin et al., 2019) with the slots that BLIP's text model and the Q-Former need.

Text of at most 128 tokens stands padded, as rectangles: S sequences of n tokens. Masks say what may be looked at.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one attention: each float[S, heads, m, head_dim]."""


@dataclass(frozen=True)
class BertSize:
    """Dimensions of a BERT; those of BERT-base unless said otherwise.

    Attributes:
        dim: width D.
        num_layers: layers.
        num_heads: of each attention.
        mlp_dim: width inside the feed-forward networks.
        vocab_size: rows of the word embeddings, added tokens included.
        max_positions: longest text.
        dropout: of embeddings, attention weights and what each sublayer adds.
        norm_eps: of every LayerNorm.
        checkpointing: recompute each layer's activations in the backward pass, also where the layers are frozen; n:
            those of every n-th layer.
    """

    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    vocab_size: int = 30522
    max_positions: int = 512
    dropout: float = 0.1
    norm_eps: float = 1e-12
    checkpointing: bool | int = False


class Lookup(nn.Module):
    """Attention without what follows it: what queries find, through a linear layer.

    Args:
        context_dim: width C of what keys and values come from; None: D (self-attention).
    """

    def __init__(self, size: BertSize, *, context_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = size.num_heads
        self.dropout = size.dropout
        self.query = nn.Linear(size.dim, size.dim)
        self.key = nn.Linear(context_dim or size.dim, size.dim)
        self.value = nn.Linear(context_dim or size.dim, size.dim)
        self.dense = nn.Linear(size.dim, size.dim)

    def look_up(
        self,
        x: Tensor,
        *,
        context: Tensor | None,
        past: KeysValues | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, KeysValues]:
        """What `x` finds in `past` and `context`, one of which may be None.

        Args:
            x: float[S, n, D].
            context: float[S, m, C].
            past: keys and values that stand before those of `context`.
            mask: bool, broadcast to [S, heads, n, past + m]; True where a query may look.
            is_causal: queries look at no later key; without `past` and `mask` only.

        Returns:
            float[S, n, D], and all keys and values, `past` included.
        """
        query = self._by_head(self.query(x))
        keys_values = past
        if context is not None:
            keys_values = (self._by_head(self.key(context)), self._by_head(self.value(context)))
            if past is not None:
                keys, values = (torch.cat(pair, dim=2) for pair in zip(past, keys_values, strict=True))
                keys_values = keys, values
        assert keys_values is not None
        dropout = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(
            query, *keys_values, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
        )
        return self.dense(found.transpose(1, 2).flatten(2)), keys_values

    def _by_head(self, x: Tensor) -> Tensor:
        """float[S, n, D] -> float[S, heads, n, head_dim]."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class Attention(Lookup):
    """Attention, its output added to its input and normalised.

    Args:
        context_dim: width C of what keys and values come from; None: D (self-attention).
    """

    def __init__(self, size: BertSize, *, context_dim: int | None = None) -> None:
        super().__init__(size, context_dim=context_dim)
        self.norm = nn.LayerNorm(size.dim, eps=size.norm_eps)

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None,
        past: KeysValues | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, KeysValues]:
        """`look_up`, added and normalised: float[S, n, D], and all keys and values."""
        found, keys_values = self.look_up(x, context=context, past=past, mask=mask, is_causal=is_causal)
        return self.added(x, found), keys_values

    def added(self, x: Tensor, found: Tensor) -> Tensor:
        """float[S, n, D]: what was found, added to what looked for it, normalised."""
        return self.norm(x + F.dropout(found, self.dropout, self.training))


class FeedForward(nn.Module):
    """Two linear layers with exact GELU between them, added to their input and normalised."""

    def __init__(self, size: BertSize) -> None:
        super().__init__()
        self.dropout = size.dropout
        self.fc1 = nn.Linear(size.dim, size.mlp_dim)
        self.fc2 = nn.Linear(size.mlp_dim, size.dim)
        self.norm = nn.LayerNorm(size.dim, eps=size.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """float[S, n, D] -> float[S, n, D]."""
        return self.norm(x + F.dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training))


class BertLayer(nn.Module):
    """x -> self-attention -> [cross-attention] -> feed-forward network.

    Args:
        context_dim: width of what cross-attention looks at; None: the layer has none.
    """

    def __init__(self, size: BertSize, *, context_dim: int | None = None) -> None:
        super().__init__()
        self.attention = Attention(size)
        self.cross_attention = None if context_dim is None else Attention(size, context_dim=context_dim)
        self.mlp = FeedForward(size)

    def forward(
        self,
        x: Tensor,
        *,
        attention: str = "attention",
        mask: Tensor | None = None,
        is_causal: bool = False,
        past: KeysValues | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        past_context: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues, KeysValues | None]:
        """One layer.

        Args:
            x: float[S, n, D].
            attention: name of the self-attention, where a layer has several.
            mask: of the self-attention, as `is_causal` and `past` are; see `Attention`.
            context: float[S, m, C] for the cross-attention, which is left out without it and `past_context`.
            context_mask: of the cross-attention.
            past_context: its keys and values, where an earlier call made them.

        Returns:
            float[S, n, D]; keys and values of the self-attention; those of the cross-attention if it ran.
        """
        x, own = self.get_submodule(attention)(x, context=x, past=past, mask=mask, is_causal=is_causal)
        seen = None
        if context is not None or past_context is not None:
            assert self.cross_attention is not None
            x, seen = self.cross_attention(x, context=context, past=past_context, mask=context_mask)
        return self.mlp(x), own, seen


def key_mask(mask: Tensor) -> Tensor:
    """bool[S, m] of real tokens -> bool[S, 1, 1, m] for attention that may look at all of them."""
    return mask.bool()[:, None, None]


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """bool[n, m] for attention in which the last query looks at all keys, the one before it at all but the last."""
    everything = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return everything.tril(num_keys - num_queries)
