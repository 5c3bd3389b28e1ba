"""Answers of decoders and of encoder-decoders, found by one search: that of transformers."""

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
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
from transformers.modeling_outputs import BaseModelOutput

from vlm.errors import UserError
from vlm.language.causal_lm import batched_attention
from vlm.language.choosing import Weighed
from vlm.language.layer_inputs import Prompt, PromptCache

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Decoding:
    """How answers are searched for; the defaults are greedy.

    Attributes:
        max_new_tokens: limit on the answer.
        min_new_tokens: no end before this many, be it a token or a text.
        num_beams: width of beam search; 1: greedy or sampling.
        length_penalty: exponent on the length in a beam's score.
        temperature: above 0 samples, which goes without beams; 0 does not.
        top_p: nucleus that samples are drawn from.
        top_k: number of tokens that samples are drawn from; 0: all.
        repetition_penalty: factor against tokens that occurred.
        seed: of the samples.
        options: nothing is written: the answer to a sample with `choices` is the letter of one of them, A, B, ..., that
            is the likeliest to go on with (`vlm.language.choosing`). In the text that is weighed `{}` marks the letter,
            `" {}"` is how Qwen-VL is asked; or `{choice}` what the choice says, as InstructBLIP is asked. Of more than
            26 choices the answer is what the likeliest one says.
        candidates: nothing is written: the answer to every sample is the likeliest of these texts.
        candidates_file: where they stand: a JSON list, a JSON object whose keys they are, or one a line.
        weighed: how what is chosen from is compared: by the `mean` or the `sum` of the loss of its tokens.
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
    candidates: tuple[str, ...] = ()
    candidates_file: str | None = None
    weighed: Weighed = "mean"

    def __post_init__(self) -> None:
        if self.candidates_file is not None:
            if self.candidates:
                raise UserError("decoding: candidates and candidates_file are both given; leave one of them out")
            object.__setattr__(self, "candidates", read_candidates(self.candidates_file))
        object.__setattr__(self, "candidates", tuple(self.candidates))  # files deliver lists
        if self.weighed not in ("mean", "sum"):
            raise UserError(f"decoding: weighed must be mean or sum, found {self.weighed!r}")
        if self.candidates and self.options is not None:
            raise UserError("decoding: options and candidates both say what is chosen from; leave one of them out")
        if self.options is not None and self.options.count("{}") + self.options.count("{choice}") != 1:
            raise UserError(
                f"decoding: options must have one {{}} where the letter goes, or one {{choice}}, found {self.options!r}"
            )
        if self.temperature > 0 and self.num_beams > 1:
            raise UserError(f"decoding: temperature {self.temperature} samples, which needs num_beams: 1")

    @property
    def chooses(self) -> bool:
        """Whether answers are chosen, not written."""
        return self.options is not None or bool(self.candidates)

    def transformers_config(self, *, end_ids: Sequence[int], pad_id: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens or None,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            do_sample=False,  # `_Sampling` does it
            repetition_penalty=self.repetition_penalty,
            eos_token_id=list(end_ids),
            pad_token_id=pad_id,
        )

    def processors(self, seeds: Sequence[int], *, skip: int = 0) -> LogitsProcessorList:
        """What turns the search into sampling.

        Args:
            seeds: one per prompt.
            skip: ids at the start of a row that are not of its answer.
        """
        return LogitsProcessorList([_Sampling(self, seeds)] if self.temperature > 0 else [])


def read_candidates(path: str) -> tuple[str, ...]:
    """The texts of a file: a JSON list, the keys of a JSON object, or lines.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = json.loads(text) if text.lstrip()[:1] in ("[", "{") else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"decoding.candidates_file: {path} cannot be read ({error}); give a file of texts") from error
    texts = [text for text in found if isinstance(text, str) and text.strip()]
    if not texts or len(texts) < len(found):
        raise UserError(f"decoding.candidates_file: {path} must hold texts, at least one and none of them empty")
    return tuple(texts)


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

    def processors(self, seeds: Sequence[int], *, skip: int = 0) -> LogitsProcessorList:
        assert len(seeds) == 1, "only one answer can be followed"
        return LogitsProcessorList([*super().processors(seeds, skip=skip), _Listener(self.on_token, skip=skip)])


class _Listener(LogitsProcessor):
    def __init__(self, on_token: Callable[[list[int]], None], *, skip: int) -> None:
        self.on_token = on_token
        self.skip = skip

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.on_token(input_ids[0, self.skip :].tolist())
        return scores


class _StopAtText(StoppingCriteria):
    """Ends a row once its text holds a stop mark: templates whose mark is plain text have no token for it.

    Args:
        skip: ids at the start of a row that are not of its answer.
    """

    def __init__(self, stop: Sequence[str], decode: Decode, *, skip: int) -> None:
        self.stop = tuple(stop)
        self.decode = decode
        self.skip = skip

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        stopped = [self.holds_mark(row[self.skip :]) for row in input_ids.tolist()]
        return torch.tensor(stopped, device=input_ids.device)

    def holds_mark(self, ids: Sequence[int]) -> bool:
        text = self.decode(ids) if self.stop else ""
        return any(mark in text for mark in self.stop)

    def until_mark(self, ids: list[int]) -> list[int]:
        """The ids up to the one that completed a mark: a row that has ended is filled up while others go on."""
        return ids[: bisect_left(range(len(ids)), True, key=lambda length: self.holds_mark(ids[:length]))]


