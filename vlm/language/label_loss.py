"""The loss of a language model at its labels, without the logits of all of them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm import functional
from vlm.batch import Row
from vlm.language.causal_lm import at_labels, label_logits
from vlm.language.layer_inputs import LayerInputs


def label_loss(language: PreTrainedModel, embeds: Tensor, row: Row, inputs: LayerInputs | None = None) -> Tensor:
    """float32[]: `vlm.functional.token_loss` of what `label_logits` gives.

    Where that is more than `vlm.functional.MOST_LOGITS`, some of it is there at a time. A model that scales or caps
    what its head gives makes all of it.
    """
    is_small = len(row.label_positions) * language.config.vocab_size <= functional.MOST_LOGITS
    if is_small or not _ends_in_its_head(language):
        return functional.token_loss(label_logits(language, embeds, row, inputs), row.targets, row.weights)
    return loss_in_head(language, lambda: at_labels(language, embeds, row, inputs), row)


def loss_in_head(language: PreTrainedModel, run: Callable[[], Tensor], row: Row) -> Tensor:
    """float32[]: the same of the logits that `run` has the head make, which gives their loss in their place.

    Within its one call, so that what happens around it happens once: FSDP gathers its weights.

    Args:
        run: calls the head with float[..., D] hidden states at the label positions, and gives what it gives.
    """
    head: Any = language.get_output_embeddings()
    project, vocabulary = head.forward, language.config.vocab_size

    def loss(hidden: Tensor) -> Tensor:
        states = hidden.reshape(-1, hidden.shape[-1])
        return functional.projected_loss(project, states, row.targets, row.weights, vocabulary=vocabulary)

    head.forward = loss
    try:
        return run()
    finally:
        del head.forward


class _Hidden(nn.Module):
    """In the place of a stack: gives what it is made with."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    @property
    def decoder(self) -> "_Hidden":
        """What OPT calls of its model."""
        return self

    def forward(self, *_: Any, **__: Any) -> Any:
        return _Output((self.hidden,))


class _Output(tuple):
    """Hidden states, and nothing else that a model may ask a stack for."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


def _ends_in_its_head(language: Any) -> bool:
    """Whether logits are what the head gives, neither scaled nor capped: asked of the model's own forward."""
    hidden, head = torch.zeros(1, 1, 1), language.get_output_embeddings()
    probe = copy.copy(language)
    probe._modules = dict(language._modules)
    name = next(name for name, module in probe._modules.items() if module is head)
    probe._modules |= {language.base_model_prefix: _Hidden(hidden), name: nn.Identity()}
    logits = type(language).forward(probe, inputs_embeds=hidden).logits
    return logits.untyped_storage()._cdata == hidden.untyped_storage()._cdata
