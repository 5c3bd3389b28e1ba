"""Bringing image features into text: free functions on tensors that fail loudly."""

from torch import Tensor


def splice(embeds: Tensor, features: Tensor, slots: Tensor) -> Tensor:
    """Puts image features in the place of their placeholder tokens.

    Args:
        embeds: float[N, D] token embeddings; rows at `slots` are overwritten and get no gradient.
        features: float[K, D], in the order of the slots.
        slots: int64[K].

    Returns:
        float[N, D].

    Raises:
        ValueError: the codec reserved another number of tokens than the network made.
    """
    if features.shape[0] != slots.shape[0]:
        raise ValueError(
            f"the codec reserved {slots.shape[0]} image tokens but the network made {features.shape[0]} features; "
            "num_tokens of the system's codec and its connector disagree"
        )
    return embeds.index_copy(0, slots, features.to(embeds.dtype))
