"""Changes to a language model, as data: stored with every artefact and replayed by whoever loads it.

Surgery never renames pretrained weights, and a new path starts as the identity.
"""

from abc import ABC, abstractmethod

from torch import nn


class Surgery(ABC):
    """One change to the network; subclasses are frozen dataclasses, so that they can be written down."""

    @abstractmethod
    def apply(self, module: nn.Module) -> None:
        """Changes `module` in place.

        Args:
            module: the whole system, its parts still without weights.
        """
