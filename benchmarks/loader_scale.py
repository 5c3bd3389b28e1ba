"""What a rank's loader does for a step, by the number of ranks: samples per second of one rank, the others simulated.

    python -m benchmarks.loader_scale [--worlds 1 8 64 512] [--samples 64] [--steps 4] [--out docs/loader_scale.md]

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
    parser.add_argument("--out", type=Path, default=Path("docs/loader_scale.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_data(Path(folder), pictures=256, size=480)
        for world in options.worlds:
            found = samples_per_second(files, world, options, told=True)
            alone = samples_per_second(files, world, options, told=False) if world <= 64 else None
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            rows.append((world, found, alone, peak))
            print(
                f"world {world}: {found:.0f} samples/s, alone {alone or float('nan'):.0f}, peak {peak:.0f} MiB",
                flush=True,
            )
    first = rows[0][1]
    lines = [
        "# What a rank's loader does for a step",
        "",
        f"`python -m benchmarks.loader_scale`: {options.samples} samples of a rank in each step, on "
        f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}.",
        "The other ranks are simulated and tell what they would tell; the network is left out.",
        "In the fourth column every rank encodes all of the step, as a rank does that has nobody to ask.",
        "With many ranks what grows is the deal of the whole step, on a thread of the training process and not in its",
        "workers, and here also what it costs to put together what the others tell.",
        "",
        "| ranks | samples/s of one rank | of one rank alone | encodes everything, samples/s | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for world, found, alone, peak in rows:
        without = "" if alone is None else f"{alone:.0f}"
        lines.append(f"| {world} | {found:.0f} | {found / first:.2f} | {without} | {peak:.0f} |")
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
