"""Tokenizers as light descriptions: what stands in a YAML, travels to worker processes and is opened at first use.

Both kinds answer with ids *and* the characters each token stands for, so that a label mask drawn on text can be laid
on tokens (`vlm.prompts.template.tokenize`).
"""

import functools
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from vlm.errors import SetupError, UserError
from vlm.prompts.files import download, find_file
from vlm.prompts.literal import LiteralBackend, encode_with

_BLANK = "▁"  # how SentencePiece writes a space


class LoadedTokenizer(NamedTuple):
    """A tokenizer in memory. The strings are those of its marks, None where it has none."""

    backend: tokenizers.Tokenizer
    bos: str | None
    eos: str | None
    pad: str | None

    @property
    def rows(self) -> int:
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1


class Tokenizer(ABC):
    """Text to ids and back. Subclasses are frozen dataclasses: pickling carries the description, never the vocabulary.

    Raises:
        SetupError: at first use, when the files are missing or not of the expected kind.
    """

    path: str
    add_bos: bool
    added_tokens: Sequence[str]
    pad_token: str | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "added_tokens", tuple(self.added_tokens))  # YAML delivers lists, and those do not hash

    def __getstate__(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    @abstractmethod
    def _open(self) -> LoadedTokenizer: ...

    @cached_property
    def _opened(self) -> LoadedTokenizer:
        try:
            return self._open()
        except UserError as error:
            raise SetupError(str(error)) from error

    def encode(self, text: str, *, literal: Sequence[tuple[int, int]] = ()) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of `text` and the (start, end) characters each one stands for; no BOS.

        The pieces of a character that takes several tokens all carry the span of that character, and so does a
        prefix blank that has no character of its own.

        Args:
            literal: ranges of characters that come from data: control tokens that these spell are text.
        """
        if literal:
            marks = [found.span() for found in self._control.finditer(text)]
            real = [mark for mark in marks if not any(mark[0] < end and start < mark[1] for start, end in literal)]
            if len(real) < len(marks):
                return self._literal.encode(text, real)
        return encode_with(self._opened.backend, text)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Finds control tokens."""
        added = self._opened.backend.get_added_tokens_decoder().values()
        marks = sorted((token.content for token in added if token.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, marks)) or r"(?!)")

    @cached_property
    def _literal(self) -> "LiteralBackend":
        return LiteralBackend(self._opened.backend)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        return self._opened.backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int:
        """Id of one token by its exact name.

        Raises:
            UserError: the vocabulary has no such token.
        """
        index = self._opened.backend.token_to_id(token)
        if index is None:
            raise UserError(f"tokenizer {self.path}: no token {token!r}; list it in added_tokens")
        return index

    def added_id(self, token: str) -> int | None:
        """Id of a token that other tokens never spell; None where this is not one."""
        added = self._opened.backend.get_added_tokens_decoder()
        return next((index for index, known in added.items() if known.content == token), None)

    @property
    def bos_id(self) -> int | None:
        """Id that starts a text; None when this tokenizer adds none."""
        if not self.add_bos:
            return None
        if self._opened.bos is None:
            raise UserError(f"tokenizer {self.path}: add_bos is set, but its files name no bos_token")
        return self.token_id(self._opened.bos)

    @property
    def eos_id(self) -> int:
        if self._opened.eos is None:
            raise UserError(f"tokenizer {self.path}: its files name no eos_token; give eos_token")
        return self.token_id(self._opened.eos)

    @property
    def pad_id(self) -> int:
        if self._opened.pad is None:
            raise UserError(f"tokenizer {self.path}: its files name no pad_token; give pad_token")
        return self.token_id(self._opened.pad)

    def __len__(self) -> int:
        """Rows an embedding needs: one more than the largest id, added tokens included."""
        return self._opened.rows

    def save(self, folder: str | Path) -> None:
        """Writes files that `AutoTokenizer.from_pretrained(folder)` opens with the same ids, BOS included."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        backend = tokenizers.Tokenizer.from_str(self._opened.backend.to_str())
        if self.bos_id is not None:
            bos = self._opened.bos
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, self.bos_id)]
            )
        backend.save(str(folder / "tokenizer.json"))
        marks = {"bos_token": self._opened.bos, "eos_token": self._opened.eos, "pad_token": self._opened.pad}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{name: token for name, token in marks.items() if token is not None},
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class LlamaTokenizer(Tokenizer):
    """A SentencePiece BPE model with the ids of the published (slow) LLaMA tokenizer.

    Text is split at special tokens first. With `legacy` every piece between them is encoded as if a space stood before
    it; without, only a text that starts with ordinary characters is. LLaVA and LLaVA-1.5 were trained with `legacy`,
    Vicuna-1.5's own files and VILA say otherwise.

    Args:
        path: folder that holds `tokenizer.model`, the file itself, or a Hugging Face repository.
        legacy: which of the two prefix rules.
        add_bos: whether a text starts with the BOS id (Yi's does not).
        added_tokens: special tokens; those the model does not know take new ids, in this order.
        pad_token: default the unknown token, as in LLaVA. One that is neither in the model nor in `added_tokens` takes
            the first new id, as in LLaVA's first release.
        bos_token: default the model's own. InstructBLIP's is `</s>`.
    """

    path: str
    _: KW_ONLY
    legacy: bool = True
    add_bos: bool = True
    added_tokens: Sequence[str] = ()
    pad_token: str | None = None
    bos_token: str | None = None

    @cached_property
    def _file(self) -> Path:
        return find_file(self.path, "tokenizer.model", "a folder with a SentencePiece `tokenizer.model`")

    def _open(self) -> LoadedTokenizer:
        stat = self._file.stat()
        return _load_llama(self, (stat.st_mtime_ns, stat.st_size))

    def read(self, state: tuple[int, int]) -> LoadedTokenizer:
        """The tokenizer of the file as it is in this state (see `_sentencepiece_model`)."""
        proto, vocab, merges = _sentencepiece_model(self._file, state)
        kinds = proto.SentencePiece
        trainer = proto.trainer_spec
        unknown = proto.pieces[trainer.unk_id].piece
        symbols = [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab=vocab,
                merges=merges,
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
                ignore_merges=bool(symbols),
            )
        )
        to_blanks = normalizers.Replace(" ", _BLANK)
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.legacy:
            # a normalizer sees every piece between special tokens by itself
            prefix = [normalizers.Prepend(_BLANK)] if proto.normalizer_spec.add_dummy_prefix else []
            backend.normalizer = normalizers.Sequence([*prefix, to_blanks])
        else:
            backend.normalizer = to_blanks
            # Two steps, because the first one adds nothing to a text that already starts with its own sign
            steps.append(pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False))
            steps.append(pre_tokenizers.Metaspace(replacement=_BLANK, prepend_scheme="never", split=False))
        if symbols:
            longest_first = "|".join(re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True))
            steps.append(pre_tokenizers.Split(Regex(longest_first), behavior="isolated"))
        if steps:
            backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.decoder = decoders.Sequence(
            [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        bos, eos = (proto.pieces[index].piece if index >= 0 else None for index in (trainer.bos_id, trainer.eos_id))
        pad = self.pad_token or unknown
        new = [pad] if pad not in vocab and pad not in self.added_tokens else []
        add_special(backend, [token for token in (unknown, bos, eos, *new, *self.added_tokens) if token is not None])
        if self.bos_token is not None and self.bos_token not in vocab:
            raise UserError(f"tokenizer {self.path}: bos_token {self.bos_token!r} is no token of the model")
        return LoadedTokenizer(backend, self.bos_token or bos, eos, pad)

    def save(self, folder: str | Path) -> None:
        super().save(folder)
        target = Path(folder) / "tokenizer.model"
        if target.resolve() != self._file.resolve():
            shutil.copyfile(self._file, target)


@dataclass(frozen=True)
class HubTokenizer(Tokenizer):
    """Any fast tokenizer of the Hugging Face tools (Qwen2, Gemma, MPT, ...), used as its own file says.

    Args:
        path: folder that holds `tokenizer.json`, the file itself, or a Hugging Face repository.
        add_bos: whether a text starts with the BOS id; what the file itself would add is left out.
        added_tokens: special tokens; those the file does not know take new ids, in this order.
        pad_token: default what `tokenizer_config.json` beside the file says.
        eos_token: the same, for a file that has no such neighbour.
    """

    path: str
    _: KW_ONLY
    add_bos: bool = False
    added_tokens: Sequence[str] = ()
    pad_token: str | None = None
    eos_token: str | None = None

    @cached_property
    def _file(self) -> Path:
        return find_file(self.path, "tokenizer.json", "a folder with a `tokenizer.json`, or such a file")

    def _open(self) -> LoadedTokenizer:
        file = self._file
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"tokenizer {self.path}: {file} cannot be read ({error})") from error
        backend.no_padding()
        backend.no_truncation()
        # Marks are ours to add; and a byte-level processor would cut blanks from the spans
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        marks = _named_marks(self.path, file)
        pad = self.pad_token or marks.get("pad_token")
        eos = self.eos_token or marks.get("eos_token")
        add_special(backend, [token for token in (pad, eos, *self.added_tokens) if token is not None])
        return LoadedTokenizer(backend, marks.get("bos_token"), eos, pad)


def add_special(backend: tokenizers.Tokenizer, tokens: Sequence[str]) -> None:
    # not normalized: found in the text as it stands, before blanks are replaced
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])


def _named_marks(path: str, file: Path) -> dict[str, str]:
    """`bos_token`, `eos_token`, `pad_token` as `tokenizer_config.json` names them; empty where there is none."""
    beside: Path | None = file.with_name("tokenizer_config.json")
    assert beside is not None
    if not beside.is_file():
        beside = download(path, beside.name) if not Path(path).expanduser().exists() else None
    if beside is None:
        return {}
    config = json.loads(beside.read_text(encoding="utf-8"))
    entries = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    contents = {name: e.get("content") if isinstance(e, dict) else e for name, e in entries.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}


@functools.lru_cache(maxsize=4)
def _load_llama(tokenizer: LlamaTokenizer, state: tuple[int, int]) -> LoadedTokenizer:
    """Shared by all of one description in a process: nobody changes what is loaded."""
    return tokenizer.read(state)


@functools.lru_cache(maxsize=4)
def _sentencepiece_model(file: Path, state: tuple[int, int]) -> tuple[Any, dict[str, int], list[tuple[str, str]]]:
    """The parsed model, its vocabulary and its merges; read once in a process, as long as the file stays as it is.

    Args:
        state: when it was written, and its size.
    """
    proto = _sentencepiece_proto(file)
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    merges: list[tuple[str, str]] = []
    # SentencePiece joins the pair whose result scores best; rank merges the same way
    normal = (piece for piece in proto.pieces if piece.type == proto.SentencePiece.NORMAL)
    for piece in sorted(normal, key=lambda piece: -piece.score):
        word = piece.piece
        pairs = [(word[:i], word[i:]) for i in range(1, len(word))]
        known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return proto, vocab, merges


def _sentencepiece_proto(file: Path):
    """The parsed model.

    Raises:
        UserError: not a SentencePiece BPE model, or one that rewrites its text (then the ids would not be exact).
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise UserError(f"{file} is not a SentencePiece model ({error})") from error
    if not proto.pieces or proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise UserError(f"{file} is not a SentencePiece BPE model; open its `tokenizer.json` with HubTokenizer")
    rules = proto.normalizer_spec
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces:
        raise UserError(f"{file} rewrites its text ({rules.name}), LLaMA's kind does not; use HubTokenizer")
    return proto
