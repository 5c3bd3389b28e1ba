"""The tokenizer of BERT, with the marks that BLIP and the Q-Former add."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

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

    @cached_property
    def _file(self) -> Path:
        return find_file(self.path, "vocab.txt", "a folder with the `vocab.txt` of a BERT")

    def _open(self) -> LoadedTokenizer:
        file = self._file
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

    def save(self, folder: str | Path) -> None:
        """The vocabulary, and files with which transformers puts a text between [CLS] and [SEP], as its BERT does."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        backend = tokenizers.Tokenizer.from_str(self._opened.backend.to_str())
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(mark, self.token_id(mark)) for mark in ("[CLS]", "[SEP]")],
        )
        backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "clean_up_tokenization_spaces": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        if (folder / "vocab.txt").resolve() != self._file.resolve():
            shutil.copyfile(self._file, folder / "vocab.txt")
