"""T5's tokenizer: a SentencePiece unigram model with sentinels behind it."""

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

_BLANK = "▁"  # how SentencePiece writes a space


@dataclass(frozen=True)
class T5Tokenizer(Tokenizer):
    """`spiece.model` of T5 and FlanT5 with the ids of the published tokenizer: white space is one blank.

    Texts have no start token; the decoder starts with `<pad>`.

    Args:
        path: folder that holds `spiece.model`, the file itself, or a Hugging Face repository.
        added_tokens: special tokens that take new ids, in this order.
        num_sentinels: tokens `<extra_id_99>` to `<extra_id_0>` behind those of the model.
    """

    path: str
    _: KW_ONLY
    add_bos: bool = False
    added_tokens: Sequence[str] = ()
    pad_token: str | None = "<pad>"
    num_sentinels: int = 100

    @cached_property
    def _file(self) -> Path:
        return find_file(self.path, "spiece.model", "a folder with a SentencePiece `spiece.model`")

    def _open(self) -> LoadedTokenizer:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        try:
            proto.ParseFromString(self._file.read_bytes())
        except DecodeError as error:
            raise UserError(f"{self._file} is not a SentencePiece model ({error})") from error
        if not proto.pieces or proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
            raise UserError(f"{self._file} is not a SentencePiece unigram model, which T5's is; give T5's own file")
        sentinels = [f"<extra_id_{number}>" for number in reversed(range(self.num_sentinels))]
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        known = {piece for piece, _ in pieces}
        pieces += [(mark, 0.0) for mark in sentinels if mark not in known]
        backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=False))
        if charsmap := proto.normalizer_spec.precompiled_charsmap:
            backend.normalizer = normalizers.Precompiled(charsmap)
        blanks = pre_tokenizers.Metaspace(replacement=_BLANK, prepend_scheme="always", split=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), blanks])
        backend.decoder = decoders.Metaspace(replacement=_BLANK, prepend_scheme="always", split=True)
        unknown, end = (proto.pieces[i].piece for i in (proto.trainer_spec.unk_id, proto.trainer_spec.eos_id))
        pad = self.pad_token or "<pad>"
        add_special(backend, [pad, end, unknown, *sentinels, *self.added_tokens])
        return LoadedTokenizer(backend, None, end, pad)

    def save(self, folder: str | Path) -> None:
        """As every tokenizer; what opens the files ends each text with the end token, as T5's own does."""
        super().save(folder)
        target, end = Path(folder), self._opened.eos
        backend = tokenizers.Tokenizer.from_file(str(target / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, self.eos_id)]
        )
        backend.save(str(target / "tokenizer.json"))
        if (target / "spiece.model").resolve() != self._file.resolve():
            shutil.copyfile(self._file, target / "spiece.model")
