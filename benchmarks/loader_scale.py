"""What a rank's loader does for a step, by the number of ranks: samples per second of one rank, the others simulated.

    python -m benchmarks.loader_scale [--worlds 1 8 64 512] [--samples 64] [--steps 4] [--passes 3] [--out FILE]

Rank 0 of each world runs as it runs in a training: it encodes its share of every step, is told the sizes of all
samples, deals the step, and encodes and decodes the samples of its own packs. What the other ranks would tell is put
together here, which costs time too, and the network is left out. Beside it the same rank where nobody tells it
anything: it encodes all of every step. JPEG files of scenes, four questions each, LLaVA-1.5's codec at 336 pixels; no
worker processes, so that all of the work is seen.
"""

import argparse
import pickle
import platform
import resource
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vlm  # noqa: F401  (before lightning)
import numpy as np
import torch

from benchmarks.data_speed import make_codec, write_data
from vlm.codec import Sizes
from vlm.data import BatchSpec, InstructionData, LlavaJson
from vlm.data.loading.rank_gather import Gather


MISSING = """
## What is missing

- A sample is encoded twice where there are several ranks; what this costs is the difference to one rank above.
- Packs travel from the workers one by one, so what is under way does not grow with the packs of a step; with
  `data.max_bad_samples` the ranks agree on a step first, and all of a rank's packs of it travel together.
- The peak is that of one process without workers. What each worker takes was not measured by the number of ranks.
"""


class Told(Gather):
    """Ranks whose samples are all of the sizes that one was measured to have.

    Args:
        steps: of the epoch.
        world: ranks.
        sizes: of every sample.
    """

    def __init__(self, steps: Sequence[Sequence[int]], world: int, sizes: Sizes) -> None:
        self.steps = iter(steps)
        self.world = world
        self.sizes = sizes
        super().__init__(self.tell)

    def tell(self, own: Any) -> list[Any]:
        digest, _, bad, error = own
        samples = np.asarray(next(self.steps)) % len(self.sizes.tokens)
        others = [
            (digest, at_places(self.sizes, samples[rank :: self.world]), bad, error) for rank in range(1, self.world)
        ]
        return [own, *pickle.loads(pickle.dumps(others))]  # they arrive in bytes


def at_places(sizes: Sizes, places: np.ndarray) -> Sizes:
    counts = {name: values[places] for name, values in sizes.counts.items()}
    return Sizes(sizes.tokens[places], sizes.images[places], counts)


def samples_per_second(files: Path, world: int, options: argparse.Namespace, *, told: bool) -> float:
    """Of rank 0, by the CPU's clock: all of its threads, whatever else the machine does."""
    source = LlavaJson(str(files), str(files.parent))
    each = options.samples
    data = InstructionData([source] * -(-world * each * options.steps // len(source)), batch=BatchSpec(world * each))
    made = make_codec(336)
    encoder = data._encoder(made)
    sizes = Sizes.of([encoder(draw, epoch=0) for draw in range(len(source))])
    gather = Told(data.steps(0, encoder=encoder), world, sizes) if told and world > 1 else None
    loader = data.train_loader(made, world=world, rank=0, gather=gather)
    packs = iter(loader)
    start = time.process_time()
    count = sum(len(next(packs).samples) for _ in range(options.steps))
    return count / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--samples", type=int, default=64, help="of a rank and step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/loader_scale.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[int, float] = dict.fromkeys(options.worlds, 0.0)
    alone: dict[int, float] = {}
    peaks: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = write_data(Path(folder), pictures=256, size=480)
        for number in range(options.passes):
            for world in options.worlds:  # in turns: what else the machine does falls on all of them
                found[world] = max(found[world], samples_per_second(files, world, options, told=True))
                if not number:
                    peaks[world] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                    print(f"world {world}: {found[world]:.0f} samples/s, peak {peaks[world]:.0f} MiB", flush=True)
        for world in (world for world in options.worlds if world <= 64):
            alone[world] = samples_per_second(files, world, options, told=False)
    rows = [(world, found[world], alone.get(world), peaks[world]) for world in options.worlds]
    first = rows[0][1]
    lines = [
        "# What a rank's loader does for a step",
        "",
        f"`python -m benchmarks.loader_scale`: {options.samples} samples of a rank in each step, on "
        f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}.",
        "The other ranks are simulated and tell what they would tell; the network is left out.",
        "Seconds are those of the CPU, of all threads of the rank: what else the machine does does not count.",
        f"The best of {options.passes} passes, in turns; in the fourth column every rank encodes all of the step,",
        "as a rank does that has nobody to ask.",
        "A rank that is told the others' sizes encodes each sample twice, once to measure it and once to read it. With",
        "many ranks what grows is the deal of the whole step, on a thread of the training process and not in its",
        "workers, and here also what it costs to put together what the others tell.",
        "",
        "| ranks | samples/s of one rank | of one rank alone | encodes everything, samples/s | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for world, found, alone, peak in rows:
        without = "" if alone is None else f"{alone:.0f}"
        lines.append(f"| {world} | {found:.0f} | {found / first:.2f} | {without} | {peak:.0f} |")
    options.out.write_text("\n".join(lines) + "\n" + MISSING)


if __name__ == "__main__":
    main()
