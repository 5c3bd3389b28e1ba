"""One of many texts behind features, by how likely each is."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.batch import Row
from vlm.language.med import MedModule


@torch.no_grad()
def rank_texts(
    network: MedModule,
    features: Tensor,
    mask: Tensor,
    texts: Row,
    *,
    num_ranked: int,
    label_smoothing: float,
    pad_id: int,
) -> list[int]:
    """The number of the text that a decoder would sooner write than any other, for each sample (BLIP's ranking).

    The texts whose first token is the likeliest are scored whole: by the sum over tokens of the loss that the decoder
    was trained with. Of texts with equal first tokens the first ones are taken.

    Args:
        features: float[B, m, C], what the decoder looks at.
        mask: bool[B, m].
        texts: the candidates, every token but the first a target.
        num_ranked: how many are scored whole.
        label_smoothing: of the loss.
        pad_id: of the tokenizer.
    """
    device = features.device
    ids, real = texts.padded(pad_id)
    targets = torch.full(ids.shape, pad_id).view(-1).index_copy(0, texts.padded_index(), texts.targets).view(ids.shape)
    ids, real, targets = ids.to(device), real.to(device), targets.to(device)
    start = network.logits(network.write(ids[:1, :1].expand(len(features), 1), features, mask)[:, 0])
    likely = start.float().softmax(-1)[:, targets[:, 0]]  # [B, texts]
    chosen = likely.sort(dim=1, descending=True, stable=True).indices[:, :num_ranked]
    best = []
    for own, own_mask, numbers in zip(features, mask, chosen, strict=True):  # at a time, as many as fit
        seen = own.expand(len(numbers), -1, -1), own_mask.expand(len(numbers), -1)
        logits = network.logits(network.write(ids[numbers], *seen))
        loss = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets[numbers].flatten(),
            reduction="none",
            label_smoothing=label_smoothing,
        )
        sums = (loss.view(len(numbers), -1) * real[numbers]).sum(1)
        best.append(numbers[sums.argmin()])
    return torch.stack(best).tolist()
