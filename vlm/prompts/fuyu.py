"""Fuyu-8B's text: a question behind its image, and places as tokens of their own.

What follows is `processing_fuyu.py` of transformers 4.35; later versions compute the text of places and drop it.
"""

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from vlm.errors import UserError
from vlm.prompts.regions import REGION_FORMS
from vlm.prompts.spans import ImageMark, Span, TextSpan
from vlm.prompts.template import Form, Template
from vlm.prompts.tokenizer import HubTokenizer, LoadedTokenizer, add_special
from vlm.sample import Message

BOS, ANSWER, END = "<s>", "<0x04>", "|ENDOFTEXT|"
SPEAKER, NEWLINE = "|SPEAKER|", "|NEWLINE|"
"""Tokens in the place of a patch, and behind each row of patches."""
_MARKS = {"box": ("<0x00>", "<0x01>"), "point": ("<0x02>", "<0x03>")}
_SPECIAL = (BOS, ANSWER, END, *(mark for pair in _MARKS.values() for mark in pair))
_PLACE = re.compile(r"<(box|point)>(\d+(?:, \d+)+)</\1>")
_NUMBER = re.compile(r"\d+")
_CONTROL = re.compile(r"[\x00-\x04]")  # the vocabulary names their bytes <0x00> to <0x04>


@dataclass(frozen=True)
class FuyuTokenizer(HubTokenizer):
    """The published `tokenizer.json`, with places as tokens.

    `<box>388, 428, 404, 488</box>` is the token `<0x00>`, one for each whole number and `<0x01>`; `<point>` has
    `<0x02>` and `<0x03>`. Text beside a place is tokenized as a text of its own.

    Args:
        path: folder that holds `tokenizer.json`, the file itself, or a Hugging Face repository.
        added_tokens: special tokens; those the file does not know take new ids, in this order.
        pad_token: default the end of text.
        eos_token: of an answer.
    """

    path: str
    _: KW_ONLY
    eos_token: str | None = END

    def _open(self) -> LoadedTokenizer:
        opened = super()._open()
        known = opened.backend.get_vocab(with_added_tokens=True)
        if missing := [token for token in (*_SPECIAL, SPEAKER, NEWLINE) if token not in known]:
            raise UserError(f"tokenizer {self.path}: has no token {missing[0]!r}; is it Fuyu's?")
        add_special(opened.backend, _SPECIAL)
        return opened._replace(pad=opened.pad or END)

    def save(self, folder: str | Path) -> None:
        """The file as it is, which `FuyuProcessor` reads in its own way."""
        super().save(folder)
        if not self.added_tokens:
            shutil.copyfile(self._file, Path(folder) / "tokenizer.json")

    def encode(self, text: str, *, literal: Sequence[tuple[int, int]] = ()) -> tuple[list[int], list[tuple[int, int]]]:
        if control := _CONTROL.search(text):
            raise UserError(f"text holds the character {control[0]!a}, whose byte is a mark of Fuyu's; remove it")
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        end = 0

        def add(token: str, start: int, stop: int) -> None:
            ids.append(self.token_id(token))
            spans.append((start, stop))

        def add_text(start: int, stop: int) -> None:
            inside = [(max(a, start) - start, min(b, stop) - start) for a, b in literal if a < stop and start < b]
            found, places = super(FuyuTokenizer, self).encode(text[start:stop], literal=inside)
            ids.extend(found)
            spans.extend((start + a, start + b) for a, b in places)

        for place in _PLACE.finditer(text):
            add_text(end, place.start())
            opening, closing = _MARKS[place[1]]
            add(opening, place.start(), place.start(2))
            for number in _NUMBER.finditer(text, place.start(2), place.end(2)):
                if self._opened.backend.token_to_id(number[0]) is None:
                    raise UserError(f"tokenizer {self.path}: no token {number[0]!r} for a place {place[0]}")
                add(number[0], number.start(), number.end())
            add(closing, place.end(2), place.end())
            end = place.end()
        add_text(end, len(text))
        return ids, spans

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        marks = {self.token_id(opening): (kind, self.token_id(closing)) for kind, (opening, closing) in _MARKS.items()}
        ids, texts, start = list(ids), [], 0
        at = 0
        while at < len(ids):
            kind, closing = marks.get(ids[at], ("", -1))
            if not kind or closing not in ids[at:]:
                at += 1
                continue
            end = ids.index(closing, at)
            numbers = [super(FuyuTokenizer, self).decode([token]).strip() for token in ids[at + 1 : end]]
            texts += [
                super().decode(ids[start:at], skip_special=skip_special),
                f"<{kind}>{', '.join(numbers)}</{kind}>",
            ]
            at = start = end + 1
        return "".join([*texts, super().decode(ids[start:], skip_special=skip_special)])


@dataclass(frozen=True)
class FuyuTemplate(Template):
    """Pictures, the start of the text, the question, the mark of an answer, the answer.

    One image and one question is what is published; further images stand behind the first one, further turns behind
    the end of the answer before them.
    """

    def turns(self, messages: Sequence[Message], *, generate: bool = False) -> list[list[Span]]:
        opening, *written = super().turns(messages, generate=generate)
        system = [replace(span, apart=True) for span in opening if isinstance(span, TextSpan)]
        for at in range(0, len(written), 2):
            images = [span for span in written[at] if isinstance(span, ImageMark)]
            texts = [span for span in written[at] if isinstance(span, TextSpan)]
            if at == 0 and written[at]:
                texts = [TextSpan(BOS), *system, *texts]
            written[at] = [*images, *texts]
        return [[], *written]


TEMPLATES: dict[str, Template] = {
    "fuyu": FuyuTemplate(
        "fuyu",
        system="",
        training=Form(
            opening="{}\n",
            user=(TextSpan("{}" + ANSWER),),
            assistant=(TextSpan("{}" + END, trained=True),),
            place="listed",
        ),
        stop=(END, "</s>"),
        regions=REGION_FORMS["fuyu"],
    )
}
