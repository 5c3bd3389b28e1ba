"""What a rank's loader does for a step, by the number of ranks: samples per second of one rank, the others simulated.

    python -m benchmarks.loader_scale [--worlds 1 8 64 512] [--samples 64] [--steps 4] [--passes 3] [--out FILE]

Rank 0 of each world runs as it runs in a training: it encodes its share of every step, is told the sizes of all
samples, deals the step, is sent what others have encoded of its packs, and decodes the samples of these. What the other
ranks tell and send is put together here, on a clock that is stopped; to read it is the rank's own work. The network is
left out. Beside it the same rank where nobody tells it anything: it encodes all of every step. JPEG files of scenes,
four questions each, LLaVA-1.5's codec at 336 pixels; no worker processes, so that all of the work is seen.

Memory is that of a training with worker processes and several packs a step.
"""

import argparse
import multiprocessing
import pickle
import platform
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import vlm  # noqa: F401  (before lightning)
import numpy as np
import torch

from benchmarks.data_speed import make_codec, write_data
from vlm.codec import Sizes
from vlm.data import BatchSpec, InstructionData, LlavaJson
from vlm.data.loading.carried import to_bytes
from vlm.data.loading.loader import StepLoader
from vlm.data.loading.rank_gather import Gather
from vlm.data.loading.step_dataset import Step

MISSING = """
## What is missing

- A sample is encoded anew where its images are heavy in memory (files of more than 128 KiB inside of records) or lie in
  the rows of parquet files: these are not sent along.
- With `data.max_bad_samples` the ranks agree on a step before they hand it out, and all of a rank's packs of it travel
  together: shared memory then holds steps and not packs.
"""


class Others(Gather):
    """The other ranks: what rank 0 asks them, they know already.

    Args:
        steps: of the epoch.
        samples: how many there are.
        sizes: of every sample.
        encoded: of every sample.

    Attributes:
        seconds: of the CPU, spent on putting together what they say.
    """

    def __init__(self, steps: Sequence[Sequence[int]], world: int, sizes: Sizes, encoded: Sequence[bytes]) -> None:
        super().__init__(self.tell, self.send)
        self.steps = enumerate(steps)
        self.world = world
        self.sizes = sizes
        self.encoded = encoded
        self.loader: StepLoader | None = None
        self.seconds = 0.0

    def tell(self, own: Any) -> list[Any]:
        start = time.thread_time()
        digest, _, bad, error = own
        self.index, self.step = next(self.steps)
        samples = np.asarray(self.step) % len(self.encoded)
        told = [
            pickle.dumps((digest, at_places(self.sizes, samples[rank :: self.world]), bad, error))
            for rank in range(1, self.world)
        ]
        self.seconds += time.thread_time() - start
        return [own, *map(pickle.loads, told)]

    def send(self, messages: list[bytes]) -> list[bytes]:
        start = time.thread_time()
        assert self.loader is not None
        sizes = at_places(self.sizes, np.asarray(self.step) % len(self.encoded))
        _, ranks = self.loader.dataset.deal(Step(0, self.index, tuple(self.step)), sizes)
        parcels: list[dict[int, bytes]] = [{} for _ in range(self.world)]
        for at in np.flatnonzero(ranks == 0).tolist():
            parcels[at % self.world][self.step[at]] = self.encoded[self.step[at] % len(self.encoded)]
        sent = [b"", *(pickle.dumps(parcel) if parcel else b"" for parcel in parcels[1:])]
        self.seconds += time.thread_time() - start
        return sent


def at_places(sizes: Sizes, places: np.ndarray) -> Sizes:
    counts = {name: values[places] for name, values in sizes.counts.items()}
    return Sizes(sizes.tokens[places], sizes.images[places], counts)


