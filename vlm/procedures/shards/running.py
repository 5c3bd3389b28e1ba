"""The loop over shards: Lightning's `Trainer.predict`, with a writer."""

import argparse
import json
import os
import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlm.checkpoints.files.atomic import atomic_file
from vlm.data.loading.opaque import OpaqueBatch
from vlm.data.loading.workers import worker_context
from vlm.errors import SampleError, UserError
from vlm.procedures.shards.inputs import Pair, Shard
from vlm.sample import ImageFile

MANIFEST, REPORT, COUNTS = "manifest.json", "report.json", "counts"
_DAYS = timedelta(days=30)  # ranks wait for the slowest one at the end alone


class Work(LightningModule):
    """What is done with a shard; a subclass holds the networks that do it.

    Attributes:
        procedure: its name, for the manifest.
        suffix: of the files that are made.
        decodes: whether it looks at images, so that workers decode them; without, they read their headers.
        settings: what the result depends on, networks by their fingerprints.
    """

    procedure: str
    suffix = ".jsonl"
    decodes = True
    settings: dict[str, Any]

    @abstractmethod
    def rows(self, shard: Shard, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        """What is written about some images of a shard.

        Raises:
            UserError: the shard lacks something; it is named and left out, and the others go on.
        """

    def count(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """What the report says about the rows of a shard."""
        return {}

    def figures(self, totals: Mapping[str, int]) -> dict[str, float]:
        """What the report makes of the counts of all shards."""
        return {}

    def write(self, file: BinaryIO, shard: Shard, rows: Sequence[Mapping[str, Any]]) -> None:
        """A shard's file: a line for each row."""
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())

    def predict_step(self, chunk: "Chunk", batch_idx: int) -> "list[dict[str, Any]] | UserError":
        good = [pair for pair in chunk.pairs if isinstance(pair, Pair)]
        try:
            return self.rows(chunk.shard, good) if good else []
        except UserError as error:
            return error


@dataclass(frozen=True)
class Chunk:
    """Images of a shard that are looked at together; `failed` says why the shard cannot be read."""

    shard: Shard
    pairs: list[Pair | SampleError]
    is_last: bool
    failed: str | None = None


class _Chunks(IterableDataset):
    """Chunks of this process' shards; a worker has whole shards of them."""

    def __init__(self, shards: Sequence[Shard], *, size: int, decodes: bool) -> None:
        self.shards, self.size, self.decodes = shards, size, decodes

    def __iter__(self) -> Iterator[OpaqueBatch]:
        worker = get_worker_info()
        for shard in self.shards if worker is None else self.shards[worker.id :: worker.num_workers]:
            for chunk in self._of(shard):
                yield OpaqueBatch(chunk)

    def _of(self, shard: Shard) -> Iterator[Chunk]:
        waiting: list[Pair | SampleError] = []
        try:
            for pair in shard.pairs():
                if len(waiting) == self.size:
                    yield Chunk(shard, waiting, is_last=False)
                    waiting = []
                waiting.append(_read(pair, decodes=self.decodes))
        except UserError as error:
            yield Chunk(shard, [], is_last=True, failed=str(error))
            return
        yield Chunk(shard, waiting, is_last=True)


def _read(pair: Pair | SampleError, *, decodes: bool) -> Pair | SampleError:
    if isinstance(pair, SampleError):
        return pair
    try:
        if not decodes:
            pair.image.size(pair.sample())
            return pair
        image = pair.image.read(pair.sample())
    except SampleError as error:
        return error
    return replace(pair, image=ImageFile(pair.image.name, image=image, max_pixels=pair.image.max_pixels))


class ShardWriter(Callback):
    """Writes the file of a shard when its last chunk is through: first what it counts, then the file itself.

    Args:
        out: folder.
        shards: all of the input.

    Attributes:
        failed: why shards of this process have no file.
    """

    def __init__(self, out: Path, shards: Sequence[Shard]) -> None:
        self.out, self.shards = out, shards
        self.failed: dict[str, str] = {}
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._unreadable: dict[str, dict[str, str]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, Work)
        wrong = ""
        if trainer.is_global_zero:
            try:
                self._begin(pl_module)
            except UserError as error:  # every rank ends with it: else the others wait for this one
                wrong = str(error)
        if wrong := trainer.strategy.broadcast(wrong):
            raise UserError(wrong)

    def _begin(self, work: Work) -> None:
        """The manifest, held against that of an earlier start."""
        file = self.out / MANIFEST
        settings = json.loads(json.dumps(work.settings))
        inputs = {shard.name: shard.identity() for shard in self.shards}
        if file.exists():
            before = json.loads(file.read_text())
            earlier = {"procedure": before["procedure"], **before["settings"]}
            now = {"procedure": work.procedure, **settings}
            if other := [key for key in {**earlier, **now} if earlier.get(key) != now.get(key)]:
                raise UserError(
                    f"{self.out}: was begun with another {other[0]} ({earlier.get(other[0])} and now "
                    f"{now.get(other[0])}); give another folder"
                )
            for name in inputs.keys() & before["inputs"].keys():
                if inputs[name] != before["inputs"][name]:
                    raise UserError(
                        f"{self.out}: its {name} was made of {before['inputs'][name]}, and now that is {inputs[name]}; "
                        "give another folder, or put the input back"
                    )
            inputs = before["inputs"] | inputs
        elif self.out.exists() and any(self.out.iterdir()):
            raise UserError(f"{self.out}: holds other files; give another folder")
        with atomic_file(file) as opened:
            manifest = {"procedure": work.procedure, "settings": settings, "inputs": inputs}
            opened.write((json.dumps(manifest, indent=1) + "\n").encode())

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Chunk,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, Work)
        name = batch.shard.name
        if batch.failed is not None or isinstance(outputs, UserError):
            self.failed.setdefault(name, batch.failed or str(outputs))
        else:
            self._rows.setdefault(name, []).extend(outputs)
            bad = {pair.sample_id: pair.reason for pair in batch.pairs if isinstance(pair, SampleError)}
            self._unreadable.setdefault(name, {}).update(bad)
        if not batch.is_last:
            return
        rows, unreadable = self._rows.pop(name, []), self._unreadable.pop(name, {})
        if name in self.failed:
            print(f"{name}: left out: {self.failed[name]}", file=sys.stderr, flush=True)
            return
        for identity, reason in unreadable.items():
            print(f"{name}: not read: {identity}: {reason}", file=sys.stderr, flush=True)
        counts = {"images": len(rows), "unreadable": len(unreadable), **pl_module.count(rows)}
        with atomic_file(self.out / COUNTS / f"{name}.json") as file:
            file.write((json.dumps({"counts": counts, "unreadable": unreadable}, ensure_ascii=False) + "\n").encode())
        with atomic_file(self.out / f"{name}{pl_module.suffix}") as file:
            pl_module.write(file, batch.shard, rows)


