"""SIGTERM and Ctrl-C, noted until a training can stop."""

import os
import signal
import threading
from typing import Any

from lightning.pytorch import Trainer


class StopSignals:
    """Which signal has asked this process to stop.

    Lightning's own handlers act wherever the signal finds a rank: on SIGTERM they talk to the other ranks, which wait
    for ever, and on Ctrl-C the step that is running is lost. Lightning puts back what was there before its training.

    Attributes:
        received: the signal; None: go on.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def listen(self, trainer: Trainer) -> None:
        """From now on signals are noted; a second Ctrl-C ends the process at once."""
        self.received = None
        # by which the first rank asks Lightning's handlers, in every micro-batch, and waits for the device
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if threading.current_thread() is not threading.main_thread():
            return

        def note(number: int, frame: Any) -> None:
            if number == signal.SIGINT and self.received == signal.SIGINT:
                kill = getattr(trainer.strategy.launcher, "kill", None)
                if kill is not None:  # the ranks that this process started
                    kill(signal.SIGKILL)
                os._exit(128 + number)
            self.received = signal.Signals(number)
            if number == signal.SIGINT and trainer.is_global_zero:
                # not `print`: the signal may have interrupted one
                after = "this step" if trainer.world_size == 1 else "this step or the next"
                os.write(2, f"\nvlm: saves after {after}, then stops; Ctrl-C again ends at once\n".encode())

        signal.signal(signal.SIGTERM, note)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a script
            signal.signal(signal.SIGINT, note)
