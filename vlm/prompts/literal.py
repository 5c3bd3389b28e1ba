"""Text in which some control tokens are meant and others are only spelled."""

import json
from collections.abc import Sequence

import tokenizers

from vlm.errors import UserError, quoted

_NAME = "\U0010ffff"  # begins the names of control tokens; Unicode says that it is no character


class LiteralBackend:
    """A tokenizer whose control tokens have other names, so that text cannot spell them; the ids are the same.

    Renamed in the vocabulary too, because Unigram and WordPiece find what is in it.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        state = json.loads(backend.to_str())
        special = [token for token in state["added_tokens"] if token["special"]]
        self.names = {token["content"]: _NAME + chr(0xF0000 + at) for at, token in enumerate(special)}
        for token in special:
            token |= {"content": self.names[token["content"]], "special": False}
        model = state["model"]
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {self.names.get(piece, piece): index for piece, index in vocab.items()}
        else:
            model["vocab"] = [[self.names.get(piece, piece), score] for piece, score in vocab]
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if not self._makes_special(merge)]
        if model.get("unk_token") in self.names:
            model["unk_token"] = self.names[model["unk_token"]]
        self.backend = tokenizers.Tokenizer.from_str(json.dumps(state))

    def encode(self, text: str, marks: Sequence[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and the (start, end) characters each one stands for.

        Args:
            marks: where control tokens are meant.

        Raises:
            UserError: the text could spell their new names.
        """
        if _NAME in text:
            raise UserError(f"text holds U+10FFFF, which is no character: {quoted(text)}")
        written: list[str] = []
        places: list[int] = []  # of each character that is written, and of the end
        end = 0
        for start, stop in [*marks, (len(text), len(text))]:
            written.append(text[end:start])
            places += range(end, start)
            if start < stop:
                written.append(self.names[text[start:stop]])
                places += [start] * len(self.names[text[start:stop]])
            end = stop
        ids, spans = encode_with(self.backend, "".join(written))
        places.append(len(text))
        return ids, [(places[start], places[stop]) for start, stop in spans]

    def _makes_special(self, merge: str | Sequence[str]) -> bool:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return not {left, right, left + right}.isdisjoint(self.names)


def encode_with(backend: tokenizers.Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and the (start, end) characters each one stands for.

    Raises:
        UserError: the text is none.
    """
    try:
        encoding = backend.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        raise UserError(f"text holds half a surrogate pair, which is no character: {text[:80]!a}") from None
    return encoding.ids, encoding.offsets
