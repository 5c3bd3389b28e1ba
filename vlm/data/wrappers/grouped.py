"""Several samples that count as one."""

import dataclasses

import numpy as np

from vlm.data.sampling.order import Blocks
from vlm.data.sources.base import Source
from vlm.data.wrappers.wrapped import Wrapped
from vlm.errors import UserError
from vlm.sample import DOCUMENT, ImagePart, Message, Sample


class Grouped(Wrapped):
    """Every `size` samples in a row as one sample of so many documents, each seen by itself.

    So a batch that was published in such groups is kept: an item of VILA's loader is four pairs of COYO, to balance
    their tokens with a document's. A pair becomes the document of its image and its caption; what the user says
    beside the image is left out, as the template `document` leaves it out. The last samples that fill no group are
    left out, as published.

    Args:
        source: of documents, or of pairs: one turn and its answer.
        size: samples of a group.
    """

    def __init__(self, source: Source, size: int = 4) -> None:
        if size < 1:
            raise UserError(f"the size of a group must be at least 1, found {size}")
        super().__init__(source)
        self.size = size

    def __len__(self) -> int:
        return len(self.source) // self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} groups, asked for number {index}")
        first = index * self.size
        members = [self.source[at] for at in range(first, first + self.size)]
        return dataclasses.replace(
            members[0],
            messages=tuple(document for member in members for document in _documents(member)),
            images=tuple(image for member in members for image in member.images),
            answers=(),
        )

    def has_image(self, index: int) -> bool:
        return any(self.source.has_image(at) for at in range(index * self.size, (index + 1) * self.size))

    def image_mask(self) -> np.ndarray:
        mask = self.source.image_mask()[: len(self) * self.size].reshape(-1, self.size)
        return np.asarray(mask.any(axis=1))

    def place(self, index: int) -> tuple[str, int]:
        return self.source.place(index * self.size)

    def blocks(self) -> Blocks | None:
        found = self.source.blocks()
        return None if found is None else found._replace(ends=np.minimum(-(-found.ends // self.size), len(self)))


def _documents(sample: Sample) -> tuple[Message, ...]:
    roles = [message.role for message in sample.messages]
    if set(roles) == {DOCUMENT}:
        return sample.messages
    if roles != ["user", "assistant"]:
        raise sample.error(f"only documents and pairs of one answer are grouped, found the roles {', '.join(roles)}")
    asked, answer = sample.messages
    if answer.weight != 1:
        raise sample.error(f"a document has no weight, and this answer has {answer.weight:g}; leave it out")
    pictures = tuple(part for part in asked.content if isinstance(part, ImagePart))
    return (Message(DOCUMENT, (*pictures, *answer.content)),)
