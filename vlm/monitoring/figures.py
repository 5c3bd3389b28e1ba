"""What sums over steps and ranks say about speed."""

from collections.abc import Iterator, Mapping, Sequence

from vlm.planning.regions import Pass

PASSES: tuple[Pass, ...] = ("forward", "again", "backward")
_RATES = {"tokens": "tokens", "labels": "label_tokens", "images": "images", "steps": "steps"}


def names_of_sums(regions: Sequence[str]) -> list[str]:
    """What is summed, in the order in which ranks tell it each other::

    tokens, labels, images  of the packs
    steps                   of the optimizer, on each rank
    wall                    seconds, validation left out
    waited                  of them for the loader
    possible                floating-point operations at the measured peak
    time/<region>           seconds of the device
    flops/<region>/<pass>   floating-point operations
    """
    return [
        *("tokens", "labels", "images", "steps", "wall", "waited", "possible"),
        *(f"time/{region}" for region in regions),
        *(f"flops/{region}/{when}" for region in regions for when in PASSES),
    ]


def figures_of(sums: Mapping[str, float], *, world: int) -> dict[str, float]:
    """Figures as they are logged, of sums over `world` ranks that all took the same steps.

    `mfu/...` are shares of the measured peak: operations that the step needs, nothing counted twice for recomputation,
    over those that the device could have done meanwhile.
    """
    wall, seconds = sums["wall"], sums["wall"] / world
    found = {f"speed/{name}_per_s": sums[key] / seconds for key, name in _RATES.items()}
    found["speed/steps_per_s"] /= world
    found["speed/data_wait"] = sums["waited"] / wall
    for region in regions_in(sums):
        found[f"time/{region}"] = sums[f"time/{region}"] / wall
    if sums["possible"]:
        peak = sums["possible"] / wall  # of a rank
        needed = {region: needed_flops(sums, region) for region in regions_in(sums)}
        found["mfu/total"] = sum(needed.values()) / sums["possible"]
        for region, count in needed.items():
            if count and sums[f"time/{region}"]:
                found[f"mfu/{region}"] = count / (sums[f"time/{region}"] * peak)
    return found


def needed_flops(sums: Mapping[str, float], region: str) -> float:
    """Of forward and backward passes, without what ran again."""
    return sums[f"flops/{region}/forward"] + sums[f"flops/{region}/backward"]


def regions_in(sums: Mapping[str, float]) -> Iterator[str]:
    """Regions that took time."""
    return (name.removeprefix("time/") for name, value in sums.items() if name.startswith("time/") and value)
