"""Training speed and memory beside plain loops and frameworks around transformers' own LLaVA, in one run.

    python -m benchmarks.train_speed [--out docs] [--device cuda] [--steps 8] [--rounds 1] [--only vlm sorted]

All contestants train the same weights on the same samples:

    vlm                 `vlm fit`: packed rows, loss at label positions; through Lightning, its data loading included
    padded              a plain loop: micro-batches of 8 in data order, padded to the longest
    sorted              the same, the samples of each step sorted by length, captions by 8 and instructions by 2
    Trainer             transformers' Trainer, micro-batches of 8 in data order; `by length`: its own grouping
    TRL                 SFTTrainer by length, where `trl` is installed: logits at labels alone, nothing recomputed

The peers get their samples encoded in advance and pay for no data loading. Stage 1 trains the connector on captions of
much the same length, stage 2 connector and language model on an instruction mix with a long tail; each in float32 and
under autocast to bfloat16. Each contestant runs in a process of its own, one after the other; medians over all timed
steps are compared. Tokens are counted without padding, images included. Loops that take our steps must agree with our
first loss, or nothing is reported. With `--out`, a table, its numbers as JSON and a plot are written there.

It needs an idle machine: about 12 minutes on two cores, 15 with TRL.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import vlm  # noqa: F401  (before lightning)
import torch
from lightning.pytorch import Callback

import cli
from benchmarks.bars import draw_bars
from benchmarks.clock import machine, now
from benchmarks.memory import peak_rss_gib
from benchmarks.train_speed_mix import PRECISIONS, STAGES, fit_arguments, write_language_model, write_records
from benchmarks.train_speed_peers import PEERS, run_peer
from vlm.commands.export import export
from vlm.prompts.template import IMAGE
from benchmarks.train_speed_mix import read_items

ROOT = Path(__file__).parents[1]
TITLES = {"1_align": "captions", "2_finetune": "instructions"}
WARM_UP = 2
AGREE = {"float32": 1e-3, "bf16": 2e-2}
"""How far the first losses of contestants may lie apart."""


class StepTimer(Callback):
    """Writes when each optimizer step was done, which samples it had, and the loss of the first."""

    def __init__(self, file: str, device: str, steps: int) -> None:
        self.file, self.device, self.steps = Path(file), device, steps
        self.ends: list[float] = []
        self.samples: list[list[str]] = [[]]
        self.first = 0.0

    def on_train_start(self, *_: Any) -> None:
        self.ends.append(now(self.device))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.samples[-1] += [sample.id for sample in batch.samples]
        if len(self.ends) == 1:
            self.first += float(outputs["loss"])  # Lightning has divided it by the number of micro-batches
        if trainer.global_step == len(self.ends):
            self.ends.append(now(self.device))
            self.samples.append([])
            trainer.should_stop = len(self.ends) > self.steps

    def on_train_end(self, *_: Any) -> None:
        found = {"ends": self.ends, "samples": self.samples[:-1], "loss": self.first}
        self.file.write_text(json.dumps(found))


def run_ours(work: Path, stage: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    file = work / "ours.json"
    callback = {
        "class_path": "benchmarks.train_speed.StepTimer",
        "init_args": {"file": str(file), "device": options.device, "steps": options.steps},
    }
    follow = [{"artefact": str(work / "start/artefact"), "parts": {"connector": "connector"}}]
    status = cli.main(
        [
            *fit_arguments(work, stage, precision, options),
            f"--trainer.default_root_dir={tempfile.mkdtemp(dir=work)}",
            f"--trainer.accumulate_grad_batches={options.accumulate}",
            f"--stage.follows={json.dumps(follow)}",
            f"--trainer.callbacks={json.dumps([callback])}",
        ]
    )
    assert status == 0
    found = json.loads(file.read_text())
    steps = work / f"steps_{stage}.json"  # in data order: the peers get them whatever order our packs were in
    if not steps.exists():
        steps.write_text(json.dumps(found["samples"]))
    lengths = {
        key: sum(49 if t == IMAGE else 1 for t in item[0]) for key, item in read_items(work, stage, found["samples"])
    }
    return found | {"tokens": [sum(lengths[key] for key in step) for step in found["samples"]]}


def run_alone(work: Path, stage: str, precision: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a contestant measures in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.train_speed", "--contestant", f"{stage}/{precision}/{name}"]
    command += [f"--work={work}"]
    command += [f"--{key}={getattr(options, key)}" for key in ("device", "steps", "batch", "accumulate")]
    process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ)
    if process.returncode:
        raise SystemExit(f"{name} failed:\n{process.stdout}")
    return json.loads(process.stdout.splitlines()[-1])


def compare(work: Path, stage: str, precision: str, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """{contestant: its tokens per second, GiB, ...} of one stage in one precision.

    Raises:
        SystemExit: they do not compute the same loss.
    """
    found: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for name in names:
            run = run_alone(work, stage, precision, name, options)
            seconds = [b - a for a, b in zip(run["ends"], run["ends"][1:], strict=False)]
            rates = [n / s for n, s in zip(run["tokens"][WARM_UP:], seconds[WARM_UP:], strict=True)]
            one = found.setdefault(name, {"rates": [], "loss": run.get("loss")})
            one["rates"] += rates
            one["peak_gib"] = run["peak"]
    losses = [one["loss"] for one in found.values() if one["loss"] is not None]
    if max(losses) - min(losses) > AGREE[precision]:
        raise SystemExit(f"the contestants do not compute the same loss, nothing to compare: {found}")
    ours = statistics.median(found["vlm"]["rates"])
    for name, one in found.items():
        one["tokens_per_second"] = statistics.median(one["rates"])
        one["vlm_is"] = ours / one["tokens_per_second"]
        print(
            f"  {name:<20} {one['tokens_per_second']:>8,.0f} tokens/s  {one['peak_gib']:>5.2f} GiB peak  "
            f"vlm is {one['vlm_is']:.2f} x as fast",
            flush=True,
        )
    return found


def write_report(out: Path, found: dict[str, dict[str, Any]], about: dict[str, str]) -> None:
    """A table, its numbers and a plot."""
    names = list(next(iter(found.values())))
    lines = [
        "# Training beside loops and frameworks",
        "",
        "Made by `python -m benchmarks.train_speed --out docs`, which says who takes part. Tokens per second without",
        "padding, and in brackets how many times as fast `vlm` is.",
        "",
        f"Measured on: {', '.join(f'{key} {value}' for key, value in about.items())}.",
        "",
        f"| | {' | '.join(found)} |",
        f"|---|{'---|' * len(found)}",
    ]
    for name in names:
        cells = [f"{one[name]['tokens_per_second']:,.0f} ({one[name]['vlm_is']:.2f} x)" for one in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Peak memory in GiB:", "", f"| | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    for name in names:
        peaks = [f"{one[name]['peak_gib']:.2f}" for one in found.values()]
        lines.append(f"| {name} | {' | '.join(peaks)} |")
    lines += ["", "![tokens per second](images/train_speed.png)"]
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "train_speed.md").write_text("\n".join(lines) + "\n")
    (out / "train_speed.json").write_text(json.dumps({"machine": about, "found": found}, indent=1) + "\n")
    speeds = {title: {n: one["tokens_per_second"] for n, one in group.items()} for title, group in found.items()}
    draw_bars(out / "images/train_speed.png", speeds, unit="tokens per second")


def prepare(work: Path, options: argparse.Namespace) -> None:
    """Data, a language model, and the artefact that everybody starts from, as a Hugging Face folder too."""
    write_records(work, num=options.batch * (options.steps + 1), batch=options.batch)
    write_language_model(work / "language", hidden=options.hidden, layers=options.layers)
    start = [*fit_arguments(work, "1_align", "float32", options), f"--trainer.default_root_dir={work / 'start'}"]
    start += [f"--data.init_args.batch.size={options.batch * (options.steps + 1)}"]  # one step, then an artefact
    start += ["--model.init_args.template=v1"]  # `plain` is no chat that a Hugging Face folder could hold
    assert cli.main(start) == 0
    export(work / "start", work / "peer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for table, JSON and plot")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="samples of an optimizer step")
    parser.add_argument("--accumulate", type=int, default=1, help="packs our step is dealt into")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--only", nargs="+", default=["vlm", *PEERS], choices=["vlm", *PEERS], help="who takes part")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        stage, precision, name = options.contestant.split("/")
        if name == "vlm":
            result = run_ours(options.work, stage, precision, options)
        else:
            result = run_peer(name, options.work, stage, precision, options)
        peak = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else peak_rss_gib()
        print("\n" + json.dumps(result | {"peak": peak}))
        return
    names = ["vlm", *(name for name in options.only if name != "vlm")]
    about, found = machine(options.device), {}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work, options)
        for stage in options.stages:
            for precision in options.precisions:
                title = f"{TITLES[stage]}, {precision}"
                print(title, flush=True)
                found[title] = compare(work, stage, precision, names, options)
    if options.out is not None:
        write_report(options.out, found, about)


if __name__ == "__main__":
    main()
