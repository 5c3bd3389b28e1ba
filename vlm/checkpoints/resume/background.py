"""Writing on a thread, while the training goes on."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from torch import Tensor


class BackgroundWriter:
    """Runs one write at a time on a thread of its own. What goes wrong there is raised where it is waited for."""

    def __init__(self) -> None:
        self._running: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Runs `write`, after the one before it.

        Raises:
            Exception: what the one before has raised.
        """
        self.wait()
        running: Future[None] = Future()

        def run() -> None:
            try:
                write()
            except BaseException as error:
                running.set_exception(error)
            else:
                running.set_result(None)

        self._running = running
        # a daemon: a process that ends in an error does not wait for ranks that no longer answer
        threading.Thread(target=run, name="checkpoint", daemon=True).start()

    @property
    def has_failed(self) -> bool:
        """Whether `wait` would raise by now."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            Exception: what went wrong; once.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()


def copy_to_host(value: Any) -> Any:
    """A copy of a checkpoint that training does not change, its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, copy_to_host(item)) for key, item in value.items())
    if type(value) in (list, tuple, set):
        return type(value)(copy_to_host(item) for item in value)
    return value
