"""The report of a check: as numbers, and as a table in the terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlm.commands.check_data.facts import KINDS
from vlm.commands.check_data.scan import Finding, Scan
from vlm.commands.check_data.statistics import Copies, Summary, bad_samples, find_copies, summaries
from vlm.data.wrappers.quarantine import BadSample

_BAR = 40
_MAX_EXAMPLES = 3
_MAX_LINE = 200


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        title: system and stage.
        scan: the numbers of every sample.
        copies: samples that are there more than once.
        findings: what is wrong, in the order of the samples.
        summaries: over all, then per source.
        bad: {number of the sample: what is wrong with it}.
    """

    title: str
    scan: Scan
    copies: Copies
    findings: list[Finding]
    summaries: list[Summary]
    bad: dict[int, list[Finding]] = field(default_factory=dict)

    @classmethod
    def of(cls, scan: Scan, *, title: str, refuse_copies: bool = False) -> "Report":
        """The report on a scan.

        Args:
            refuse_copies: a sample whose content an earlier one has is bad.
        """
        copies = find_copies(scan)
        if refuse_copies:
            for number, original in copies.original.items():
                source, index = scan.place(original)
                reason = f"a copy of sample {scan.id_of(original)!r} (number {index} of {source})"
                scan.findings.append(Finding(number, scan.id_of(number), "copy", reason))
            scan.findings.sort(key=lambda finding: finding.sample)
        return cls(title, scan, copies, scan.findings, summaries(scan), bad_samples(scan.findings))

    def quarantine(self) -> list[BadSample]:
        """The bad samples; one that two parts have in common is named once."""
        found: dict[tuple[str, int, str], BadSample] = {}
        for number, findings in self.bad.items():
            source, index = self.scan.place(number)
            reason = "; ".join(dict.fromkeys(finding.reason for finding in findings))
            found.setdefault((source, index, findings[0].id), BadSample(source, findings[0].id, index, reason))
        return list(found.values())

    @property
    def notes(self) -> list[tuple[str, list[int]]]:
        """What is no error but good to know, and the samples it is said of."""
        copies = self.copies
        found = {
            "with the id of an earlier sample": copies.same_id,
            "with the text and pictures of an earlier sample": copies.same_content,
            "that do not fit into the limit of tokens and are cut": np.flatnonzero(self.scan.texts.cut),
            "of the validation that the training has, too": copies.in_both,
        }
        return [(what, numbers.tolist()) for what, numbers in found.items() if len(numbers)]

    @property
    def left_out(self) -> list[str]:
        """What of the files is in no sample."""
        return [note for part in self.scan.parts for note in part.samples.notes()]

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "samples": len(self.scan.texts.tokens),
            "bad": len(self.bad),
            "notes": {
                what: {"samples": len(numbers), "first": [self.scan.id_of(number) for number in numbers[:10]]}
                for what, numbers in self.notes
            },
            "left out": self.left_out,
            "summaries": [{"part": s.part, "source": s.source, **s.numbers} for s in self.summaries],
        }

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        yield f"{self.title}: {len(self.scan.texts.tokens):,} samples"
        yield ""
        yield from columns(*table_of(self.summaries))
        histogram = self.summaries[0].numbers["histogram"]
        if histogram:
            yield ""
            tokens = self.summaries[0].numbers["tokens"]
            spread = ", ".join(f"{name} {tokens[name]:,.0f}" for name in ("p1", "p5", "p50", "p95", "p99", "max"))
            yield f"tokens of a sample: {spread}"
            most = max(count for _, _, count in histogram)
            width = len(f"{histogram[-1][1]:,}")
            for start, end, count in histogram:
                bar = "#" * max(round(_BAR * count / most), 1 if count else 0)
                yield f"  {start:>{width},} to {end:>{width},}  {bar:<{_BAR}} {count:,}".rstrip()
        yield ""
        for kind, count in self.summaries[0].numbers["bad by kind"].items():
            yield f"bad: {count:,} {KINDS[kind]}"
            examples = [finding for finding in self.findings if finding.kind == kind][:_MAX_EXAMPLES]
            for finding in examples:
                source, index = self.scan.place(finding.sample)
                yield _cut(f"  {source} {index}, {finding.id!r}: {finding.reason}")
            if count > len(examples):
                yield f"  and {count - len(examples):,} more"
        for what, numbers in self.notes:
            ids = [repr(self.scan.id_of(number)) for number in numbers[:_MAX_EXAMPLES]]
            more = ["..."] if len(numbers) > len(ids) else []
            yield _cut(f"note: {counted(len(numbers))} {what} ({', '.join(ids + more)})")
        for note in self.left_out:
            yield f"note: {note}"
        if not self.bad:
            yield "nothing is wrong with any of them"


HEAD = (
    "source",
    "samples",
    "bad",
    "text only",
    "pictures",
    "median size",
    "tokens mean",
    "p95",
    "max",
    "visual",
    "trained",
    "script",
)


def table_of(found: Sequence[Summary]) -> tuple[Sequence[str], list[list[str]]]:
    """Head and rows: a source each, and all of them where there are several."""
    rows = []
    for summary in found if len(found) > 2 else found[1:]:
        n = summary.numbers
        tokens, pictures = n["tokens"], n["pictures"]
        size = ""
        if pictures["different"]:
            size = f"{pictures['width']['p50']:.0f}x{pictures['height']['p50']:.0f}"
        scripts = {name: share for name, share in n["scripts"].items() if share >= 0.005}
        name = summary.source if summary.part in ("all", "training") else f"{summary.source} (validation)"
        rows.append(
            [
                name,
                f"{n['samples']:,}",
                f"{n['bad']:,}",
                f"{n['text only']:.0%}",
                f"{pictures['different']:,}",
                size,
                f"{tokens['mean']:,.0f}" if tokens else "",
                f"{tokens['p95']:,.0f}" if tokens else "",
                f"{tokens['max']:,.0f}" if tokens else "",
                f"{n['visual tokens']['mean']:,.0f}" if tokens else "",
                f"{n['trained share']:.0%}",
                ", ".join(f"{name} {share:.0%}" for name, share in sorted(scripts.items(), key=lambda item: -item[1])),
            ]
        )
    return HEAD, rows


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table: names at the left, numbers at the right."""
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    for row in [head, *rows]:
        cells = [
            cell.ljust(width) if at in (0, len(head) - 1) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def counted(number: int) -> str:
    return f"{number:,} sample{'' if number == 1 else 's'}"


def _cut(line: str) -> str:
    return line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE - 4]} ..."
