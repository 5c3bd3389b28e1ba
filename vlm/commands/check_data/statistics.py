"""What the numbers of a scan say: per source and over all."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm.commands.check_data.facts import KINDS, SCRIPTS
from vlm.commands.check_data.scan import Finding, Scan

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
NUM_BARS = 12


@dataclass(frozen=True)
class Copies:
    """Samples that are there more than once.

    Attributes:
        same_id: numbers of samples whose id another sample of the source has before them.
        same_content: numbers of samples whose text and images an earlier sample of the same part has.
        in_both: numbers of validation samples that are in the training too.
        original: {number: the first sample with its content}, for the last two.
    """

    same_id: np.ndarray
    same_content: np.ndarray
    in_both: np.ndarray
    original: dict[int, int]


@dataclass(frozen=True)
class Summary:
    """Statistics of a source, of a part, or of all.

    Attributes:
        part: `training`, `validation`, or `all`.
        source: its name, or `all`.
        numbers: see `describe`.
    """

    part: str
    source: str
    numbers: dict[str, Any]


def find_copies(scan: Scan) -> Copies:
    """Copies among the samples that can be used."""
    bad = np.zeros(len(scan.texts.tokens), dtype=bool)
    bad[[finding.sample for finding in scan.findings]] = True
    sources = scan.source_of
    ids = scan.texts.ids ^ (sources.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    same_id = np.flatnonzero(first[inverse] != np.arange(len(ids)))
    good = np.flatnonzero(~bad)
    _, first, inverse = np.unique(scan.content()[good], return_index=True, return_inverse=True)
    original = good[first[inverse]]
    later, original = good[good != original], original[good != original]
    training = len(scan.parts[0].indices) if scan.parts[0].name == "training" else 0
    crossing = (later >= training) & (original < training)
    return Copies(
        same_id=same_id,
        same_content=later[~crossing],
        in_both=later[crossing],
        original=dict(zip(later.tolist(), original.tolist(), strict=True)),
    )


def summaries(scan: Scan) -> list[Summary]:
    """Over all, then per source."""
    sources = scan.source_of
    kinds: dict[int, list[str]] = {}
    for finding in scan.findings:
        kinds.setdefault(finding.sample, []).append(finding.kind)
    everything = Summary("all", "all", describe(scan, np.ones(len(sources), dtype=bool), kinds))
    names = scan.source_names
    return [everything] + [
        Summary(part, source, describe(scan, sources == number, kinds)) for number, (part, source) in enumerate(names)
    ]


def describe(scan: Scan, chosen: np.ndarray, kinds: dict[int, list[str]]) -> dict[str, Any]:
    """Statistics of the chosen samples (bool[n]); of tokens and images those of samples that can be encoded."""
    texts = scan.texts
    wrong = [kind for number, found in kinds.items() if chosen[number] for kind in dict.fromkeys(found)]
    read = chosen & (texts.text != 0)
    encoded = chosen & (texts.tokens > 0)
    tokens, labels, visual = texts.tokens[encoded], texts.labels[encoded], texts.visual[encoded]
    images = texts.pictures[read]
    uses = np.repeat(read, np.diff(scan.first))
    pictures = np.unique(scan.shown[uses])
    pictures = pictures[scan.pictures.width[pictures] > 0]
    width, height = scan.pictures.width[pictures], scan.pictures.height[pictures]
    scripts = np.bincount(texts.scripts[read], minlength=len(SCRIPTS))
    count = max(len(images), 1)
    most = int(images.max(initial=0))
    return {
        "samples": int(chosen.sum()),
        "bad": len([number for number in kinds if chosen[number]]),
        "bad by kind": {kind: wrong.count(kind) for kind in KINDS if kind in wrong},
        "tokens": _spread(tokens),
        "labels": _spread(labels),
        "trained share": float(labels.sum() / tokens.sum()) if len(tokens) else 0.0,
        "visual tokens": _spread(visual),
        "text only": float((images == 0).sum() / count),
        "images per sample": {str(n): int((images == n).sum()) for n in range(min(most, 8) + 1)}
        | ({"more": int((images > 8).sum())} if most > 8 else {}),
        "scripts": {name: float(n / count) for name, n in zip(SCRIPTS, scripts.tolist(), strict=True)},
        "pictures": {
            "different": len(pictures),
            "width": _spread(width),
            "height": _spread(height),
            "megapixels": float((width.astype(np.int64) * height).mean() / 1e6) if len(pictures) else 0.0,
        },
        "histogram": histogram(tokens),
    }


def histogram(values: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, to, how many) of whole numbers in `NUM_BARS` bars of a width that is easily read."""
    if not len(values):
        return []
    low, high = int(values.min()), int(values.max())
    rough = max(1, (high - low + 1) / NUM_BARS)
    step = next(
        step for power in range(10) for factor in (1, 2, 5) if (step := factor * 10**power) >= rough
    )  # 1, 2, 5, 10, ...
    start = low // step * step
    counts = np.bincount((values - start) // step)
    return [(start + at * step, start + (at + 1) * step - 1, int(count)) for at, count in enumerate(counts)]


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    named = {f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}
    ends = {"min": float(values.min()), "max": float(values.max())}
    return {"mean": float(values.mean()), "sum": float(values.sum()), **ends, **named}


def bad_samples(findings: list[Finding]) -> dict[int, list[Finding]]:
    """{sample: what is wrong with it}, in order."""
    found: dict[int, list[Finding]] = {}
    for finding in findings:
        found.setdefault(finding.sample, []).append(finding)
    return found
