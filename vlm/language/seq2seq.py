"""Encoder-decoder language models of transformers: T5 and FlanT5, as parts of a system."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.tables.base import BaseWeights
from vlm.errors import UserError
from vlm.language.causal_lm import LanguagePart, read_transformers_config

_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@dataclass(frozen=True)
class Seq2SeqLM(LanguagePart):
    """Which encoder-decoder to build.

    Attributes:
        path: folder or hub id with `config.json` and weights.
        config: entries on top of the `config.json` of `path`; without `path` with their `model_type`, and the weights
            are new.
        pretrained: False takes the architecture of `path` with new weights.
        checkpointing: recompute each layer's activations in the backward pass, also where the layers are frozen.
    """

    path: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = True
    checkpointing: bool = False

    @property
    def weights(self) -> str | None:  # type: ignore[override]
        return self.path if self.pretrained else None

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
        """T5's own names; old files have a tensor too many."""
        dropped = (_UNUSED,) if _UNUSED in files else ()
        return BaseWeights(frozenset(files.keys()) - set(dropped), files.items, dropped=dropped)

    def initialise(self, model: Any, module: nn.Module) -> None:
        # transformers draws a layer of T5 from the one that holds it; asked layer by layer it would be far off
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.5 * model.config.d_model**-0.5)
        else:
            model._init_weights(module)