class Setting(NamedTuple):
    """Attributes:

    files: the records.
    samples: of a rank and step.
    """

    files: Path
    samples: int
    steps: int

    def loader(self, world: int, *, told: bool = True, accumulate: int = 1, workers: int = 0) -> StepLoader:
        """That of rank 0."""
        source = LlavaJson(str(self.files), str(self.files.parent))
        each = world * self.samples
        data = InstructionData(
            [source] * -(-each * self.steps // len(source)), batch=BatchSpec(each), num_workers=workers
        )
        codec = make_codec(336)
        encoder = data._encoder(codec)
        items = [encoder(draw, epoch=0) for draw in range(len(source))]
        carried = [made for item in items if (made := to_bytes(item)) is not None]
        others = None
        if told and world > 1:
            others = Others(data.steps(0, encoder=encoder), world, Sizes.of(items), carried)
        loader = data.train_loader(codec, world=world, rank=0, accumulate=accumulate, gather=others)
        if others is not None:
            others.loader = loader
        return loader


def samples_per_second(loader: StepLoader, steps: int) -> float:
    """By the CPU's clock: all threads of the rank, whatever else the machine does, without the work of the others."""
    packs = iter(loader)
    others = loader.sampler.asking.gather if loader.sampler.asking is not None else None
    start = time.process_time()
    count = sum(len(next(packs).samples) for _ in range(steps * loader.accumulate))
    seconds = time.process_time() - start
    return count / (seconds - (others.seconds if isinstance(others, Others) else 0.0))


class Memory(NamedTuple):
    """MiB.

    Attributes:
        worker: peak of the largest worker.
        training: peak of the process that the workers belong to, without a network.
        pack: the largest one in shared memory.
        shared: the most that can be under way: a pack for everything that the workers are asked for, and one in use.
    """

    worker: float
    training: float
    pack: float
    shared: float


def peak_mib(process: int | str = "self") -> float:
    [line] = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def memory(setting: Setting, world: int, accumulate: int, workers: int) -> Memory:
    """Of an epoch of rank 0; called in a process of its own."""
    torch.set_num_threads(1)
    loader = setting.loader(world, accumulate=accumulate, workers=workers)
    pack, worker = 0.0, 0.0
    for batch in loader:
        pack = max(pack, batch.text.ids.untyped_storage().nbytes() / 2**20)  # its tensors share one piece
        worker = max(peak_mib(process.pid) for process in loader._iterator._workers)
    return Memory(worker, peak_mib(), pack, pack * (workers * loader.prefetch_factor + 1))


def speed_table(setting: Setting, worlds: Sequence[int], passes: int) -> list[str]:
    found: dict[int, float] = dict.fromkeys(worlds, 0.0)
    for _ in range(passes):
        for world in worlds:  # in turns: what else the machine does falls on all of them
            found[world] = max(found[world], samples_per_second(setting.loader(world), setting.steps))
            print(f"{world} ranks: {found[world]:.0f} samples/s", flush=True)
    lines = [
        "| ranks | samples/s of one rank | of one rank alone | encodes everything, samples/s |",
        "|---|---|---|---|",
    ]
    for world in worlds:
        alone = ""
        if world <= 64:
            alone = f"{samples_per_second(setting.loader(world, told=False), setting.steps):.0f}"
        lines.append(f"| {world} | {found[world]:.0f} | {found[world] / found[worlds[0]]:.2f} | {alone} |")
    return lines


def memory_table(setting: Setting, worlds: Sequence[int], workers: int) -> list[str]:
    lines = [
        "| ranks | packs of a rank and step | a worker | training process | largest pack | shared, at most |",
        "|---|---|---|---|---|---|",
    ]
    rows = [*((world, 4) for world in worlds), *((min(8, max(worlds)), packs) for packs in (1, 16))]
    for world, accumulate in rows:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            used = pool.submit(memory, setting, world, accumulate, workers).result()
        figures = f"{used.worker:.0f} | {used.training:.0f} | {used.pack:.1f} | {used.shared:.1f}"
        lines.append(f"| {world} | {accumulate} | {figures} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--samples", type=int, default=64, help="of a rank and step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="of the memory table")
    parser.add_argument("--out", type=Path, default=Path("docs/loader_scale.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(write_data(Path(folder), pictures=256, size=480), options.samples, options.steps)
        speed = speed_table(setting, options.worlds, options.passes)
        used = memory_table(setting, options.worlds, options.workers)
    page = [
        "# What a rank's loader does for a step",
        "",
        f"`python -m benchmarks.loader_scale`: {options.samples} samples of a rank in each step, on "
        f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}.",
        "The other ranks are simulated: what they tell and send is put together on a clock that is stopped, and read",
        "by the rank itself. The network is left out. Seconds are those of the CPU, of all threads of the rank: what",
        f"else the machine does does not count. The best of {options.passes} passes, in turns; in the last column",
        "every rank encodes all of the step, as a rank does that has nobody to ask.",
        "",
        *speed,
        "",
        "A sample is encoded once, by the rank that measures it, which sends it to the rank that is dealt it",
        "(`vlm/data/loading/carried.py`). What grows with the number of ranks is the deal of the whole step, on a",
        "thread of the training process.",
        "",
        "## Memory",
        "",
        f"MiB, with {options.workers} workers. Packs travel one by one: what is in shared memory is the packs that the",
        "workers are asked for (two each) and the one in use, however many make a step.",
        "",
        *used,
    ]
    options.out.write_text("\n".join(page) + "\n" + MISSING)


if __name__ == "__main__":
    main()
