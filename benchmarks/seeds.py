"""Scores of several seeds, as a table."""

import statistics
from collections.abc import Mapping, Sequence


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: a line for each arm, its runs' mean (lowest to highest) in each of their columns.

    Args:
        found: {arm: {column: score} of each of its runs}.
    """
    columns = list(next(iter(found.values()))[0])
    lines = [f"| | seeds | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for name, runs in found.items():
        cells = [spread([run[column] for run in runs]) for column in columns]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], *, digits: int = 2) -> str:
    """The mean (lowest to highest)."""
    mean, least, most = (f"{value:.{digits}f}" for value in (statistics.fmean(values), min(values), max(values)))
    return f"{mean} ({least} to {most})"
