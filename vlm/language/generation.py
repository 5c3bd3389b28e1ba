"""Generation after mixed text and image embeddings, on transformers' own search."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlm.errors import UserError
from vlm.language.causal_lm import batched_attention


@dataclass(frozen=True)
class Decoding:
    """How answers are searched for; the defaults are greedy.

    Attributes:
        max_new_tokens: limit on the answer.
        min_new_tokens: no end before this many.
        num_beams: width of beam search; 1: greedy or sampling.
        length_penalty: exponent on the length in a beam's score.
        temperature: above 0 samples, which goes without beams; 0 does not.
        top_p: nucleus that samples are drawn from.
        top_k: number of tokens that samples are drawn from; 0: all.
        repetition_penalty: factor against tokens that occurred.
        seed: of the samples.
        options: nothing is written: the answer to a sample with `choices` is the letter of one of them, A, B, ..., that
            is the likeliest to go on with (`vlm.language.choosing`). `{}` marks the letter in the text that is weighed:
            `" {}"` is how Qwen-VL is asked.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    options: str | None = None

    def __post_init__(self) -> None:
        if self.options is not None and self.options.count("{}") != 1:
            raise UserError(f"decoding: options must have one {{}} where the letter goes, found {self.options!r}")
        if self.temperature > 0 and self.num_beams > 1:
            raise UserError(f"decoding: temperature {self.temperature} samples, which needs num_beams: 1")

    def transformers_config(self, *, eos_id: int, pad_id: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens or None,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            do_sample=False,  # `_Sampling` does it
            repetition_penalty=self.repetition_penalty,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
        )

    def processors(self, seeds: Sequence[int]) -> LogitsProcessorList:
        """What turns the search into sampling; `seeds` has one per prompt."""
        return LogitsProcessorList([_Sampling(self, seeds)] if self.temperature > 0 else [])


class _Sampling(LogitsProcessor):
    """Sampling as an argmax over noise (the Gumbel trick): each prompt draws from its own generator, on the CPU.

    So its answer depends on neither the other prompts of its batch nor the device, as one `multinomial` over the batch
    would make it.
    """

    def __init__(self, decoding: Decoding, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(decoding.temperature)]
        if decoding.top_k > 0:
            self.warpers.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            self.warpers.append(TopPLogitsWarper(decoding.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        scores = scores.float()
        for warper in self.warpers:
            scores = warper(input_ids, scores)  # type: ignore[arg-type]
        noise = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self.generators]
        return scores - torch.stack(noise).log().to(scores.device)


@dataclass(frozen=True)
class StreamingDecoding(Decoding):
    """Decoding of one answer that is followed while it grows.

    Attributes:
        on_token: called with the ids so far before each new one; the last one is in the finished answer alone.
    """

    on_token: Callable[[list[int]], None] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_beams > 1:
            raise UserError("an answer can be followed while it grows only with num_beams: 1")

    def processors(self, seeds: Sequence[int]) -> LogitsProcessorList:
        assert len(seeds) == 1, "only one answer can be followed"
        return LogitsProcessorList([*super().processors(seeds), _Listener(self.on_token)])


class _Listener(LogitsProcessor):
    def __init__(self, on_token: Callable[[list[int]], None]) -> None:
        self.on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.on_token(input_ids[0].tolist())
        return scores


class _StopAtText(StoppingCriteria):
    """Ends a row once its text holds a stop mark: templates whose mark is plain text have no token for it."""

    def __init__(self, stop: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self.stop = tuple(stop)
        self.decode = decode

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        texts = [self.decode(row) for row in input_ids.tolist()]
        return torch.tensor([any(mark in text for mark in self.stop) for text in texts], device=input_ids.device)


@torch.no_grad()
def generate(
    language: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    decoding: Decoding,
    seeds: Sequence[int],
    eos_id: int,
    pad_id: int,
    stop: Sequence[str] = (),
    decode: Callable[[Sequence[int]], str] | None = None,
    synced: bool = False,
) -> list[list[int]]:
    """New token ids after each prompt; a batch gives what its prompts give one by one.

    Args:
        language: the decoder, in eval mode.
        prompts: per prompt float[n, D] embeddings, image features in place.
        seeds: per prompt, of its samples.
        stop: text marks that end an answer, besides the end token; needs `decode`.
        decode: token ids as text, special tokens kept.
        synced: keep all ranks in step until the last one has ended (sharded models need it).

    Returns:
        Per prompt its ids, the end token included if one was generated.
    """
    lengths = [len(prompt) for prompt in prompts]
    embeds = pad_sequence(list(prompts), batch_first=True, padding_side="left")
    mask = torch.zeros(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
    for row, length in zip(mask, lengths, strict=True):
        row[len(row) - length :] = 1
    criteria = StoppingCriteriaList([_StopAtText(stop, decode)] if stop and decode else [])
    with batched_attention(language):
        search: Any = language.generate
        ids = search(
            inputs_embeds=embeds,
            attention_mask=mask,
            generation_config=decoding.transformers_config(eos_id=eos_id, pad_id=pad_id),
            logits_processor=decoding.processors(seeds),
            stopping_criteria=criteria,
            synced_gpus=synced,
        )
    return [_until_end(row, eos_id) for row in ids.tolist()]


def _until_end(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids
