"""Encoder-decoder language models of transformers: T5 and FlanT5, as parts of a system."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSeq2SeqLM, DynamicCache, EncoderDecoderCache, PretrainedConfig, PreTrainedModel

from vlm.batch import IGNORE
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.tables.base import BaseWeights
from vlm.errors import UserError
from vlm.language.causal_lm import PretrainedLM, read_transformers_config
from vlm.language.choosing import Weighed

_CHUNK = 64
"""Outputs that are weighed together."""
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@dataclass(frozen=True)
class Seq2SeqLM(PretrainedLM):
    """Which encoder-decoder to build."""

    def transformers_config(self) -> PretrainedConfig:
        """The configuration alone; no weights are read."""
        config = read_transformers_config(self.path, self.config)
        if config.model_type != "t5":
            raise UserError(f"language: a {config.model_type}, but an encoder-decoder here is a t5; give another path")
        return config

    def build(self) -> PreTrainedModel:
        config = copy.deepcopy(self.transformers_config())
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
        model.tie_weights()
        if not config.scale_decoder_outputs:
            # since version 1.1 the head is a table of its own, which transformers ties until it reads one
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        return model

    def read_base(self, model: nn.Module, files: WeightFiles) -> BaseWeights:
        """T5's own names; old files have a tensor too many, and those that tie the head to the tokens have it once."""
        dropped = (_UNUSED,) if _UNUSED in files else ()
        names = frozenset(files.keys()) - set(dropped)
        if "lm_head.weight" in files:
            return BaseWeights(names, files.items, dropped=dropped)

        def items() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in files.items():
                yield name, tensor
                if name == "shared.weight":
                    yield "lm_head.weight", tensor

        return BaseWeights(names | {"lm_head.weight"}, items, dropped=dropped)

    def initialise(self, model: Any, module: nn.Module) -> None:
        # transformers draws a layer of T5 from the one that holds it; asked layer by layer it would be far off
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.5 * model.config.d_model**-0.5)
        else:
            model._init_weights(module)


def added_to_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """float[S, 1, 1, n] of a mask bool[S, n], as T5 adds it to its scores: nothing, or the lowest number there is.

    Given the mask itself, transformers would ask the device whether anything is masked at all.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)[
        :, None, None
    ]


@torch.no_grad()
def weigh_outputs(
    language: Any,
    encoded: Tensor,
    mask: Tensor,
    groups: Sequence[Sequence[Sequence[int]]],
    *,
    start: int,
    by: Weighed = "mean",
) -> list[Tensor]:
    """float32[outputs], on the CPU: the loss of each output to its encoded text; the likeliest has the lowest.

    Texts are encoded once, and so are the keys and values that the decoder's cross-attention makes of them.

    Args:
        language: the encoder-decoder of transformers, in eval mode.
        encoded: float[B, n, D], what its encoder made.
        mask: bool[B, n].
        groups: per text the token ids of each output, their end included.
        start: token that an output begins behind.
        by: see `vlm.language.choosing.weigh_options`.
    """
    weighed = []
    for features, real, group in zip(encoded, mask, groups, strict=True):
        seen, device = features[real][None], encoded.device
        cross = EncoderDecoderCache(DynamicCache(), DynamicCache())
        first = torch.tensor([[start]], device=device)
        language.decoder(input_ids=first, encoder_hidden_states=seen, past_key_values=cross, use_cache=True)
        losses = []
        for at in range(0, len(group), _CHUNK):
            outputs = [torch.tensor(ids) for ids in group[at : at + _CHUNK]]
            targets = pad_sequence(outputs, batch_first=True, padding_value=IGNORE).to(device)
            ids = torch.cat([first.expand(len(outputs), 1), targets[:, :-1].clamp(min=0)], dim=1)
            memory = DynamicCache()
            layers: Any = cross.cross_attention_cache.layers
            for number, layer in enumerate(layers):
                keys, values = (kept.expand(len(outputs), -1, -1, -1) for kept in (layer.keys, layer.values))
                memory.update(keys, values, number)
            hidden = language.decoder(
                input_ids=ids,
                encoder_hidden_states=seen.expand(len(outputs), -1, -1),
                past_key_values=EncoderDecoderCache(DynamicCache(), memory),
                use_cache=True,
            )[0]
            if language.config.scale_decoder_outputs:
                hidden = hidden * language.config.d_model**-0.5
            logits = language.lm_head(hidden).float()
            loss = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none").sum(1)
            losses.append(loss / (targets != IGNORE).sum(1) if by == "mean" else loss)
        weighed.append(torch.cat(losses).cpu())
    return weighed
