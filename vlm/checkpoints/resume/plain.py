"""What a checkpoint may hold: plain data and tensors."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from vlm.errors import UserError

_PLAIN = {str, bytes, int, float, complex, bool, type(None), torch.Size, torch.dtype, torch.device}


def check_plain(value: Any, where: str = "") -> int:
    """Bytes of all tensors in a checkpoint.

    Raises:
        UserError: it holds something that `weights_only=True` would refuse at the resume.
    """
    if isinstance(value, Tensor):
        return value.nbytes
    if type(value) in (dict, OrderedDict):
        return sum(check_plain(k, f"{where}[{k!r}]") + check_plain(v, f"{where}[{k!r}]") for k, v in value.items())
    if type(value) in (list, tuple, set):
        return sum(check_plain(item, f"{where}[{index}]") for index, item in enumerate(value))
    if type(value) in _PLAIN:
        return 0
    raise UserError(
        f"checkpoint{where} is a {type(value).__module__}.{type(value).__qualname__}, which a resume could not read; "
        "its state_dict must return tensors, numbers, strings, lists and dicts"
    )
