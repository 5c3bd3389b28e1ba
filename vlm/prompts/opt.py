"""OPT's tokenizer: the byte-level BPE of GPT-2 in the files that OPT is published with."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from vlm.errors import UserError
from vlm.prompts.files import find_file
from vlm.prompts.tokenizer import LoadedTokenizer, Tokenizer, add_special

_MARKS = ("<s>", "<pad>", "</s>", "<unk>")
NEWLINE = "\u010a"
"""How byte-level BPE spells a newline."""


@dataclass(frozen=True)
class OPTTokenizer(Tokenizer):
    """`vocab.json` and `merges.txt` of OPT, used as by its slow tokenizer without a blank in front.

    OPT starts texts with `</s>`. What ends them is the caller's: BLIP-2 teaches a newline.

    Args:
        path: folder that holds both files, or a Hugging Face repository.
        added_tokens: special tokens that take new ids, in this order.
        pad_token: never inside of a row.
        eos_token: ends an answer; a token of the vocabulary by its exact name.
    """

    path: str
    _: KW_ONLY
    add_bos: bool = True
    added_tokens: Sequence[str] = ()
    pad_token: str | None = "<pad>"
    eos_token: str = NEWLINE

    @cached_property
    def _files(self) -> tuple[str, str]:
        expected = "a folder with `vocab.json` and `merges.txt`"
        vocab, merges = (find_file(self.path, name, expected) for name in ("vocab.json", "merges.txt"))
        return str(vocab), str(merges)

    def _open(self) -> LoadedTokenizer:
        try:
            model = models.BPE.from_file(*self._files)
        except Exception as error:  # the library raises plain Exception
            if isinstance(error, UserError):
                raise
            raise UserError(f"tokenizer {self.path}: vocab.json or merges.txt cannot be read ({error})") from error
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        backend.decoder = decoders.ByteLevel()
        for token in ("</s>", self.eos_token):
            if backend.token_to_id(token) is None:
                raise UserError(f"tokenizer {self.path}: no token {token!r}, which OPT's has; give OPT's own files")
        add_special(backend, [*(mark for mark in _MARKS if backend.token_to_id(mark) is not None), *self.added_tokens])
        return LoadedTokenizer(backend, "</s>", self.eos_token, self.pad_token)

    def save(self, folder: str | Path) -> None:
        super().save(folder)
        self._opened.backend.model.save(str(folder))
