"""The launcher of the multi-process tests itself."""

import time

import pytest
import torch
from torch import distributed

from tests.support.ranks import run_ranks
from vlm.errors import UserError


def _sum(factor: float) -> tuple[int, float]:
    value = torch.tensor(factor * (distributed.get_rank() + 1))
    distributed.all_reduce(value)
    return distributed.get_rank(), value.item()


def _one_fails() -> None:
    if distributed.get_rank() == 1:
        raise UserError("rank 1 has no data")
    time.sleep(3600)  # as a rank that waits for the other: longer than `run_ranks` waits for all of them


def test_every_rank_answers_and_the_first_error_ends_them_all() -> None:
    assert run_ranks(_sum, 2, 2.0) == [(0, 6.0), (1, 6.0)]
    with pytest.raises(UserError, match="rank 1 has no data"):
        run_ranks(_one_fails, 2)
