"""Several continuations, weighed by how likely each is."""

from collections.abc import Callable, Iterator, Sequence
from string import ascii_uppercase
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from vlm.batch import IGNORE, Row, SampleInfo, TokenSequence
from vlm.errors import SampleError
from vlm.language.causal_lm import batched_attention, label_logits
from vlm.language.layer_inputs import LayerInputs, Prompt, PromptCache, pack_context

if TYPE_CHECKING:
    from vlm.language.generation import Decoding

Weighed = Literal["mean", "sum"]
"""What of the losses of an option's tokens is compared."""
_CHUNK = 256
"""Tokens of candidates that are computed together."""


class WeighedChoices(NamedTuple):
    """What a sample is chosen from.

    Attributes:
        names: what each choice is called in an answer.
        losses: float32[choices], on the CPU; the likeliest has the lowest, of equals the first.
    """

    names: Sequence[str]
    losses: Tensor

    @property
    def likeliest(self) -> str:
        return self.names[int(self.losses.argmin())]


def choices_of(
    samples: Sequence[SampleInfo], decoding: "Decoding"
) -> tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]]:
    """Of each sample, what its choices are called and the texts that are weighed for them."""
    if decoding.options is not None:
        return options_of(samples, decoding.options)
    names = [decoding.candidates] * len(samples)
    return names, names


def options_of(samples: Sequence[SampleInfo], form: str) -> tuple[list[Sequence[str]], list[list[str]]]:
    """Of each sample, what its choices are called and the texts that are weighed for them.

    Choices are called by letters, or, if there are more of them, by what they say.

    Args:
        form: see `Decoding.options`.

    Raises:
        SampleError: a sample without choices whose texts are wanted, or with more of them than letters that are.
    """
    names: list[Sequence[str]] = []
    texts: list[list[str]] = []
    for sample in samples:
        count, by_text = len(sample.choices), "{choice}" in form
        if (by_text and not count and not sample.filler) or (not by_text and count > len(ascii_uppercase)):
            wanted = "at least 1" if by_text else f"at most {len(ascii_uppercase)}, which is how many letters there are"
            raise SampleError(
                f"has {count} 'choices' to rank; give it {wanted}", sample_id=sample.id, source=sample.source
            )
        choices = sample.choices or ("?",)  # a filler's answer is never heard
        names.append(sample.choices if count > len(ascii_uppercase) else ascii_uppercase[: len(choices)])
        put = zip(names[-1], choices, strict=True)
        texts.append([form.replace("{}", one).replace("{choice}", said) for one, said in put])
    return names, texts


def weigh_choices(
    language: PreTrainedModel,
    prompts: Sequence[Prompt],
    samples: Sequence[SampleInfo],
    decoding: "Decoding",
    *,
    encode: Callable[[Sequence[str]], list[list[int]]],
    together: bool,
) -> list[WeighedChoices]:
    """The choices of each sample behind its prompt, by `decoding.options` or `decoding.candidates`.

    Args:
        encode: token ids of texts.
        together: ranks share the network, so that all of them have to run it equally often.
    """
    names, texts = choices_of(samples, decoding)
    if decoding.options is None:
        losses = [*weigh_candidates(language, prompts, encode(decoding.candidates), by=decoding.weighed)]
    else:
        options = [encode(group) for group in texts]
        if together or max(map(len, options)) <= len(ascii_uppercase):
            losses = weigh_options(language, prompts, options, by=decoding.weighed)
        else:  # a prompt with a hundred answers is computed once
            pairs = zip(prompts, options, strict=True)
            losses = [weigh_candidates(language, [own], group, by=decoding.weighed)[0] for own, group in pairs]
    return [WeighedChoices(*pair) for pair in zip(names, losses, strict=True)]


@torch.no_grad()
def weigh_options(
    language: PreTrainedModel,
    prompts: Sequence[Prompt],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    by: Weighed = "mean",
) -> list[Tensor]:
    """float32[options], on the CPU: the loss of each option behind its prompt; the likeliest has the lowest.

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
    return [torch.stack([next(means) for _ in group]) for group in options]


@torch.no_grad()
def weigh_candidates(
    language: PreTrainedModel, prompts: Sequence[Prompt], candidates: Sequence[Sequence[int]], *, by: Weighed = "mean"
) -> Tensor:
    """float32[prompts, candidates], on the CPU: as `weigh_options`, of perhaps thousands that all prompts have.

    A prompt is computed once; candidates are laid behind it side by side, some hundred tokens at a time, and see it
    and themselves. So the cost is that of all candidates' tokens, not that of the prompt times their number, and the
    number of forwards is the same whatever the prompts are.

    Args:
        language: the decoder, in eval mode.
        prompts: what the candidates go on from.
        candidates: token ids of each, at least one of at least one token.
        by: see `weigh_options`.
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
    return torch.cat(losses, dim=1).cpu()


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
