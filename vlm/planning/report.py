"""A plan for people, and as JSON."""

from collections.abc import Sequence
from typing import Any

from vlm.planning.machine import CONTEXT, GIB, SLACK
from vlm.planning.stage import StagePlan


def lines_of(plan: StagePlan, *, per_second: float | None, utilization: float) -> list[str]:
    """The plan of one stage.

    Args:
        per_second: floating-point operations that a GPU can do; None: no hours.
    """
    return [
        plan.name,
        *_tokens(plan),
        *_parameters(plan),
        *_flops(plan),
        *_memory(plan),
        *_disk(plan),
        *_time(plan, per_second, utilization),
        *(f"  note       {note}" for note in plan.notes),
    ]


def _tokens(plan: StagePlan) -> list[str]:
    samples = plan.samples
    count = len(samples.items)
    tokens, labels, of_images = sum(samples.tokens), sum(samples.labels), sum(samples.image_tokens)
    each = f", {of_images / samples.images:,.0f} tokens an image" if samples.images else ""
    lines = [
        f"  samples    {samples.origin}",
        f"  tokens     {tokens / count:,.0f} a sample, {labels / count:,.0f} of them trained{each}, "
        f"longest {max(*samples.tokens, samples.longest):,}",
    ]
    pack = plan.packing
    steps = "steps not known" if plan.steps is None else f"{plan.steps:,} steps"
    lines.append(
        f"  batch      {plan.batch:,.0f} samples, {plan.machine.devices} x {pack.accumulate} packs of "
        f"{pack.samples:,.1f}, heaviest {pack.tokens:,} tokens; {steps}"
    )
    return lines


def _parameters(plan: StagePlan) -> list[str]:
    lines = []
    for number, (part, size) in enumerate(plan.parts.items()):
        head = "parameters" if number == 0 else ""
        lines.append(f"  {head:<10} {part:<12} {size.trained:>15,} trained {size.frozen:>15,} frozen")
    trained, frozen = (sum(getattr(size, kind) for size in plan.parts.values()) for kind in ("trained", "frozen"))
    return [*lines, f"  {'':<10} {'all':<12} {trained:>15,} trained {frozen:>15,} frozen"]


def _flops(plan: StagePlan) -> list[str]:
    regions = dict.fromkeys(region for region, _ in plan.flops)
    lines = []
    for number, region in enumerate(regions):
        parts = [
            f"{name} {plan.flops[region, key] / 1e12:,.3f}" for key, name in _PASSES if (region, key) in plan.flops
        ]
        head = "TFLOP" if number == 0 else ""
        lines.append(f"  {head:<10} {region:<12} {', '.join(parts)}")
    total = plan.flops_per_sample
    return [
        *lines,
        f"  {'':<10} {'all':<12} {total / 1e12:,.3f} a sample, {total * plan.batch / 1e15:,.3f} PFLOP a step",
    ]


_PASSES = (("forward", "forward"), ("again", "recomputed"), ("backward", "backward"))


def _memory(plan: StagePlan) -> list[str]:
    entries = [*plan.memory.fixed.items(), *plan.memory.pack.items()]
    lines = [
        f"  {'GiB a rank' if number == 0 else '':<10} {what:<30} {size / GIB:>8.2f}"
        for number, (what, size) in enumerate(sorted(entries, key=lambda entry: -entry[1]))
        if size >= GIB / 100
    ]
    total, gpu = plan.memory.total, plan.machine.gpu
    verdict = "fits" if plan.fits else "does not fit"
    if plan.memory.host:
        lines.append(f"  {'':<10} {'weights, states on the host':<30} {sum(plan.memory.host.values()) / GIB:>8.2f}")
    return [
        *lines,
        f"  {'':<10} {'all':<30} {total / GIB:>8.2f}   {verdict} {gpu.name}: {plan.machine.usable / GIB:.1f} GiB for "
        f"tensors ({CONTEXT / GIB:.1f} GiB are CUDA's own, {SLACK:.0%} lost between tensors)",
    ]


def _disk(plan: StagePlan) -> list[str]:
    saved = ", ".join(f"{what} {size / 1e9:,.2f} GB" for what, size in plan.save.items())
    lines = [f"  disk       {saved}"]
    for download in plan.downloads:
        where = "here" if download.is_here else "to download, about"
        lines.append(f"  weights    {download.part}: {download.path}, {where} {download.size / 1e9:,.2f} GB")
    return lines


def _time(plan: StagePlan, per_second: float | None, utilization: float) -> list[str]:
    if per_second is None:
        return ["  hours      give --flops, what a GPU of yours can do in a second"]
    hours = plan.hours(per_second=per_second, utilization=utilization)
    if hours is None:
        return ["  hours      the number of samples is not known"]
    return [
        f"  hours      {hours:,.1f} on {plan.machine.devices} x {plan.machine.gpu.name}, if {utilization:.0%} of "
        f"{per_second / 1e12:,.0f} TFLOP/s are reached"
    ]


def as_json(plan: StagePlan, *, per_second: float | None, utilization: float) -> dict[str, Any]:
    """The same for machines: numbers, bytes and floating-point operations."""
    samples = plan.samples
    count = len(samples.items)
    return {
        "stage": plan.name,
        "fits": plan.fits,
        "samples": {
            "origin": samples.origin,
            "measured": samples.measured,
            "looked_at": count,
            "epoch": samples.draws,
            "tokens": sum(samples.tokens) / count,
            "trained_tokens": sum(samples.labels) / count,
            "image_tokens": sum(samples.image_tokens) / count,
            "images": samples.images / count,
        },
        "batch": {
            "samples": plan.batch,
            "samples_of_a_pack": plan.packing.samples,
            "tokens_of_the_heaviest_pack": plan.packing.tokens,
            "micro_batches": plan.packing.accumulate,
            "steps": plan.steps,
        },
        "parameters": {part: {"trained": s.trained, "frozen": s.frozen} for part, s in plan.parts.items()},
        "flops_per_sample": {f"{region}/{when}": number for (region, when), number in plan.flops.items()},
        "memory": {**plan.memory.fixed, **plan.memory.pack, "all": plan.memory.total, "usable": plan.machine.usable},
        "host memory": dict(plan.memory.host),
        "disk": dict(plan.save),
        "downloads": [{"part": d.part, "path": d.path, "bytes": d.size, "here": d.is_here} for d in plan.downloads],
        "hours": None if per_second is None else plan.hours(per_second=per_second, utilization=utilization),
        "assumed": {"flops_per_second": per_second, "utilization": utilization, "devices": plan.machine.devices},
        "notes": list(plan.notes),
    }


def table_of(plans: Sequence[StagePlan], *, per_second: float | None, utilization: float) -> list[str]:
    """A line for each of several stages."""
    header = ("stage", "tokens", "steps", "trained", "GiB", "fits", "PFLOP a step", "hours")
    rows = []
    for plan in plans:
        hours = None if per_second is None else plan.hours(per_second=per_second, utilization=utilization)
        rows.append(
            (
                plan.name,
                f"{sum(plan.samples.tokens) / len(plan.samples.items):,.0f}",
                "?" if plan.steps is None else f"{plan.steps:,}",
                f"{sum(size.trained for size in plan.parts.values()):,}",
                f"{plan.memory.total / GIB:,.1f}",
                "yes" if plan.fits else "no",
                f"{plan.flops_per_sample * plan.batch / 1e15:,.2f}",
                "?" if hours is None else f"{hours:,.1f}",
            )
        )
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in (header, *rows))
    ]
