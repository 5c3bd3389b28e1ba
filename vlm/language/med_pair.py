"""BLIP's text encoder for two images at once (NLVR2)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.bert import Attention, BertSize, Embeddings, FeedForward, Lookup, draw_bert, key_mask
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.tables.base import BaseWeights
from vlm.checkpoints.tables.bert import read_bert


@dataclass(frozen=True)
class PairMed(BertSize):
    """Description of a text encoder that looks at two images (BLIP, Li et al., 2022, section 5.4).

    Attributes:
        merge_from: layers below it take the mean of what the two images give; from it on they are joined by a linear
            layer.
        weights: folder, file or hub id of a BERT to start from; None: new weights.
    """

    merge_from: int = 6
    weights: str | None = None

    def build(self, context_dim: int) -> "PairMedModule":
        """The network over image features of `context_dim` channels; call it under `empty_weights`."""
        return PairMedModule(self, context_dim)

    def read_base(self, network: nn.Module, files: WeightFiles) -> BaseWeights:
        """A BERT's tensors; it has nothing that looks at images."""
        return read_bert(files, fresh=("layers.*.cross_attention.*",))

    def initialise(self, network: nn.Module, module: nn.Module) -> None:
        """Draws the new tensors that one submodule of a built network holds itself."""
        draw_bert(module)

    @property
    def copies(self) -> dict[str, str]:
        """{prefix: prefix of what it starts as, where no weights have it}: a pre-trained model looks at one image."""
        layers = [f"layers.{index}.cross_attention" for index in range(self.num_layers)]
        return {f"{layer}.second": layer for layer in layers}


class PairAttention(Attention):
    """Cross-attention to each of two images; its own layers are those of the first, so that a model of one fits.

    Args:
        merge: join what both give by a linear layer, not by their mean.
    """

    def __init__(self, size: BertSize, *, context_dim: int, merge: bool) -> None:
        super().__init__(size, context_dim=context_dim)
        self.second = Lookup(size, context_dim=context_dim)
        self.merge = nn.Linear(2 * size.dim, size.dim) if merge else None

    def look(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """float[S, n, D] texts and float[S, m, C] features of each image -> float[S, n, D]."""
        found = [self.look_up(x, context=first)[0], self.second.look_up(x, context=second)[0]]
        joined = (found[0] + found[1]) / 2 if self.merge is None else self.merge(torch.cat(found, dim=-1))
        return self.added(x, joined)


class PairMedLayer(nn.Module):
    """x -> self-attention -> cross-attention to two images -> feed-forward network."""

    def __init__(self, description: PairMed, *, context_dim: int, merge: bool) -> None:
        super().__init__()
        self.attention = Attention(description)
        self.cross_attention = PairAttention(description, context_dim=context_dim, merge=merge)
        self.mlp = FeedForward(description)

    def forward(self, x: Tensor, mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """float[S, n, D] -> float[S, n, D]; `mask` as in `Attention`, `first` and `second` float[S, m, C]."""
        x, _ = self.attention(x, context=x, mask=mask)
        return self.mlp(self.cross_attention.look(x, first, second))


class PairMedModule(nn.Module):
    """words -> layers, each looking at the first and the second image of a text -> hidden states."""

    def __init__(self, description: PairMed, context_dim: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(description)
        self.layers = nn.ModuleList(
            PairMedLayer(description, context_dim=context_dim, merge=index >= description.merge_from)
            for index in range(description.num_layers)
        )

    def read(self, ids: Tensor, mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """float[S, n, D] hidden states.

        Args:
            ids: int64[S, n], padded; [ENC] first.
            mask: bool[S, n], True at real tokens.
            first, second: float[S, m, C] features of each image.
        """
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x, key_mask(mask), first, second)
        return x
