"""Frozen linear layers in 4 bits: NF4 with double quantization (QLoRA; Dettmers et al., 2023)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.errors import UserError


class FourBitLinear(nn.Linear):
    """float[..., in] -> float[..., out], computed in the type of autocast, else of the input.

    Until `keep` is given the weight, its place is empty and has its published shape: so sources, hashes and whoever
    draws new weights deal with the published tensor, and no more than one is ever there in full.
    """

    state: Any = None
    """Scales and tables of bitsandbytes; None before `keep`."""

    @classmethod
    def like(cls, linear: nn.Linear) -> "FourBitLinear":
        """In the place of a linear layer that is still empty.

        Raises:
            UserError: bitsandbytes is not installed.
        """
        _bitsandbytes()
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        weight: Any = made.weight
        weight.stays_empty = True  # `vlm.building.network.allocate`
        return made

    def keep(self, name: str, value: Tensor, device: torch.device) -> bool:
        """Takes a full tensor in the form in which this layer keeps it; False: the layer has no form of its own."""
        if name != "weight":
            return False
        bnb = _bitsandbytes()
        packed, self.state = bnb.functional.quantize_4bit(
            value.detach().to(device).contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        self._parameters["weight"] = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=self.state, quant_type="nf4", bnb_quantized=True
        )
        return True

    def full_weight(self) -> Tensor:
        """float[out, in]: what is computed with."""
        state = self._state_beside_weight()
        return _bitsandbytes().functional.dequantize_4bit(self.weight.data, state)

    @property
    def num_bytes(self) -> int:
        """Of the weight with its scales and tables."""
        return packed_bytes(self.in_features * self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.state is None:  # a network that is counted and never filled
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        state = self._state_beside_weight()
        state.dtype = x.dtype  # of the weight that the backward pass makes for a moment
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _bitsandbytes().matmul_4bit(x, self.weight, bias=bias, quant_state=state)

    def _state_beside_weight(self) -> Any:
        weight: Any = self.weight
        if self.state.absmax.device != weight.device:  # `Module.to` moves parameters alone
            self.state.to(weight.device)
        if getattr(weight, "quant_state", None) is None:  # and makes new ones, without what peft looks for
            weight.quant_state = self.state
        return self.state


def full_size(parameter: Tensor) -> int:
    """How many numbers a parameter stands for, however it is packed."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def packed_bytes(size: int) -> int:
    """What a weight of so many numbers takes: 4 bits each, a byte for 64 of them, a float for 256 of these, tables."""
    blocks = -(-size // 64)
    return -(-size // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("weights in 4 bits need bitsandbytes: pip install 'vlm[quantized]'") from error
    return bitsandbytes
