"""What every model that writes data looks like from here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from vlm.procedures.instruct.task_specs import Sampling
from vlm.sample import Sample


@dataclass(frozen=True)
class Turn:
    """A message to a model, or an earlier one of its own.

    Attributes:
        picture: a sample whose one image stands before the text.
    """

    role: Literal["system", "user", "assistant"]
    text: str
    picture: Sample | None = None


@dataclass(frozen=True)
class Reply:
    """What a model said.

    Attributes:
        end: `stop`; `length` where `max_tokens` cut it off; `refused` where the model or its host would not.
        tokens: how many it wrote, where it says so.
    """

    text: str
    end: Literal["stop", "length", "refused"] = "stop"
    tokens: int | None = None


class Model(Protocol):
    """Writes answers; several threads ask it at once."""

    name: str
    """For the record of what made the data; holds no secrets."""

    def reply(self, turns: Sequence[Turn], *, seed: int, sampling: Sampling) -> Reply:
        """The next message of the conversation.

        Raises:
            vlm.procedures.instruct.answers.Rejected: this request cannot be answered, others may be.
            UserError: no request will be.
        """
