"""One of several continuations, by how likely each is."""

from collections.abc import Iterator, Sequence
from string import ascii_uppercase
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from vlm.batch import IGNORE, Row, SampleInfo, TokenSequence
from vlm.errors import SampleError
from vlm.language.causal_lm import batched_attention, label_logits
from vlm.language.layer_inputs import LayerInputs, Prompt, PromptCache, pack_context

Weighed = Literal["mean", "sum"]
"""What of the losses of an option's tokens is compared."""
_CHUNK = 256
"""Tokens of candidates that are computed together."""


def options_of(samples: Sequence[SampleInfo], form: str) -> tuple[list[str], list[list[str]]]:
    """Of each sample, the letters of its choices and the texts that are weighed for them.

    Args:
        form: see `Decoding.options`.

    Raises:
        SampleError: a sample without choices whose texts are wanted, or with more of them than letters.
    """
    letters, texts = [], []
    for sample in samples:
        wanted = "{choice}" in form and not sample.filler
        if (wanted and not sample.choices) or len(sample.choices) > len(ascii_uppercase):
            raise SampleError(
                f"has {len(sample.choices)} 'choices' to rank; give it 1 to {len(ascii_uppercase)}",
                sample_id=sample.id,
                source=sample.source,
            )
        letters.append(ascii_uppercase[: max(1, len(sample.choices))])
        choices = sample.choices or ("?",)  # a filler's answer is never heard
        texts.append(
            [form.replace("{}", one).replace("{choice}", said) for one, said in zip(letters[-1], choices, strict=False)]
        )
    return letters, texts


@torch.no_grad()
def rank_options(
    language: PreTrainedModel,
    prompts: Sequence[Prompt],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    by: Weighed = "mean",
) -> list[int]:
    """The number of the likeliest option behind each prompt: that with the lowest loss; of equals the first.

    Args:
        language: the decoder, in eval mode.
        prompts: what the options go on from.
        options: per prompt the token ids of each option, at least one of at least one token.
        by: the `mean` of the loss over an option's tokens, as in Qwen-VL's `evaluate_multiple_choice.py`, or the `sum`,
            as in InstructBLIP's `predict_class`.
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
    means = iter(
        part.mean() if by == "mean" else part.sum()
        for part in losses.split([len(ids) for group in options for ids in group])
    )
    return [int(torch.stack([next(means) for _ in group]).argmin()) for group in options]


@torch.no_grad()
def rank_candidates(
    language: PreTrainedModel, prompts: Sequence[Prompt], candidates: Sequence[Sequence[int]], *, by: Weighed = "mean"
) -> list[int]:
    """The number of the likeliest candidate behind each prompt, where all prompts have the same, perhaps thousands.

    A prompt is computed once; candidates are laid behind it side by side, some hundred tokens at a time, and see it
    and themselves. So the cost is that of all candidates' tokens, not that of the prompt times their number, and the
    number of forwards is the same whatever the prompts are.

    Args:
        language: the decoder, in eval mode.
        prompts: what the candidates go on from.
        candidates: token ids of each, at least one of at least one token.
        by: see `rank_options`.
    """
    device, lengths = prompts[0].embeds.device, torch.tensor([len(prompt.embeds) for prompt in prompts])
    embeds = pad_sequence([prompt.embeds for prompt in prompts], batch_first=True, padding_side="left")
    there = (torch.arange(embeds.shape[1]) >= embeds.shape[1] - lengths[:, None]).to(device)
    cache = PromptCache(language.config, prompts)
    with batched_attention(language):
        first = language(
            inputs_embeds=embeds,
            attention_mask=there.long(),
            position_ids=cache.positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        first_scores = first.float().log_softmax(-1)
        losses = []
        for chunk in _chunks(candidates):
            losses.append(_losses(language, cache, there, first_scores, chunk, by=by))
            if added := cache.get_seq_length() - embeds.shape[1]:
                cache.crop(-added)
    return torch.cat(losses, dim=1).argmin(1).tolist()


def _losses(
    language: PreTrainedModel,
    cache: PromptCache,
    there: Tensor,
    first_scores: Tensor,
    candidates: Sequence[Sequence[int]],
    *,
    by: Weighed,
) -> Tensor:
    """float32[B, candidates] behind the prompts that a cache holds.

    Args:
        there: bool[B, T], the tokens of the prompts.
        first_scores: float32[B, vocabulary], log-probabilities of what follows each prompt.
    """
    device = there.device
    heads = torch.tensor([ids[0] for ids in candidates], device=device)
    sums = -first_scores[:, heads]
    ids = torch.tensor([token for found in candidates for token in found[:-1]], device=device)
    if len(ids):
        counts = torch.tensor([len(found) - 1 for found in candidates])
        owner = torch.repeat_interleave(torch.arange(len(candidates)), counts).to(device)
        place = torch.cat([torch.arange(count) for count in counts.tolist()]).to(device)
        own = (owner[:, None] == owner) & (place[:, None] >= place)
        seen = torch.cat([there[:, None].expand(-1, len(ids), -1), own.expand(len(there), -1, -1)], dim=2)
        embeds = language.get_input_embeddings()(ids).expand(len(there), -1, -1)
        blank = torch.full((), torch.finfo(embeds.dtype).min, device=device, dtype=embeds.dtype)
        logits = language(
            inputs_embeds=embeds,
            attention_mask=torch.where(seen, torch.zeros_like(blank), blank)[:, None],
            position_ids=cache.positions[:, -1:] + 1 + place,
            past_key_values=cache,
        ).logits
        targets = torch.tensor([token for found in candidates for token in found[1:]], device=device)
        found = -logits.float().log_softmax(-1)[:, torch.arange(len(ids), device=device), targets]
        sums = sums.index_add(1, owner, found)
    return sums if by == "sum" else sums / torch.tensor([len(found) for found in candidates], device=device)


def _chunks(candidates: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Candidates in their order, of at most `_CHUNK` tokens together, at least one at a time."""
    chunk: list[Sequence[int]] = []
    size = 0
    for ids in candidates:
        if chunk and size + len(ids) > _CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(ids)
        size += len(ids)
    yield chunk
