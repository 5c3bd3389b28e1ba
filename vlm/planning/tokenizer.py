"""A tokenizer for plans, in the place of one whose file is not here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlm.prompts.tokenizer import LoadedTokenizer, Tokenizer

_PIECE = re.compile(r"\s?[^\W\d_]{1,5}|\d|\s?[^\w\s]|\s?_|\s")
"""Roughly a token of European text: up to five letters with the blank before them, a digit, a sign."""


@dataclass(frozen=True)
class RoughTokenizer(Tokenizer):
    """Counts about as many tokens as a tokenizer of 32,000 or more would make; its ids mean nothing.

    Attributes:
        path: of the tokenizer it stands for.
        rows: of that one's embeddings.
        add_bos: as there.
        added_tokens: as there.
    """

    path: str
    rows: int
    add_bos: bool
    added_tokens: Sequence[str] = ()
    pad_token: str | None = None

    def _open(self) -> LoadedTokenizer:
        raise AssertionError("it has no file")

    def encode(self, text: str, *, literal: Sequence[tuple[int, int]] = ()) -> tuple[list[int], list[tuple[int, int]]]:
        spans = [match.span() for match in _PIECE.finditer(text)]
        return [0] * len(spans), spans

    def token_id(self, token: str) -> int:
        return 0

    def added_id(self, token: str) -> int | None:
        return None

    @property
    def bos_id(self) -> int | None:
        return 0 if self.add_bos else None

    @property
    def eos_id(self) -> int:
        return 0

    @property
    def pad_id(self) -> int:
        return 0

    def __len__(self) -> int:
        return self.rows + len(self.added_tokens)
