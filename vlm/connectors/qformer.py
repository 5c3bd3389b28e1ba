"""The querying transformer: a BERT in which learned queries look at an image, and text at the queries."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from vlm.batch import Row
from vlm.bert import (
    BertLayer,
    BertSize,
    Embeddings,
    FeedForward,
    KeysValues,
    LMHead,
    causal_mask,
    draw_bert,
    key_mask,
    written_loss,
)
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.tables.base import BaseWeights
from vlm.checkpoints.tables.bert import read_bert, read_qformer


@dataclass(frozen=True)
class QFormer(BertSize):
    """Description of a Q-Former (BLIP-2, Li et al., 2023).

    Attributes:
        num_queries: tokens that an image becomes.
        cross_attention_every: every how many layers queries look at the image, from the first one on.
        text: it has words and feed-forward networks for them beside those of the queries (BLIP-2's first stage,
            InstructBLIP).
        head: it predicts words (BLIP-2's first stage); needs `text`.
        weights: folder, file or hub id of a BERT to start from; None: new weights.
    """

    num_queries: int = 32
    cross_attention_every: int = 2
    text: bool = False
    head: bool = False
    weights: str | None = None

    def build(self, in_dim: int) -> "QFormerModule":
        """The network over features of `in_dim` channels; call it under `empty_weights`."""
        return QFormerModule(self, in_dim)

    def read_base(self, network: nn.Module, files: WeightFiles) -> BaseWeights:
        """A BERT's tensors, of which both kinds of feed-forward networks start as its one; or a Q-Former of LAVIS'."""
        if "query_tokens" in files.keys():  # noqa: SIM118
            return read_qformer(files, text=self.text, head=self.head)
        mlps = ("mlp", "query_mlp") if self.text else ("query_mlp",)
        fresh = ("queries", "feature_norm", "layers.*.cross_attention.*")
        return read_bert(files, mlps=mlps, text=self.text, head=self.head, fresh=fresh)

    def initialise(self, network: nn.Module, module: nn.Module) -> None:
        """Draws the new tensors that one submodule of a built network holds itself."""
        draw_bert(module)


class QueryPass(NamedTuple):
    """What became of the queries of V images.

    Attributes:
        hidden: float[V, Q, D].
        past: per layer the keys and values that text behind them looks at.
    """

    hidden: Tensor
    past: tuple[KeysValues, ...]


class QFormerLayer(BertLayer):
    """[queries; text] -> self-attention -> cross-attention of the queries -> a feed-forward network for each kind."""

    def __init__(self, size: QFormer, *, context_dim: int | None) -> None:
        super().__init__(size, context_dim=context_dim)
        if not size.text:
            del self.mlp
        self.query_mlp = FeedForward(size)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        num_queries: int,
        mask: Tensor | None = None,
        is_causal: bool = False,
        past: KeysValues | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """float[S, Q + n, D], the first `num_queries` of them queries, and keys and values of the self-attention."""
        x, own = self.attention(x, context=x, past=past, mask=mask, is_causal=is_causal)
        queries, text = x[:, :num_queries], x[:, num_queries:]
        parts = []
        if num_queries:
            if self.cross_attention is not None:
                queries, _ = self.cross_attention(queries, context=context)
            parts.append(self.query_mlp(queries))
        if text.shape[1]:
            parts.append(self.mlp(text))
        return torch.cat(parts, dim=1), own


class QFormerModule(nn.Module):
    """features float[V, P, in_dim] -> float[V, Q, D].

    ::

        features -> feature_norm ------------+  (cross-attention, every second layer)
                                             v
        queries [; text] -> embeddings -> layers -> what the queries found [; text]

    The three masks of BLIP-2's first stage are three ways to call it: `look` and `read` see their own kind alone
    (uni-modal), `match` lets both see each other (bidirectional), and `write` lets a text see the queries and what
    stands before, while the queries never see it (multimodal causal). InstructBLIP's queries see the instruction:
    `network(features, ids, mask)`.
    """

    def __init__(self, description: QFormer, in_dim: int) -> None:
        super().__init__()
        every = description.cross_attention_every
        self.feature_norm = nn.LayerNorm(in_dim)  # eps 1e-5 as published, not BERT's
        self.queries = nn.Parameter(torch.empty(1, description.num_queries, description.dim))
        self.embeddings = Embeddings(description, text=description.text)
        self.layers = nn.ModuleList(
            QFormerLayer(description, context_dim=None if index % every else in_dim)
            for index in range(description.num_layers)
        )
        if description.head:
            self.head = LMHead(description)

    def forward(self, features: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """float[V, Q, D]: what the queries found, with an instruction for each image or without.

        Args:
            features: float[V, P, in_dim].
            ids: int64[V, n], padded.
            mask: bool[V, n], True at real tokens.
        """
        if ids is None:
            return self.look(features).hidden
        assert mask is not None
        return self.match(features, ids, mask)[:, : self.queries.shape[1]]

    def look(self, features: Tensor) -> QueryPass:
        """The queries alone."""
        x = self.embeddings(queries=self.queries.expand(len(features), -1, -1))
        x, past = self._layers(x, context=self.feature_norm(features), num_queries=x.shape[1])
        return QueryPass(x, past)

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """float[S, n, D] of texts alone, every token seeing all of its text; the first one is [CLS]."""
        x, _ = self._layers(self.embeddings(ids), mask=key_mask(mask))
        return x

    def match(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """float[V, Q + n, D] of queries and one text for each image, all seeing each other."""
        queries = self.queries.expand(len(features), -1, -1)
        seen = torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1)
        x, _ = self._layers(
            self.embeddings(ids, queries=queries),
            context=self.feature_norm(features),
            num_queries=queries.shape[1],
            mask=key_mask(seen),
        )
        return x

    def write(self, ids: Tensor, seen: QueryPass) -> Tensor:
        """float[V, n, D] of texts, the first token [DEC], each token seeing the queries and what stands before it.

        Args:
            ids: int64[V, n]; tokens behind the end of a text are looked at by none of it, and need no mask.
            seen: `look` of the images.
        """
        num_queries = self.queries.shape[1]
        mask = causal_mask(ids.shape[1], num_queries + ids.shape[1], ids.device)
        x, _ = self._layers(self.embeddings(ids), mask=mask, past=seen.past)
        return x

    def step(
        self, ids: Tensor, mask: Tensor, features: Tensor, features_mask: Tensor | None, cache: EncoderDecoderCache
    ) -> Tensor:
        """float[S, vocabulary] of the token behind the last one; `write`, a few tokens at a time.

        Args:
            ids: int64[S, n], the tokens since the last step.
            mask: bool[S, past + n], True at real tokens; texts stand padded on the left.
            features: float[S, P, in_dim], all of them real.
            features_mask: not looked at.
            cache: of the tokens before, and of the queries once a step has let them look; it is extended.
        """
        num_past, num_tokens, num_queries = cache.get_seq_length(), mask.shape[1], self.queries.shape[1]
        own, seen = cache.self_attention_cache, cache.cross_attention_cache
        if not num_past:
            for index, found in enumerate(self.look(features).past):
                seen.update(*found, index)
        visible = causal_mask(ids.shape[1], num_tokens, ids.device) & key_mask(mask)  # [S, 1, n, past + n]
        # a padded place sees itself: attention to nothing is not a number
        visible = visible | torch.eye(num_tokens, dtype=torch.bool, device=ids.device)[num_past:]
        visible = torch.cat([visible.new_ones(*visible.shape[:3], num_queries), visible], dim=3)
        x = self.embeddings(ids, positions=(mask.cumsum(1) - 1).clamp(min=0)[:, num_past:])
        for index, layer in enumerate(self.layers):
            stored: list[Any] = [part.layers[index] for part in ((seen, own) if num_past else (seen,))]
            past = tuple(torch.cat([getattr(part, kind) for part in stored], dim=2) for kind in ("keys", "values"))
            x, (keys, values) = layer(x, num_queries=0, mask=visible, past=past)
            own.update(keys[:, :, num_queries + num_past :], values[:, :, num_queries + num_past :], index)
        return self.logits(x[:, -1])

    def logits(self, hidden: Tensor) -> Tensor:
        """float[..., D] -> float[..., vocabulary]."""
        assert self.embeddings.words is not None
        return self.head(hidden, self.embeddings.words.weight)

    def label_loss(self, hidden: Tensor, row: Row, *, label_smoothing: float) -> Tensor:
        """float32[]: the loss of a row's labels, of float[L, D] hidden states at their positions."""
        return written_loss(self, hidden, row, label_smoothing=label_smoothing)

    def _layers(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        num_queries: int = 0,
        mask: Tensor | None = None,
        past: tuple[KeysValues, ...] | None = None,
    ) -> tuple[Tensor, tuple[KeysValues, ...]]:
        made = []
        for index, layer in enumerate(self.layers):
            behind = None if past is None else past[index]
            x, own = layer(x, num_queries=num_queries, mask=mask, past=behind, context=context)
            made.append(own)
        return x, tuple(made)
