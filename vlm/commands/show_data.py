"""`vlm show-data`: what exactly is trained on, as one page.

For each sample the views that the system gets of its images, with its regions drawn in, and the rendered text token
by token, those that are trained in colour.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.batch import Batch
from vlm.codec import Codec, Encoded, step_counts
from vlm.commands.check_data.facts import encode, sizes_of
from vlm.commands.check_data.parts import Part, parts_of
from vlm.commands.check_data.stage_view import StageParser
from vlm.drawing.html import chip, escape, figure, write_page
from vlm.drawing.panels import Piece, as_text, pieces_of, views_as_seen
from vlm.errors import SampleError, UserError
from vlm.geometry import Box, bounds, clipped
from vlm.options import OptionParser
from vlm.recipes.configs import add_stage_options, stage_options
from vlm.sample import RefPart, RegionPart, Sample

_WHOLE, _TILE, _DOT = 300, 140, 0.012
_MAX_LABEL = 24
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # shown by the names that vocabularies give to bytes


@dataclass(frozen=True)
class Picture:
    """One view.

    Attributes:
        image: as the network gets it, normalisation undone.
        caption: what it is.
        is_whole: the first view of its image; the others are tiles, or a second resolution.
        boxes: (label, box in shares of the view).
    """

    image: Image.Image
    caption: str
    is_whole: bool
    boxes: Sequence[tuple[str, Box]] = ()


@dataclass(frozen=True)
class RenderedSample:
    """A sample as it is trained in one epoch.

    Attributes:
        item: as tokens.
        pictures: as they are seen.
        rows: (name, tokens) of each sequence; none for a system without a tokenizer.
    """

    item: Encoded
    pictures: Sequence[Picture]
    rows: Sequence[tuple[str, Sequence[Piece]]]


def look_at(part: Part, index: int, *, epoch: int) -> RenderedSample:
    """A sample in an epoch, its choices and augmentation included.

    Raises:
        SampleError: it cannot be trained on.
    """
    encoder, codec = part.encoder, part.encoder.codec
    item = encode(encoder, index, epoch=epoch)
    batch = codec.collate([item], counts=step_counts([item]))
    sample = part.samples[index]
    if encoder.prepare is not None and item.seed is not None:
        sample = encoder.prepare(sample, encoder.seeds(index, epoch=epoch))
    tokenizer: Any = getattr(codec, "tokenizer", None)  # not every codec has one kind of token
    sequences = [("", s) for s in item.text] + [(name, s) for name, row in item.rows.items() for s in row]
    rows = (
        []
        if tokenizer is None
        else [(name, pieces_of(sequence, tokenizer.decode, max_pieces=None)) for name, sequence in sequences]
    )
    return RenderedSample(item, _pictures(sample, item, batch, codec), rows)


def _pictures(sample: Sample, item: Encoded, batch: Batch, codec: Codec) -> list[Picture]:
    found = []
    for at, (stream, views) in enumerate(views_as_seen(batch, codec).items()):
        sizes, owners = batch.views[stream].size, [owner for owner, _ in views]
        for number, (owner, image) in enumerate(views):
            is_whole = number == 0 or owners[number - 1] != owner
            width, height = sizes[owner]
            part = "" if is_whole else f", part {number - owners.index(owner)}"
            caption = f"{sample.images[owner].name} ({width} x {height}){part}, {image.width} x {image.height}"
            boxes = _boxes(sample, item, codec, image=owner, size=sizes[owner]) if is_whole and at == 0 else []
            name = f"{stream}: {caption}" if len(batch.views) > 1 else caption
            found.append(Picture(image, name, is_whole and at == 0, boxes))
    return found


def _boxes(sample: Sample, item: Encoded, codec: Codec, *, image: int, size: tuple[int, int]) -> list[tuple[str, Box]]:
    """Regions of an image, where they lie in its first view; those in the text where the sample has none as parts."""
    parts = [part for message in sample.messages for part in message.content]
    view = codec.view(*size, image=image, seed=item.seed)
    if not any(isinstance(part, RegionPart) for part in parts):
        texts = [as_text([message]) for message in item.sample.messages] if image == 0 else []
        return [("", view.in_view(box)) for text in texts for box in codec.find_boxes(text, size=view.size)]
    found: list[tuple[str, Box]] = []
    label = ""
    for part in parts:
        if isinstance(part, RefPart):
            label = part.text if len(part.text) <= _MAX_LABEL else f"{part.text[:_MAX_LABEL]}..."
        elif isinstance(part, RegionPart) and part.image == image:
            placement = view.shown or view.placement
            points = clipped(placement(part.shares(*size)))
            x0, y0, x1, y1 = bounds(points)
            dot = _DOT if part.kind == "point" else 0.0
            found.append((label, (x0 - dot, y0 - dot, x1 + dot, y1 + dot)))
    return found


# the page


def _card(part: Part, index: int, epochs: Sequence[int]) -> str:
    source, place = part.samples.place(index)
    try:
        sample = part.samples[index]
    except SampleError as error:
        return _head(error.sample_id, [f"{source} {place}"]) + f"<p class='reason'>{escape(error.reason)}</p></div>\n"
    facts = [f"{source} {place}", f"number {index}", *([f"task {sample.task}"] if sample.task else [])]
    made = [_head(sample.id, facts)]
    for epoch in epochs if part.encoder.training else (0,):
        if len(epochs) > 1 and part.encoder.training:
            made.append(f"<h3>epoch {epoch}</h3>")
        try:
            made.append(_shown(look_at(part, index, epoch=epoch)))
        except SampleError as error:
            made.append(f"<p class='reason'>{escape(error.reason)}</p>")
    return "".join([*made, "</div>\n"])


def _head(name: str, facts: Sequence[str]) -> str:
    said = "".join(f"<span class='faint small'>{escape(fact)}</span>" for fact in facts)
    return f"<div class='card'><div class='head'><b>{escape(name)}</b>{said}</div>"


def _shown(look: RenderedSample) -> str:
    tokens, labels, visual = sizes_of(look.item)
    counts = [f"{tokens:,} tokens", f"{labels:,} trained", f"{visual:,} for pictures"]
    figures = "".join(
        figure(picture.image, picture.caption, side=_WHOLE if picture.is_whole else _TILE, boxes=picture.boxes)
        for picture in look.pictures
    )
    rows = "".join(
        (f"<p class='faint small'>{escape(name)}</p>" if name else "") + tokens_as_html(pieces)
        for name, pieces in look.rows
    )
    pictures = f"<div class='pictures'>{figures}</div>" if figures else ""
    style = "look beside" if len(look.pictures) == 1 else "look"
    return f"<p>{' '.join(map(chip, counts))}</p><div class='{style}'>{pictures}<div>{rows}</div></div>"


def tokens_as_html(pieces: Sequence[Piece]) -> str:
    """Tokens in a row; the ids show where the pointer rests, white space and control characters have signs."""
    made = []
    for piece in pieces:
        style = "mark" if piece.is_mark else "trained" if piece.trained else ""
        title = f' title="{" ".join(map(str, piece.ids))}"' if piece.ids else ""
        named = _CONTROL.sub(lambda found: f"<0x{ord(found[0]):02X}>", piece.text)
        text = escape(named or "\u2205").replace("\t", "\u21e5")
        # the sign stands in the token, the break behind it
        breaks = "\n" * text.count("\n")
        made.append(f'<span class="{style}"{title}>{text.replace(chr(10), chr(0x21B5))}</span>{breaks}')
    return f"<div class='tokens'>{''.join(made)}</div>"


def _body(title: str, part: Part, chosen: Sequence[int], epochs: Sequence[int]) -> Iterator[str]:
    yield f"<h1>What is trained on</h1>\n<p class='faint'>{escape(title)}, {part.name}: "
    yield f"{len(chosen):,} of {len(part.samples):,} samples</p>\n"
    example = tokens_as_html([Piece("trained", trained=True), Piece("not trained"), Piece("tokens", is_mark=True)])
    yield f"<div class='legend'>{example}<span>\u21b5 newline, \u2205 a token without text; "
    yield "the ids of a token show under the pointer; pictures are as the network gets them</span></div>\n"
    for index in chosen:
        yield _card(part, index, epochs)


# the command


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        command="show-data",
        remedy="; `vlm show-data --help` lists the options",
        prog="vlm show-data",
        description="Writes a page with samples exactly as `vlm fit` with the same options trains on them: pictures as "
        "the system sees them, boxes, and the text token by token with the trained ones in colour.",
        epilog="All other options, -c FILE above all, are those of `vlm fit`.",
    )
    add_stage_options(parser)
    parser.add_argument("--num", type=int, default=20, help="how many samples, evenly over all; %(default)s")
    parser.add_argument("--index", type=int, action="append", default=[], help="this one, counted over all sources")
    parser.add_argument("--id", action="append", default=[], help="all samples of this id")
    parser.add_argument("--epoch", type=int, nargs="+", default=[0], help="epochs to show each in, from 0; %(default)s")
    parser.add_argument("--validation", action="store_true", help="of the validation instead of the training")
    parser.add_argument("--out", type=Path, help="the page; runs/show_data/SYSTEM_STAGE.html by default")
    return parser


def main(arguments: Sequence[str], *, describe: StageParser) -> int:
    """Writes the page.

    Args:
        describe: from options of `vlm fit` to a stage.
    """
    own, others = _parser().parse_known_args(list(arguments))
    if own.num < 1 or min(own.epoch) < 0:
        raise UserError(f"--num must be at least 1 and --epoch not negative, found {own.num} and {own.epoch}")
    stage = describe([*stage_options(own), *others])
    name = "validation" if own.validation else "training"
    part = next((part for part in parts_of(stage.data, stage.codec) if part.name == name), None)
    if part is None:
        raise UserError(f"data.{'val_' if own.validation else ''}sources is empty; there is nothing to show")
    chosen = _chosen(part, num=own.num, indices=own.index, ids=own.id)
    title = f"{stage.system} {stage.stage}"
    out = own.out or Path("runs") / "show_data" / f"{stage.system}_{stage.stage}.html"
    write_page(out, title=f"What is trained on: {title}", body=_body(title, part, chosen, own.epoch))
    print(f"{out}: {len(chosen):,} samples")
    return 0


def _chosen(part: Part, *, num: int, indices: Sequence[int], ids: Sequence[str]) -> list[int]:
    total = len(part.samples)
    for index in indices:
        if not 0 <= index < total:
            raise UserError(f"--index {index}: the {part.name} has {total:,} samples, counted from 0")
    found = {name: [index for index in range(total) if _id_of(part, index) == name] for name in dict.fromkeys(ids)}
    for name, places in found.items():
        if not places:
            raise UserError(f"--id {name}: no sample of the {part.name} has this id")
    chosen = [*indices, *(index for places in found.values() for index in places)]
    return list(dict.fromkeys(chosen)) or [total * place // min(num, total) for place in range(min(num, total))]


def _id_of(part: Part, index: int) -> str:
    try:
        return part.samples[index].id
    except SampleError as error:
        return error.sample_id
