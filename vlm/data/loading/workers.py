"""How loader processes are started."""

import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import Any


def worker_context(num_workers: int, *travels: Any) -> BaseContext | None:
    """A server without threads that forks the workers; None without workers.

    A training process has threads (gloo or NCCL, the logger's writer, CUDA), and a fork of it now and then leaves a
    child that waits for ever for a lock which a thread held at that moment: CPython 3.11's own lock over thread states,
    once in about a hundred starts of two ranks with two workers.

    Args:
        travels: objects that are sent to the workers; the server imports their modules once, for all of them.
    """
    if not num_workers:
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["vlm.data.loading.loader", *dict.fromkeys(type(value).__module__ for value in travels)]
    )
    with _without_interrupts():
        forkserver.ensure_running()
    return context


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process that is started meanwhile ignores Ctrl-C, and so do its children.

    A terminal sends it to all processes of the command; the training needs its workers until it has saved.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
