"""One of several continuations, by how likely each is."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlm.batch import IGNORE, Row, TokenSequence
from vlm.language.causal_lm import label_logits
from vlm.language.layer_inputs import LayerInputs, Prompt, pack_context


@torch.no_grad()
def rank_options(
    language: PreTrainedModel, prompts: Sequence[Prompt], options: Sequence[Sequence[Sequence[int]]]
) -> list[int]:
    """The number of the likeliest option behind each prompt: that with the lowest mean loss over its tokens.

    As in Qwen-VL's `evaluate_multiple_choice.py`; of equals the first.

    Args:
        language: the decoder, in eval mode.
        prompts: what the options go on from.
        options: per prompt the token ids of each option, at least one of at least one token.
    """
    device, embedding = prompts[0].embeds.device, language.get_input_embeddings()
    sequences: list[TokenSequence] = []
    embeds: list[Tensor] = []
    for prompt, group in zip(prompts, options, strict=True):
        before, visual = prompt.positions.cpu(), prompt.visual.cpu().nonzero().squeeze(1)
        for ids in group:
            tokens = torch.tensor(ids)
            embeds += [prompt.embeds, embedding(tokens[:-1].to(device))]
            # what stands under the prompt is never looked at: it comes as embeddings
            targets = torch.cat([torch.full((len(before) - 1,), IGNORE), tokens])
            positions = torch.cat([before, before[-1] + torch.arange(1, len(tokens))])
            sequences.append(TokenSequence(torch.zeros_like(targets), targets, positions=positions, visual=visual))
    row = Row.pack(sequences).to(device)
    context = pack_context([prompt for prompt, group in zip(prompts, options, strict=True) for _ in group])
    logits = label_logits(language, torch.cat(embeds), row, LayerInputs.of(row, context))
    losses = -logits.float().log_softmax(-1).gather(1, row.targets[:, None]).squeeze(1).cpu()
    means = iter(part.mean() for part in losses.split([len(ids) for group in options for ids in group]))
    return [int(torch.stack([next(means) for _ in group]).argmin()) for group in options]
