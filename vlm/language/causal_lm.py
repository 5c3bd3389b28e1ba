"""Any decoder-only language model of transformers, as a part of a system.

Llama, Mistral, Qwen2 (and with it Qwen-7B), Gemma and their like: they take `inputs_embeds`, run the registered packed
attention, and their `logits_to_keep` takes label positions, so that the vocabulary projection runs at those alone. The
network stays the stock class, so its parameter names stay the stock names.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from vlm.batch import Row
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.tables.base import BaseWeights
from vlm.errors import UserError
from vlm.language.attention import PACKED
from vlm.language.base_weights import read_decoder
from vlm.language.layer_inputs import LayerInputs
from vlm.language.llama_settings import llama_settings
from vlm.language.qwen import as_qwen2


class LanguagePart(ABC):
    """Description of a language model.

    Attributes:
        weights: folder or hub id of the base weights; None when they are new.
    """

    weights: str | None

    @abstractmethod
    def build(self) -> PreTrainedModel:
        """The network; call it under `vlm.building.network.empty_weights`."""

    @abstractmethod
    def read_base(self, model: nn.Module, files: WeightFiles) -> BaseWeights:
        """Finds the model's tensors in the files of `weights`.

        Raises:
            UserError: the files hold something else.
        """

    @abstractmethod
    def initialise(self, model: nn.Module, module: nn.Module) -> None:
        """Draws the new tensors that one submodule of a built model holds itself."""


@dataclass(frozen=True)
class PretrainedLM(LanguagePart):
    """A language model of transformers, by its folder or by its entries.

    Attributes:
        path: folder or hub id with `config.json` and weights.
        config: entries on top of the `config.json` of `path`; without `path` with their `model_type`, and the weights
            are new.
        pretrained: False takes the architecture of `path` with new weights.
        checkpointing: recompute each layer's activations in the backward pass, also where the layers are frozen; n:
            those of every n-th layer.
    """

    path: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = True
    checkpointing: bool | int = False

    @property
    def weights(self) -> str | None:  # type: ignore[override]
        return self.path if self.pretrained else None


@dataclass(frozen=True)
class CausalLM(PretrainedLM):
    """Which decoder to build.

    Attributes:
        config: entries on top of the `config.json` of `path`. Without `path` it must hold `model_type` (`llama`,
            `mistral`, `qwen2`, `gemma`, ...), and the weights are new. With `path`, another `model_type` builds that
            class over the same weights (`qwen2` over a Llama computes the same: its biases are zero).
    """

    def transformers_config(self) -> PretrainedConfig:
        """The configuration alone; no weights are read."""
        return read_transformers_config(self.path, self.config)

    def build(self) -> PreTrainedModel:
        # deepcopy: from_config writes the attention implementation into the object it is given
        # float32 whatever the folder says: in the float16 of Vicuna's, Adam's first step is already NaN
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(self.transformers_config()), dtype=torch.float32, attn_implementation=PACKED
        )
        model.tie_weights()
        return model

    def read_base(self, model: nn.Module, files: WeightFiles) -> BaseWeights:
        return read_decoder(model, files)

    def initialise(self, model: Any, module: nn.Module) -> None:
        model._init_weights(module)  # as the architecture's authors do


def read_transformers_config(path: str | None, changes: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a language model, with entries on top of it; without `path` they are all of it.

    Raises:
        UserError: there is none, or it has no such entry.
    """
    entries = dict(changes)
    if path is None:
        if "model_type" not in entries:
            raise UserError("language: give `path` (folder or hub id), or `config` with its `model_type`")
        return AutoConfig.for_model(entries.pop("model_type"), **entries)
    is_folder = Path(path).is_absolute() or path.startswith(".") or Path(path).is_dir()
    if is_folder and not (Path(path) / "config.json").is_file():
        raise UserError(f"language.path: no config.json in {path}; give a folder that holds a language model")
    try:
        stated, _ = PretrainedConfig.get_config_dict(path)
        if stated.get("model_type") == "qwen":
            config = AutoConfig.for_model(**as_qwen2(stated))
        elif stated.get("model_type") == "internlm":
            config = AutoConfig.for_model(**llama_settings(stated, attention_bias=True))
        elif stated.get("model_type") == "internlm2":
            config = AutoConfig.for_model(**llama_settings(stated))
        else:
            config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"language.path: cannot open {path!r}: {str(error).splitlines()[0]}") from error
    if "model_type" in entries:
        stated, config = config.to_dict(), AutoConfig.for_model(entries.pop("model_type"))
        for name in stated.keys() - {"model_type", "architectures", "transformers_version"}:
            if hasattr(config, name):
                setattr(config, name, stated[name])
    for name, value in entries.items():
        if not hasattr(config, name):
            raise UserError(f"language.config.{name}: {type(config).__name__} has no such entry")
        setattr(config, name, value)
    return config


def label_logits(language: PreTrainedModel, embeds: Tensor, row: Row, inputs: LayerInputs | None = None) -> Tensor:
    """Logits at the label positions of a row.

    Args:
        language: a causal language model with packed attention.
        embeds: float[N, D] input embeddings, image features in place.
        row: the row they were made from.
        inputs: what its layers are told; None: what the row says.

    Returns:
        float[L, vocabulary].
    """
    return at_labels(language, embeds, row, inputs)[0]


def at_labels(language: PreTrainedModel, embeds: Tensor, row: Row, inputs: LayerInputs | None) -> Tensor:
    """What the head makes of the hidden states float[1, L, D] at the label positions of a row."""
    inputs = LayerInputs.of(row) if inputs is None else inputs
    return language(
        inputs_embeds=embeds[None],
        position_ids=inputs.positions[None],
        use_cache=False,  # with a cache, transformers ignores the sequence bounds
        logits_to_keep=row.label_positions,
        cu_seqlens=row.cu_seqlens,
        max_len=row.max_len,
        layer_inputs=inputs,
    ).logits


@contextmanager
def batched_attention(language: PreTrainedModel) -> Iterator[None]:
    """Inside, a model of packed rows attends over padded batches with a cache instead (for generation)."""
    before = language.config._attn_implementation
    if before == PACKED:
        language.config._attn_implementation = "sdpa" if language._supports_sdpa else "eager"
    try:
        yield
    finally:
        language.config._attn_implementation = before
