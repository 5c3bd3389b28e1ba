"""Several ranks on one machine: `run_ranks(check, 2, tmp_path)` runs `check(tmp_path)` in two gloo processes.

The processes come from a fork server that has the heavy imports done and has never run a backward pass, so a start
costs a fraction of a second and forks no threads.
"""

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import vlm  # noqa: F401  (before lightning)
import lightning.pytorch  # noqa: F401  (the fork server imports this file: ranks find the heavy modules in place)
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
import transformers.models.llama.modeling_llama  # noqa: F401
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import distributed

from tests.conftest import PATIENCE

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__, "tests.support.systems", "tests.support.training", "tests.support.commands"])


class RankError(AssertionError):
    """A rank raised an exception of its own; carries the rank's traceback."""


def run_ranks(check: Callable[..., Any], world: int, *args: Any, timeout: float = PATIENCE, **kwargs: Any) -> list[Any]:
    """Runs `check(*args, **kwargs)` in `world` processes that form a gloo group; returns each rank's result.

    The environment is what a launcher such as torchrun makes, and the process group exists already when `check` starts,
    so a `Trainer(accelerator="cpu", devices=world, strategy=...)` inside simply joins it; one start serves any number
    of trainers. Threads are limited to one. Results and arguments are pickled: `check` is a function of a module, and
    tensors are best returned as plain CPU tensors.

    Args:
        check: what every rank runs; it finds its rank by `torch.distributed.get_rank()`.
        world: number of ranks; 1 makes a group of one.
        timeout: seconds for everything, and for every single collective.

    Raises:
        Exception: what the first failing rank raised, with that rank's traceback as its cause; the others are stopped.
        TimeoutError: the ranks did not end, for example because one waits for a collective that another never starts.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world):
            ours, theirs = SERVER.Pipe()
            job = (check, args, kwargs, rank, world, f"{folder}/store", timeout)
            process = SERVER.Process(target=_run_rank, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            ranks.append((process, ours))
        try:
            return _gather(ranks, deadline=time.monotonic() + timeout)
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()


def _gather(ranks: list, *, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        waiting = {ours: rank for rank, (_, ours) in enumerate(ranks) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} of {len(ranks)} did not end in time")
        for ours in ready:
            assert isinstance(ours, Connection)
            rank = waiting[ours]
            try:
                value, error, text = pickle.loads(ours.recv_bytes())
            except EOFError:
                ranks[rank][0].join(timeout=5.0)
                raise RankError(f"rank {rank} died with exit code {ranks[rank][0].exitcode}") from None
            if error is not None:
                raise error from RankError(f"on rank {rank} of {len(ranks)}:\n{text}")
            results[rank] = value
    return [results[rank] for rank in range(len(ranks))]


def _run_rank(connection: Connection, job: tuple) -> None:
    check, args, kwargs, rank, world, store, timeout = job
    try:
        with group_of_ranks(rank, world, store, timeout):
            message = (check(*args, **kwargs), None, "")
            data = pickle.dumps(message)
    except BaseException as error:  # whatever it is, the test has to see it
        text = traceback.format_exc()
        try:
            data = pickle.dumps((None, error, text))
            pickle.loads(data)
        except Exception:
            data = pickle.dumps((None, RankError(f"{type(error).__name__}: {error}"), text))
    connection.send_bytes(data)
    connection.close()
    os._exit(0)  # no atexit hooks: a rank whose peers have failed would wait for them


@contextlib.contextmanager
def group_of_ranks(rank: int, world: int, store: str, timeout: float) -> Iterator[None]:
    """This process as one of `world` ranks, which meet at the file `store`."""
    torch.set_num_threads(1)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",  # never used: the ranks meet over a file
    }
    rank_zero_only.rank = rank
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{Path(store)}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    torch.manual_seed(0)
    yield
    distributed.barrier()
    distributed.destroy_process_group()
