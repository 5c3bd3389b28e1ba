"""BLIP's mixture of encoder and decoder: one BERT that reads a text, reads it with an image, and writes one."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import BertConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from vlm.batch import Row
from vlm.bert import (
    Attention,
    BertLayer,
    BertSize,
    Embeddings,
    LMHead,
    causal_mask,
    draw_bert,
    key_mask,
    written_loss,
)
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.tables.base import BaseWeights
from vlm.checkpoints.tables.bert import read_bert
from vlm.errors import UserError


@dataclass(frozen=True)
class Med(BertSize):
    """Description of a mixture of encoder and decoder (BLIP, Li et al., 2022).

    Attributes:
        encoder: it reads (retrieval, matching, the questions of VQA).
        decoder: it writes (captions, the answers of VQA). Reading and writing differ in their self-attention alone.
        weights: folder, file or hub id of a BERT to start from; None: new weights.
    """

    encoder: bool = True
    decoder: bool = True
    weights: str | None = None

    def __post_init__(self) -> None:
        if not (self.encoder or self.decoder):
            raise UserError("med: it neither reads nor writes; set encoder or decoder to true")

    def build(self, context_dim: int) -> "MedModule":
        """The network over image features (or, for the answers of VQA, texts) of `context_dim` channels; call it
        under `empty_weights`."""
        return MedModule(self, context_dim)

    def read_base(self, network: nn.Module, files: WeightFiles) -> BaseWeights:
        """A BERT's tensors for a text model: both self-attentions start as its one."""
        roles = {"attention": self.encoder, "decoder_attention": self.decoder}
        attentions = [name for name, is_there in roles.items() if is_there]
        return read_bert(files, attentions=attentions, head=self.decoder, fresh=("layers.*.cross_attention.*",))

    def initialise(self, network: nn.Module, module: nn.Module) -> None:
        """Draws the new tensors that one submodule of a built network holds itself."""
        draw_bert(module)


class MedLayer(BertLayer):
    """A layer with one self-attention for reading, one for writing; cross-attention and the rest serve both."""

    def __init__(self, description: Med, *, context_dim: int) -> None:
        super().__init__(description, context_dim=context_dim)
        if description.decoder:
            self.decoder_attention = Attention(description)
        if not description.encoder:
            del self.attention


