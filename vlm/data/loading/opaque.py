"""What is handed to a Lightning loop, which looks into everything it can open."""

from typing import Any


class OpaqueBatch:
    """Opens when it is moved to the device.

    With `bf16-true` Lightning rounds every float of a batch before the model sees it (weights of the loss, too) and
    refuses frozen dataclasses while it is at it. It leaves alone what it cannot look into, and what comes out is the
    batch as it was made: a part casts its own input.
    """

    def __init__(self, content: Any) -> None:
        self.content = content

    def to(self, device: Any, non_blocking: bool = False) -> Any:
        # Lightning lets only bare tensors travel while the host goes on
        return self.content.to(device, non_blocking=True) if hasattr(self.content, "to") else self.content
