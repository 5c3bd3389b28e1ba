"""Qwen's tokenizer, from the `qwen.tiktoken` that is published: every token's bytes and its rank."""

import base64
import binascii
import shutil
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from vlm.errors import UserError
from vlm.prompts.files import find_file
from vlm.prompts.tokenizer import LoadedTokenizer, Tokenizer, add_special

END = "<|endoftext|>"
TURNS = ("<|im_start|>", "<|im_end|>")
EXTRAS = tuple(f"<|extra_{number}|>" for number in range(205))
PLACES = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGES = ("<img>", "</img>", "<imgpad>")

# What a merge may never cross; `tokenization_qwen.py`
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class QwenTokenizer(Tokenizer):
    """The ids of Qwen-VL's own tokenizer, without `tiktoken`.

    Text is brought to Unicode's composed form (NFC), as published; the spans that `encode` gives still count the
    characters of the text as it came. The special tokens follow the ranks of the file: with the published 151,643 of
    them `<|endoftext|>` is 151643 and `<imgpad>` 151859. Embeddings have more rows, 151,936 of them. Text of data
    that spells the marks of places makes these tokens, for so it is asked for a place.

    Args:
        path: folder that holds `qwen.tiktoken`, the file itself, or a Hugging Face repository.
        added_tokens: further special tokens; they take the ids behind `<imgpad>`, in this order.
        pad_token: default `<|endoftext|>`, as in the published fine-tuning.
    """

    path: str
    _: KW_ONLY
    add_bos: bool = False
    added_tokens: Sequence[str] = ()
    pad_token: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.add_bos:
            raise UserError(f"tokenizer {self.path}: Qwen's texts start with no mark; remove add_bos")

    @cached_property
    def _file(self) -> Path:
        return find_file(self.path, "qwen.tiktoken", "a folder with a `qwen.tiktoken`, or such a file")

    def _open(self) -> LoadedTokenizer:
        ranks = _read_ranks(self._file)
        letters = _byte_letters()
        words = {token: "".join(letters[byte] for byte in token) for token in ranks}
        # tiktoken joins the neighbours whose union ranks first, however that union came about: so every way to cut a
        # token into two others is a merge of its rank
        merges = [
            (words[token[:cut]], words[token[cut:]])
            for token in sorted(ranks, key=ranks.__getitem__)
            for cut in range(1, len(token))
            if token[:cut] in ranks and token[cut:] in ranks
        ]
        vocab = {words[token]: rank for token, rank in ranks.items()}
        # `ignore_merges`: a piece that is a token needs no merges, even where they would not lead to it
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        pad = self.pad_token or END
        new = [pad] if pad not in self.added_tokens else []
        add_special(backend, [END, *TURNS, *EXTRAS])
        # no special ones: they stay in an answer when it is decoded
        backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in PLACES])
        add_special(backend, [*IMAGES, *new, *self.added_tokens])
        return LoadedTokenizer(backend, None, END, pad)

    def save(self, folder: str | Path) -> None:
        super().save(folder)
        target = Path(folder) / "qwen.tiktoken"
        if target.resolve() != self._file.resolve():
            shutil.copyfile(self._file, target)


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Rank by token.

    Raises:
        UserError: a line is not a token and its rank, or the ranks are not 0, 1, ... with all single bytes among them.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(f"{file}, line {number}: not a token in base64 and its rank: {line[:40]!r}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{file} is not a whole tiktoken vocabulary ({len(ranks)} tokens); download it again")
    return ranks


def _byte_letters() -> dict[int, str]:
    """The visible character that byte-level BPE writes each byte as (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + at) for at, byte in enumerate(hidden)}