class MedModule(nn.Module):
    """One stack, three uses.

    ::

        read(ids, mask)                 self-attention ------------------> mlp   a text alone: [CLS] first
        read(ids, mask, features)       self-attention -> cross-attention -> mlp   a text with an image: [ENC] first
        write(ids, features)            decoder_attention (causal) -> cross-attention -> mlp -> logits   [DEC] first
    """

    def __init__(self, description: Med, context_dim: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(description)
        self.layers = nn.ModuleList(
            MedLayer(description, context_dim=context_dim) for _ in range(description.num_layers)
        )
        if description.decoder:
            self.head = LMHead(description)

    def read(
        self, ids: Tensor, mask: Tensor, features: Tensor | None = None, features_mask: Tensor | None = None
    ) -> Tensor:
        """float[S, n, D]: texts by themselves, or each with what it is about.

        Args:
            ids: int64[S, n], padded; the first token says which use it is.
            mask: bool[S, n], True at real tokens.
            features: float[S, m, C].
            features_mask: bool[S, m]; None: all are real.
        """
        x = self.embeddings(ids)
        seen = None if features_mask is None else key_mask(features_mask)
        for layer in self.layers:
            x, _, _ = layer(x, mask=key_mask(mask), context=features, context_mask=seen)
        return x

    def write(self, ids: Tensor, features: Tensor, features_mask: Tensor | None = None) -> Tensor:
        """float[S, n, D]: hidden states of texts, each token seeing the features and what stands before it.

        Args:
            ids: int64[S, n]; tokens behind the end of a text are looked at by none of it, and need no mask.
            features: float[S, m, C].
            features_mask: bool[S, m]; None: all are real.
        """
        x = self.embeddings(ids)
        seen = None if features_mask is None else key_mask(features_mask)
        for layer in self.layers:
            x, _, _ = layer(x, attention="decoder_attention", is_causal=True, context=features, context_mask=seen)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """float[..., D] -> float[..., vocabulary]."""
        assert self.embeddings.words is not None
        return self.head(hidden, self.embeddings.words.weight)

    def label_loss(self, hidden: Tensor, row: Row, *, label_smoothing: float) -> Tensor:
        """float32[]: the loss of a row's labels, of float[L, D] hidden states at their positions."""
        return written_loss(self, hidden, row, label_smoothing=label_smoothing)

    def step(
        self, ids: Tensor, mask: Tensor, features: Tensor, features_mask: Tensor | None, cache: EncoderDecoderCache
    ) -> Tensor:
        """float[S, vocabulary] of the token behind the last one; `write`, a few tokens at a time.

        Args:
            ids: int64[S, n], the tokens since the last step.
            mask: bool[S, past + n], True at real tokens; texts stand padded on the left.
            features: float[S, m, C].
            features_mask: bool[S, m]; None: all are real.
            cache: of the tokens before, and of the features once a step has made theirs; it is extended.
        """
        num_past, num_tokens = cache.get_seq_length(), mask.shape[1]
        own, seen = cache.self_attention_cache, cache.cross_attention_cache
        visible = causal_mask(ids.shape[1], num_tokens, ids.device) & key_mask(mask)
        # a padded place sees itself: attention to nothing is not a number
        visible = visible | torch.eye(num_tokens, dtype=torch.bool, device=ids.device)[num_past:]
        x = self.embeddings(ids, positions=(mask.cumsum(1) - 1).clamp(min=0)[:, num_past:])
        slots: dict[str, Any] = {"attention": "decoder_attention", "mask": visible}
        slots["context_mask"] = None if features_mask is None else key_mask(features_mask)
        for index, layer in enumerate(self.layers):
            if num_past:
                stored: list[Any] = [part.layers[index] for part in (own, seen)]
                past, crossed = ((part.keys, part.values) for part in stored)
                x, (keys, values), _ = layer(x, past=past, past_context=crossed, **slots)
            else:
                x, (keys, values), crossed = layer(x, context=features, **slots)
                seen.update(*crossed, index)
            own.update(keys[:, :, num_past:], values[:, :, num_past:], index)
        return self.logits(x[:, -1])


class Writer(Protocol):
    """What writes a text token by token: a `MedModule`, or a Q-Former with a head."""

    embeddings: Any

    def step(
        self, ids: Tensor, mask: Tensor, features: Tensor, features_mask: Tensor | None, cache: EncoderDecoderCache
    ) -> Tensor: ...


class MedSearch(PreTrainedModel, GenerationMixin):
    """A writer as transformers' search wants a model: an encoder-decoder whose encoder has run already.

    The score of a beam is divided by the length of the whole text, the prompt counted and the end token not: so did
    transformers when BLIP was published. Today's would count what follows the prompt, and choose longer captions. What
    a prompt is padded with never counts.
    """

    config_class = BertConfig

    def __init__(self, writer: Writer, *, end_id: int) -> None:
        super().__init__(BertConfig(vocab_size=writer.embeddings.words.num_embeddings, is_encoder_decoder=True))
        self.writer = writer
        self.num_padded = torch.zeros(0, dtype=torch.int64)
        self.end_id = end_id

    def forward(
        self,
        *,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor,
        encoder_outputs: BaseModelOutput,
        past_key_values: EncoderDecoderCache,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        """One step; `attention_mask` is that of the features."""
        assert encoder_outputs.last_hidden_state is not None
        if not past_key_values.get_seq_length():
            self.num_padded = (decoder_attention_mask == 0).sum(1)  # [B * beams]
        logits = self.writer.step(
            decoder_input_ids,
            decoder_attention_mask.bool(),
            encoder_outputs.last_hidden_state,
            attention_mask,
            past_key_values,
        )
        return Seq2SeqLMOutput(logits=logits[:, None], past_key_values=past_key_values)

    def _update_finished_beams(self, **beams: Any) -> Any:  # type: ignore[override]
        length, power = beams["cur_len"], beams["length_penalty"]
        last = beams["topk_running_sequences"][:, :, length]
        whole = length - self._padded(len(last)) + (last != self.end_id).to(torch.float32)
        answer = length + 1 - beams["decoder_prompt_len"]  # what it will be divided by
        beams["topk_log_probs"] = beams["topk_log_probs"] * (answer / whole) ** power
        return super()._update_finished_beams(**beams)

    def _check_early_stop_heuristic(self, **beams: Any) -> Any:  # type: ignore[override]
        start = 1 + self._padded(len(beams["beam_scores"]))
        return GenerationMixin._check_early_stop_heuristic(**(beams | {"decoder_prompt_len": start}))

    def _padded(self, count: int) -> Tensor:
        """int64[B, 1], how many tokens each of `count` prompts is padded with."""
        return self.num_padded.view(count, -1)[:, :1]
