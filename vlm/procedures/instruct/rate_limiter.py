"""When the next request may go out: a rate that is never exceeded, and pauses that a server asks for."""

import threading
import time


class Stopped(Exception):
    """The work ends: another thread has failed, or the user has interrupted it."""


class Clock:
    """Time and waiting. `stop` ends every wait at once."""

    def __init__(self) -> None:
        self.stopping = threading.Event()

    def now(self) -> float:
        return time.monotonic()

    def stop(self) -> None:
        self.stopping.set()

    def sleep(self, seconds: float) -> None:
        """Raises `Stopped` when the work ends meanwhile."""
        if self.stopping.wait(max(0.0, seconds)):
            raise Stopped


class RateLimiter:
    """Requests of all threads go out one by one, at least `60 / requests_per_minute` seconds apart.

    Args:
        requests_per_minute: None for no limit.
    """

    def __init__(self, clock: Clock, *, requests_per_minute: float | None = None) -> None:
        self.clock = clock
        self._gap = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next = clock.now()
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Returns when the caller may send a request."""
        while True:
            with self._lock:
                now = self.clock.now()
                if self._next <= now:
                    self._next = now + self._gap
                    return
                wait = self._next - now
            self.clock.sleep(wait)

    def pause(self, seconds: float) -> None:
        """Nobody sends anything for so long: what one request is told by a busy server holds for all."""
        with self._lock:
            self._next = max(self._next, self.clock.now() + seconds)