class _NoMarkYet(LogitsProcessor):
    """Keeps a stop mark that is text from being completed while an answer is too short to end.

    Tokens are tried from the likeliest on, until as many as the search may take would complete none.
    """

    def __init__(self, stop: _StopAtText, *, min_new_tokens: int, num_taken: int) -> None:
        self.stop = stop
        self.min_new_tokens = min_new_tokens
        self.num_taken = num_taken

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if input_ids.shape[1] - self.stop.skip >= self.min_new_tokens:
            return scores
        scores = scores.clone()
        for row, row_scores in zip(input_ids[:, self.stop.skip :].tolist(), scores, strict=True):
            num_left = self.num_taken
            for token in row_scores.argsort(descending=True).tolist():
                if self.stop.holds_mark([*row, token]):
                    row_scores[token] = float("-inf")
                elif (num_left := num_left - 1) == 0:
                    break
        return scores


@dataclass(frozen=True)
class DecoderPrompt:
    """What an answer of an encoder-decoder goes on from.

    Attributes:
        features: float[m, C], what the encoder made, which cross-attention looks at.
        ids: int64[n], how the decoder's text begins: its start token, and perhaps more.
    """

    features: Tensor
    ids: Tensor


@torch.no_grad()
def generate(
    language: PreTrainedModel,
    prompts: Sequence[Prompt] | Sequence[DecoderPrompt],
    *,
    decoding: Decoding,
    seeds: Sequence[int],
    end_ids: Sequence[int],
    pad_id: int,
    stop: Sequence[str] = (),
    decode: Decode = str,
    synced: bool = False,
) -> list[list[int]]:
    """New token ids after each prompt; a batch gives what its prompts give one by one.

    Args:
        language: the decoder, or an encoder-decoder whose encoder has run already; in eval mode.
        prompts: what each answer goes on from, all of one kind; what is generated is text to the layers.
        seeds: per prompt, of its samples.
        end_ids: tokens that end an answer.
        stop: text marks that end an answer, too.
        decode: token ids as text, special tokens kept; for `stop`.
        synced: keep all ranks in step until the last one has ended (sharded models need it).

    Returns:
        Per prompt its ids, the end token included if one was generated.
    """
    config = decoding.transformers_config(end_ids=end_ids, pad_id=pad_id)
    inputs, num_given = _inputs(language, prompts, config)
    processors, at_text = decoding.processors(seeds, skip=num_given), _StopAtText(stop, decode, skip=num_given)
    if stop and decoding.min_new_tokens:
        num_taken = 1 if decoding.num_beams == 1 else (1 + len(end_ids)) * decoding.num_beams
        processors.append(_NoMarkYet(at_text, min_new_tokens=decoding.min_new_tokens, num_taken=num_taken))
    with batched_attention(language):
        search: Any = language.generate
        ids = search(
            **inputs,
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([at_text] if stop else []),
            synced_gpus=synced,
        )
    return [at_text.until_mark(_until_end(row[num_given:], end_ids)) for row in ids.tolist()]


def _inputs(
    language: PreTrainedModel, prompts: Sequence[Prompt] | Sequence[DecoderPrompt], config: GenerationConfig
) -> tuple[dict[str, Any], int]:
    """Keywords of the search, texts padded on the left, and how many ids its rows begin with."""
    rows = [prompt for prompt in prompts if isinstance(prompt, Prompt)]
    texts = [prompt for prompt in prompts if isinstance(prompt, DecoderPrompt)]
    assert not (rows and texts), "prompts of two kinds"
    if rows:
        embeds, mask = _padded([prompt.embeds for prompt in rows], "left")
        cache = PromptCache(language.config, rows, num_beams=config.num_beams)
        inputs = {"inputs_embeds": embeds, "position_ids": cache.positions, "past_key_values": cache}
        return inputs | {"attention_mask": mask}, 0  # embeddings are not among the ids
    features, seen = _padded([prompt.features for prompt in texts], "right")
    ids, mask = _padded([prompt.ids for prompt in texts], "left", value=config.pad_token_id)
    config.decoder_start_token_id = max((prompt.ids for prompt in texts), key=len)[0].item()
    return {
        "encoder_outputs": BaseModelOutput(features),
        "attention_mask": seen,
        "decoder_input_ids": ids,
        "decoder_attention_mask": mask,
        "past_key_values": _TextCache(DynamicCache(), DynamicCache()),
    }, ids.shape[1]


class _TextCache(EncoderDecoderCache):
    """Keys and values of which beams exchange their own: those of the features are the same for all of a prompt's."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.self_attention_cache.reorder_cache(beam_idx)


def _padded(tensors: Sequence[Tensor], side: str, *, value: float = 0.0) -> tuple[Tensor, Tensor]:
    """The tensors as a rectangle, and int64[B, n], 1 where they stand."""
    whole = pad_sequence(list(tensors), batch_first=True, padding_side=side, padding_value=value)
    ones = [torch.ones(len(tensor), dtype=torch.int64, device=tensor.device) for tensor in tensors]
    return whole, pad_sequence(ones, batch_first=True, padding_side=side)


def _until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    end = next((at for at, token in enumerate(ids) if token in end_ids), len(ids))
    return ids[: end + 1]
