"""The report of a check as one page, with images of what is wrong and of what is unusual."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vlm.commands.check_data.facts import KINDS
from vlm.commands.check_data.report import Report, counted, table_of
from vlm.commands.check_data.scan import Scan
from vlm.drawing.html import bars, broken, chip, escape, figure, table, tiles, write_page
from vlm.errors import SampleError
from vlm.sample import RefPart, RegionPart, Sample, TextPart

_MAX_CARDS = 12
_MAX_EXTREMES = 6
_MAX_PICTURES = 4
_MAX_TEXT = 700
_MAX_REASON = 600
_SIDE = 150


def write_report(path: Path, report: Report) -> None:
    write_page(path, title=f"Check of the data: {report.title}", body=_body(report))


def _body(report: Report) -> Iterator[str]:
    scan, everything = report.scan, report.summaries[0].numbers
    total, bad = everything["samples"], everything["bad"]
    yield f"<h1>Check of the data</h1>\n<p class='faint'>{escape(report.title)}</p>\n"
    verdict = f"{bad:,} of {total:,} samples are bad" if bad else f"all {total:,} samples can be trained on"
    yield f"<p>{chip(verdict, kind='bad' if bad else 'good')}"
    yield "".join(f" {chip(f'{counted(len(numbers))} {what}')}" for what, numbers in report.notes) + "</p>\n"
    tokens, pictures = everything["tokens"], everything["pictures"]
    if tokens:
        yield tiles(
            [
                (f"{total:,}", "samples"),
                (f"{tokens['sum']:,.0f}", "tokens"),
                (f"{tokens['mean']:,.0f}", "tokens a sample"),
                (f"{everything['visual tokens']['mean']:,.0f}", "of them for pictures"),
                (f"{everything['trained share']:.1%}", "of the tokens trained"),
                (f"{pictures['different']:,}", "different pictures"),
                (f"{everything['text only']:.1%}", "without a picture"),
            ]
        )
    yield "<h2>Sources</h2>\n" + table(*table_of(report.summaries))
    if everything["histogram"]:
        spread = ", ".join(f"{name} {tokens[name]:,.0f}" for name in ("p1", "p5", "p50", "p95", "p99", "max"))
        yield f"<h2>Tokens of a sample</h2>\n<p class='faint small'>{spread}</p>\n"
        yield bars([(f"{start:,} to {end:,}", count) for start, end, count in everything["histogram"]])
    if any(count != "1" for count in everything["images per sample"]):
        yield "<h2>Pictures of a sample</h2>\n"
        yield bars(list(everything["images per sample"].items()))
    yield from _bad(report)
    for what, numbers in report.notes:
        yield f"<h2>{counted(len(numbers))} {escape(what)}</h2>\n<div class='cards'>"
        for number in numbers[:_MAX_EXTREMES]:
            original = report.copies.original.get(number)
            note = "" if original is None else f"as {' '.join(map(str, scan.place(original)))}"
            yield _card(scan, number, note)
        yield "</div>\n"
    for what, found in _extremes(scan):
        yield f"<h2>{escape(what)}</h2>\n<div class='cards'>"
        for number, note in found:
            yield _card(scan, number, note)
        yield "</div>\n"


def _bad(report: Report) -> Iterator[str]:
    if report.bad:
        yield (
            "<h2>What is wrong</h2>\n<p class='faint'>All of them are in <code>quarantine.jsonl</code>; "
            "<code>data.init_args.quarantine</code> leaves them out of a training.</p>\n"
        )
    for kind, count in report.summaries[0].numbers["bad by kind"].items():
        found = [finding for finding in report.findings if finding.kind == kind]
        shown = found[:_MAX_CARDS]
        more = f" <span class='faint'>(the first {len(shown)})</span>" if count > len(shown) else ""
        yield f"<h3>{count:,} &times; {escape(KINDS[kind])}{more}</h3>\n<div class='cards'>"
        for finding in shown:
            yield _card(report.scan, finding.sample, finding.reason, is_bad=True, name=finding.id)
        yield "</div>\n"


def _extremes(scan: Scan) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Samples that are right and yet worth a look."""
    texts = scan.texts
    good = np.flatnonzero(texts.tokens > 0)
    if not len(good):
        return
    longest = good[np.argsort(-texts.tokens[good], kind="stable")][:_MAX_EXTREMES].tolist()
    yield "The longest", [(n, f"{texts.tokens[n]:,} tokens, {texts.labels[n]:,} of them trained") for n in longest]
    width, height = scan.pictures.width.astype(np.float64), scan.pictures.height.astype(np.float64)
    there = np.flatnonzero(width > 0)
    if not len(there):
        return
    size, ratio = (
        width[there] * height[there],
        np.maximum(width[there], height[there]) / np.minimum(width[there], height[there]),
    )
    for what, order in (
        ("The smallest pictures", size),
        ("The largest pictures", -size),
        ("The most elongated pictures", -ratio),
    ):
        chosen = there[np.argsort(order, kind="stable")][:_MAX_EXTREMES]
        first = np.array([np.flatnonzero(scan.shown == picture)[0] for picture in chosen])
        owners = np.searchsorted(scan.first, first, side="right") - 1
        notes = [f"{width[p]:.0f} x {height[p]:.0f} pixels" for p in chosen]
        yield what, list(zip(owners.tolist(), notes, strict=True))


def _card(scan: Scan, number: int, note: str, *, is_bad: bool = False, name: str | None = None) -> str:
    source, index = scan.place(number)
    try:
        sample: Sample | None = scan.sample(number)
    except SampleError as error:
        sample, name = None, error.sample_id
    identity = name if sample is None else sample.id
    head = f"<div class='head'><b>{escape(identity)}</b><span class='faint small'>{escape(source)} {index}</span></div>"
    style = "reason" if is_bad else "faint"
    said = f"<div class='{style} small'>{escape(_shortened(note, _MAX_REASON))}</div>" if note else ""
    if sample is None:
        return f"<div class='card'>{head}{said}</div>\n"
    pictures = "".join(_picture(sample, place) for place in range(min(len(sample.images), _MAX_PICTURES)))
    if len(sample.images) > _MAX_PICTURES:
        pictures += f"<p class='faint small'>and {len(sample.images) - _MAX_PICTURES} more</p>"
    shown = f"<div class='pictures'>{pictures}</div>" if pictures else ""
    text = escape(_shortened(_text(sample), _MAX_TEXT))
    return f"<div class='card'>{head}{said}{shown}<div class='text'>{text}</div></div>\n"


def _picture(sample: Sample, place: int) -> str:
    file = sample.images[place]
    try:
        image = file.read(sample)
    except SampleError:
        return broken(file.name)
    boxes = []
    for part in (part for message in sample.messages for part in message.content):
        if isinstance(part, RegionPart) and part.kind == "box" and part.image == place:
            (x0, y0), (x1, y1) = part.shares(*image.size)
            boxes.append(("", (x0, y0, x1, y1)))
    return figure(image, f"{file.name}, {image.width} x {image.height}", side=_SIDE, boxes=boxes)


def _text(sample: Sample) -> str:
    """Its messages with every part that is no text in angle brackets."""
    lines = []
    for message in sample.messages:
        parts = []
        for part in message.content:
            if isinstance(part, TextPart | RefPart):
                parts.append(part.text)
            elif isinstance(part, RegionPart):
                points = ", ".join(f"{value:g}" for point in part.points for value in point)
                parts.append(f"<{part.kind} {points}>")
            else:
                parts.append("<image>")
        lines.append(f"{message.role}: {''.join(parts)}")
    return "\n".join(lines)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} ... ({len(text):,} characters)"