def run_shards(work: Work, shards: Sequence[Shard], options: argparse.Namespace) -> int:
    """Makes what is not made yet, on all ranks of torchrun or SLURM; the exit status: 1 where a shard was left out.

    Args:
        options: those of `add_shard_options`.

    Raises:
        UserError: the folder was begun with other settings, or holds something else.
    """
    for name in ("batch_size", "num_workers"):
        if getattr(options, name) < (name == "batch_size"):
            raise UserError(f"vlm run {work.procedure}: --{name} is {getattr(options, name)}, which is too small")
    out: Path = options.out
    writer = ShardWriter(out, shards)
    devices, nodes = _devices()
    trainer = Trainer(
        accelerator="cpu" if options.device == "cpu" else "auto",
        devices=devices,
        num_nodes=nodes,
        strategy=DDPStrategy(timeout=_DAYS) if devices * nodes > 1 else "auto",
        logger=False,
        callbacks=[writer],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=out,
    )
    todo = [shard for shard in shards if not (out / f"{shard.name}{work.suffix}").exists()]
    mine = todo[trainer.global_rank :: trainer.world_size]
    loader = DataLoader(
        _Chunks(mine, size=options.batch_size, decodes=work.decodes),
        batch_size=None,
        num_workers=options.num_workers,
        multiprocessing_context=worker_context(options.num_workers),
        generator=torch.Generator(),
    )
    trainer.predict(work, loader, return_predictions=False)
    trainer.strategy.barrier("shards")  # all files are written
    if not trainer.is_global_zero:
        return 0
    return _report(work, shards, out, len(todo))


def _report(work: Work, shards: Sequence[Shard], out: Path, asked: int) -> int:
    """Counts over all finished shards, in `report.json` and for people."""
    finished = [shard for shard in shards if (out / f"{shard.name}{work.suffix}").exists()]
    totals: dict[str, int] = {}
    for shard in finished:
        for key, value in json.loads((out / COUNTS / f"{shard.name}.json").read_text())["counts"].items():
            totals[key] = totals.get(key, 0) + value
    missing = [shard.name for shard in shards if shard not in finished]
    figures = work.figures(totals)
    with atomic_file(out / REPORT) as file:
        report = {"shards": len(finished), "missing": missing, **totals, **figures}
        file.write((json.dumps(report, indent=1) + "\n").encode())
    found = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in totals.items())
    print(f"{out}: {len(finished):,} of {len(shards):,} shards ({len(shards) - asked:,} were there): {found}")
    if figures:
        print(f"{out}: " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()))
    if missing:
        print(f"{out}: {len(missing):,} shards are missing, such as {missing[0]}; mend them and start it again")
    return 1 if missing else 0


def _devices() -> tuple[int, int]:
    """Devices of this machine, and machines; one process where nobody started several."""
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ.get("WORLD_SIZE", local)) // local
    tasks = int(os.environ.get("SLURM_NTASKS", 1)) if "SLURM_PROCID" in os.environ else 1
    nodes = int(os.environ.get("SLURM_NNODES", 1)) if tasks > 1 else 1
    return tasks // nodes, nodes
