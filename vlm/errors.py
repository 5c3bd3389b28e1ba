"""Errors a user can cause. The command line prints them as one line, without a traceback."""

from typing import Literal

Fault = Literal["marks", "region", "image", "too long", "no label"]
"""What kinds of faults samples have, where the kind is known: `vlm check-data` counts them."""


MAX_QUOTED, MAX_REASON = 100, 600
"""Longest quotation of something out of a file, and longest reason, in characters."""


def shorten(text: str, limit: int = MAX_QUOTED) -> str:
    """The beginning of a text that is longer."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def quoted(value: object, limit: int = MAX_QUOTED) -> str:
    """A value as an error line shows it."""
    return shorten(repr(value[:limit] if isinstance(value, str | bytes) else value), limit)


class UserError(ValueError):
    """Something the user can mend: the message names the file, key or sample and says what to do.

    Attributes:
        kind: of fault, where the error is about the content of a sample.
    """

    def __init__(self, message: str, *, kind: Fault | None = None) -> None:
        super().__init__(message)
        self.kind = kind


class SetupError(UserError):
    """A file that every sample needs (of a tokenizer) cannot be used: no sample is to blame, and none can be tried."""


class SampleError(UserError):
    """One sample is bad. Its line is short, whatever stands in the sample.

    Attributes:
        reason: what is wrong with it.
        sample_id: id of the sample, or the position in its file when it has none.
        source: file the sample came from.
    """

    def __init__(self, message: str, *, sample_id: str, source: str, kind: Fault | None = None) -> None:
        message = shorten(message, MAX_REASON)
        super().__init__(f"{source}: sample {quoted(sample_id)}: {message}", kind=kind)
        self.reason = message
        self.sample_id = sample_id
        self.source = source

    def __reduce__(self):  # keyword-only arguments do not survive the default pickling between worker and trainer
        return _rebuild_sample_error, (self.reason, self.sample_id, self.source, self.kind)


def _rebuild_sample_error(message: str, sample_id: str, source: str, kind: Fault | None) -> SampleError:
    return SampleError(message, sample_id=sample_id, source=source, kind=kind)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU's allocator, had no memory left."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)  # torch need not be there


def is_lost_rank(error: BaseException) -> bool:
    """Whether another process of the run has died, or has not answered for longer than its group waits."""
    kind = type(error)
    return kind.__name__ in ("DistBackendError", "DistNetworkError") or (kind is RuntimeError and "gloo" in str(error))
