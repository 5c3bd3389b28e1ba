"""One of several continuations, by how likely each is."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlm.batch import IGNORE, Row, TokenSequence
from vlm.language.causal_lm import label_logits


@torch.no_grad()
def rank_options(
    language: PreTrainedModel, prompts: Sequence[Tensor], options: Sequence[Sequence[Sequence[int]]]
) -> list[int]:
    """The number of the likeliest option behind each prompt: that with the lowest mean loss over its tokens.

    As in Qwen-VL's `evaluate_multiple_choice.py`; of equals the first.

    Args:
        language: the decoder, in eval mode.
        prompts: per prompt float[n, D] embeddings, image features in place.
        options: per prompt the token ids of each option, at least one of at least one token.
    """
    device, embedding = prompts[0].device, language.get_input_embeddings()
    sequences: list[TokenSequence] = []
    embeds: list[Tensor] = []
    for prompt, group in zip(prompts, options, strict=True):
        for ids in group:
            tokens = torch.tensor(ids)
            embeds += [prompt, embedding(tokens[:-1].to(device))]
            # what stands under the prompt is never looked at: it comes as embeddings
            targets = torch.cat([torch.full((len(prompt) - 1,), IGNORE), tokens])
            sequences.append(TokenSequence(torch.zeros_like(targets), targets))
    row = Row.pack(sequences).to(device)
    logits = label_logits(language, torch.cat(embeds), row)
    losses = -logits.float().log_softmax(-1).gather(1, row.targets[:, None]).squeeze(1).cpu()
    means = iter(part.mean() for part in losses.split([len(ids) for group in options for ids in group]))
    return [int(torch.stack([next(means) for _ in group]).argmin()) for group in options]
