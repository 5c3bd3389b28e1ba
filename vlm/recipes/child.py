"""One process in the foreground, which gets the signals of this one."""

import os
import signal
import subprocess
from types import FrameType

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def run_child(command: list[str]) -> tuple[int, int | None]:
    """Runs one process in the foreground.

    Returns:
        Its exit status (128 + signal if one killed it), and the signal this process got and passed on, if any.
    """
    child: subprocess.Popen | None = None
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # Ctrl-C reaches the whole foreground group; a second one would cut the child's orderly stop short
        if child is not None and not (number == signal.SIGINT and _is_foreground()):
            child.send_signal(number)

    # what this process ignores (SIGHUP under nohup) the child must go on ignoring, and it inherits just that
    heard = [number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, pass_on) for number in heard}
    try:
        child = subprocess.Popen(command)
        for number in list(received):  # came before there was a child to pass it to
            child.send_signal(number)
        status = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    # SIGUSR1 and SIGUSR2 ask a scheduler's questions (save, requeue), they do not say stop
    stopped = next((number for number in received if number not in (signal.SIGUSR1, signal.SIGUSR2)), None)
    return (128 - status if status < 0 else status), stopped


def _is_foreground() -> bool:
    """Whether this process is in the foreground of a terminal, where the terminal itself sends SIGINT to its child."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
