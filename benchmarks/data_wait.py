"""Share of a training's time that is spent waiting for data, beside a plain DataLoader + PIL pipeline, in one run.

    python -m benchmarks.data_wait [--steps 40] [--batch 16] [--workers 0 1] [--pictures 300] [--size 480]

    vlm      `vlm fit` of stage 2 of LLaVA-1.5 at demo size: `speed/data_wait` as it logs it
    plain    transformers' own LLaVA with the same weights in a plain loop, fed by `benchmarks.data_speed.Plain`, rows
             padded to the longest: the time inside `next(loader)`

Both train connector and language model on the same JPEG files, larger than the demo's so that decoding costs what it
costs with photos. The first step, in which workers begin, does not count. Every contestant has a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import vlm  # noqa: F401  (before lightning)
import torch
from torch.utils.data import DataLoader

from benchmarks.data_speed import Plain, collate, write_data

ROOT = Path(__file__).parents[1]
FILES = [f"configs/llava_1_5/{name}.yaml" for name in ("model", "2_finetune", "demo/model", "demo/2_finetune")]
VIEW, TOKENS = 98, 49


def fit(data: Path, run: Path, options: argparse.Namespace, workers: int) -> dict[str, float]:
    """Trains with `vlm fit`; what it logged at its last step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    source = {"class_path": "vlm.data.LlavaJson", "init_args": {"path": str(data), "image_root": str(data.parent)}}
    command = [
        *(sys.executable, "cli.py", "fit", *(item for file in FILES for item in ("-c", file))),
        f"--data.init_args.sources={json.dumps([source])}",
        "--data.init_args.val_sources=[]",
        f"--data.init_args.batch.size={options.batch}",
        f"--data.init_args.num_workers={workers}",
        f"--trainer.default_root_dir={run}",
        "--trainer.max_epochs=100",
        f"--trainer.max_steps={options.steps}",
        f"--trainer.log_every_n_steps={options.steps}",
        "--trainer.enable_progress_bar=false",
        "--predictions.enabled=false",
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (folder,) = {file.parent for file in (run / "tensorboard").rglob("events.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: events.Scalars(f"speed/{name}")[-1].value for name in ("data_wait", "steps_per_s")}


class WithImageTokens(Plain):
    """Rows as transformers' LLaVA takes them: an id for every feature of the image."""

    image_id: int

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pixels, ids, labels = super().__getitem__(index)
        image = torch.full((TOKENS,), self.image_id)
        return pixels, torch.cat([image, ids]), torch.cat([torch.full_like(image, -100), labels])


def loop(data: Path, weights: Path, options: argparse.Namespace, workers: int) -> dict[str, float]:
    """Trains in a plain loop."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(weights, dtype=torch.float32).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "vision_tower" not in name
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)
    dataset = WithImageTokens(data, VIEW)
    dataset.image_id = model.config.image_token_id
    loader = DataLoader(dataset, options.batch, shuffle=True, drop_last=True, num_workers=workers, collate_fn=collate)
    waited = start = 0.0
    batches = iter(loader)
    for step in range(options.steps):
        if step == 1:
            waited, start = 0.0, time.perf_counter()
        asked = time.perf_counter()
        try:
            pixels, ids, labels = next(batches)
        except StopIteration:
            batches = iter(loader)
            pixels, ids, labels = next(batches)
        waited += time.perf_counter() - asked
        model(input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=pixels, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    return {"data_wait": waited / seconds, "steps_per_s": (options.steps - 1) / seconds}


def in_process(work: Path, options: argparse.Namespace, workers: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.data_wait", "--loop", str(work), "--workers", str(workers)]
    command += [f"--{name}={getattr(options, name)}" for name in ("steps", "batch")]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_wait", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--size", type=int, default=480, help="mean shorter side of the stored pictures")
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)  # one contestant, started by the others' process
    options = parser.parse_args()
    if options.loop is not None:
        print(json.dumps(loop(options.loop / "data.json", options.loop / "hf", options, options.workers[0])))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = write_data(work, pictures=options.pictures, size=options.size)
        print(f"JPEG pictures, shorter side {options.size}, view {VIEW}; {options.steps} steps of {options.batch}")
        for workers in options.workers:
            found: dict[str, Any] = {"vlm": fit(data, work / f"run_{workers}", options, workers)}
            if not (work / "hf").exists():
                from vlm.commands.export import export

                export(work / f"run_{workers}", work / "hf")
            found["plain"] = in_process(work, options, workers)
            line = "  ".join(
                f"{name} waits {values['data_wait']:.1%} of {1000 / values['steps_per_s']:.0f} ms a step"
                for name, values in found.items()
            )
            print(f"{workers} workers: {line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
