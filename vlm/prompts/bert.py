"""The tokenizer of BERT, with the marks that BLIP and the Q-Former add."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from vlm.errors import UserError
from vlm.prompts.files import find_file
from vlm.prompts.tokenizer import LoadedTokenizer, Tokenizer, add_special

_MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class BertTokenizer(Tokenizer):
    """WordPiece over lower-case text, as `bert-base-uncased` has it.

    Args:
        path: folder that holds `vocab.txt`, the file itself, or a Hugging Face repository.
        added_tokens: special tokens; those the vocabulary does not know take new ids, in this order.
    """

    path: str
    _: KW_ONLY
    add_bos: bool = False
    added_tokens: Sequence[str] = ("[DEC]", "[ENC]")
    pad_token: str | None = "[PAD]"

    def _open(self) -> LoadedTokenizer:
        file = find_file(self.path, "vocab.txt", "a folder with the `vocab.txt` of a BERT")
        words = [line.rstrip("\n") for line in file.open(encoding="utf-8")]
        if missing := [mark for mark in _MARKS if mark not in words]:
            raise UserError(f"tokenizer {self.path}: {file} has no {missing[0]}; is it the vocabulary of a BERT?")
        vocab = {word: index for index, word in enumerate(words)}
        backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
        add_special(backend, [*_MARKS, *self.added_tokens])
        return LoadedTokenizer(backend, "[CLS]", "[SEP]", "[PAD]")
