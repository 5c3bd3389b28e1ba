"""Training speed and memory beside a plain loop around transformers' own LLaVA, in one run.

    python -m benchmarks.train_speed [--device cuda] [--steps 12] [--rounds 2] [--hidden 256] [--layers 6]

Three contestants take the same optimizer steps: the same weights, the same samples in each step, the same loss.

    vlm       `vlm fit`: packed rows, loss at label positions; through Lightning, its data loading included
    padded    transformers' LlavaForConditionalGeneration, micro-batches of 8 in data order, padded to the longest
    sorted    the same, the samples of each step sorted by length, in micro-batches of 2

The peers get their samples encoded in advance and pay for no data loading. Stage 1 trains the connector on captions of
much the same length, stage 2 connector and language model on an instruction mix with a long tail. Each contestant runs
in a process of its own, one after the other, in several rounds; medians over all timed steps are compared. Tokens are
counted without padding, images included. The losses of the first step must agree, or nothing is reported.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import vlm  # noqa: F401  (before lightning)
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

import cli
from benchmarks.memory import peak_rss_gib
from vlm.levels import look_up
from vlm.batch import IGNORE
from vlm.commands.export import export
from vlm.data import LlavaJson
from vlm.demo.scenes import make_scene
from vlm.demo.sprites import NOUNS
from vlm.prompts import LlamaTokenizer, get_template
from vlm.prompts.template import IMAGE
from vlm.vision.preprocess import ImageTransform

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "vlm/demo/assets"
STAGES = {"1_align": "captions", "2_finetune": "instructions"}
PEERS = {"padded": 8, "sorted": 2}
"""Samples of a micro-batch."""
WARM_UP = 2
ROWS = 1200
"""Of the vocabulary."""


# -- data and weights


def write_records(folder: Path, *, num: int, batch: int) -> None:
    """Pictures with captions of 12 to 20 words, and with instructions whose answers have a long tail."""
    random = Random(0)
    (folder / "images").mkdir(parents=True)
    for index in range(batch):
        make_scene(Random(index), split="train", size=96).draw().save(folder / "images" / f"{index}.png")
    captions, instructions = [], []
    for index in range(num):
        image = {"image": f"{index % batch}.png"}
        captions.append(
            {"id": str(index)} | image | _turn("<image>\nDescribe.", _words(random, random.randint(12, 20)))
        )
        length = min(700, 8 + int(random.lognormvariate(3.4, 1.1)))
        has_image = random.random() < 0.9
        question = "<image>\nWhat is it?" if has_image else "Tell me a story."
        instructions.append({"id": str(index)} | (image if has_image else {}) | _turn(question, _words(random, length)))
    for name, records in {"captions": captions, "instructions": instructions}.items():
        (folder / f"{name}.json").write_text(json.dumps(records))


def _words(random: Random, num: int) -> str:
    return " ".join(random.choice(NOUNS).name for _ in range(num))


def _turn(question: str, answer: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def write_language_model(folder: Path, *, hidden: int, layers: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=2048,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def fit_arguments(work: Path, stage: str, options: argparse.Namespace) -> list[str]:
    """The recipe's own files of a stage, with the benchmark's data, language model and batch on top."""
    device = (
        ["--trainer.accelerator=gpu", "--trainer.devices=1", "--trainer.precision=bf16-mixed"]
        if options.device == "cuda"
        else ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    )
    source = {
        "class_path": "vlm.data.LlavaJson",
        "init_args": {"path": str(work / f"{STAGES[stage]}.json"), "image_root": str(work / "images")},
    }
    files = [f"configs/llava_1_5/{name}.yaml" for name in ("model", stage, "demo/model")]
    return [
        "fit",
        *(item for file in files for item in ("-c", file)),
        f"--model.init_args.language.init_args.path={work / 'language'}",
        "--model.init_args.max_tokens=2048",
        f"--data.init_args.sources={json.dumps([source])}",
        f"--data.init_args.batch.size={options.batch}",
        "--data.init_args.num_workers=0",
        *device,
        "--trainer.enable_progress_bar=false",
        "--trainer.logger=false",
        "--trainer.max_epochs=1",
        "--checkpoint.every_n_train_steps=100000",
    ]


# -- contestants, each in a process of its own


class StepTimer(Callback):
    """Writes when each optimizer step was done, which samples it had, and the loss of the first."""

    def __init__(self, file: str, device: str, steps: int) -> None:
        self.file, self.device, self.steps = Path(file), device, steps
        self.ends: list[float] = []
        self.samples: list[list[str]] = [[]]
        self.first = 0.0

    def on_train_start(self, *_: Any) -> None:
        self.ends.append(_now(self.device))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.samples[-1] += [sample.id for sample in batch.samples]
        if len(self.ends) == 1:
            self.first += float(outputs["loss"])  # Lightning has divided it by the number of micro-batches
        if trainer.global_step == len(self.ends):
            self.ends.append(_now(self.device))
            self.samples.append([])
            trainer.should_stop = len(self.ends) > self.steps

    def on_train_end(self, *_: Any) -> None:
        found = {"ends": self.ends, "samples": self.samples[:-1], "loss": self.first}
        self.file.write_text(json.dumps(found))


def run_ours(work: Path, stage: str, options: argparse.Namespace) -> dict[str, Any]:
    file = work / "ours.json"
    callback = {
        "class_path": "benchmarks.train_speed.StepTimer",
        "init_args": {"file": str(file), "device": options.device, "steps": options.steps},
    }
    follow = [{"artefact": str(work / "start/artefact"), "parts": {"connector": "connector"}}]
    status = cli.main(
        [
            *fit_arguments(work, stage, options),
            f"--trainer.default_root_dir={tempfile.mkdtemp(dir=work)}",
            f"--trainer.accumulate_grad_batches={options.accumulate}",
            f"--stage.follows={json.dumps(follow)}",
            f"--trainer.callbacks={json.dumps([callback])}",
        ]
    )
    assert status == 0
    return json.loads(file.read_text())


def run_peer(work: Path, stage: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    steps = json.loads((work / f"steps_{stage}.json").read_text())
    model = LlavaForConditionalGeneration.from_pretrained(work / "peer", dtype=torch.float32).to(options.device)
    model.train()
    trained = ("multi_modal_projector",) + (("language_model", "lm_head") if stage == "2_finetune" else ())
    for key, parameter in model.named_parameters():
        parameter.requires_grad = any(part in key for part in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)
    encoded = {key: _encoded(model, sample) for key, sample in _items(work, stage, steps)}
    ends, first = [_now(options.device)], 0.0
    for number, ids in enumerate(steps):
        rows = [encoded[key] for key in ids]
        if name == "sorted":
            rows.sort(key=lambda row: len(row[0]))
        num_labels = sum(int((row[1] != IGNORE).sum()) for row in rows)
        for start in range(0, len(rows), PEERS[name]):
            part = rows[start : start + PEERS[name]]
            with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
                share = sum(int((row[1] != IGNORE).sum()) for row in part) / num_labels
                inputs = _padded(part, options.device)
                output = model(**inputs)
                loss = output.loss * share
            loss.backward()
            if number == 0:
                first += share * _loss_over_our_rows(output.logits, inputs["labels"])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ends.append(_now(options.device))
    return {"ends": ends, "loss": first}


def _loss_over_our_rows(logits: Tensor, labels: Tensor) -> float:
    """A Hugging Face LLaVA has rows for its image and padding tokens, whose logits enter its softmax."""
    return F.cross_entropy(logits[:, :-1, :ROWS].flatten(0, 1).float(), labels[:, 1:].flatten()).item()


def _items(work: Path, stage: str, steps: list[list[str]]) -> Iterator[tuple[str, tuple]]:
    """(id, (ids with image marks, labels, pixels)) by our template and transform, which equal the official ones."""
    template, mode = ("plain", "crop") if stage == "1_align" else ("v1", "pad")
    tokenizer = LlamaTokenizer(str(ASSETS / "llama"), legacy=False)
    transform = ImageTransform(98, mode=mode)  # type: ignore[arg-type]
    source = LlavaJson(work / f"{STAGES[stage]}.json", image_root=work / "images")
    wanted = {key for step in steps for key in step}
    for sample in (source[index] for index in range(len(source))):
        if sample.id in wanted:
            tokens = get_template(template).tokenize(sample.messages, tokenizer)
            yield (
                sample.id,
                (
                    tokens.ids,
                    tokens.labels,
                    [look_up(transform(image.read(sample)), transform.table) for image in sample.images],
                ),
            )


def _encoded(model: Any, item: tuple) -> tuple[Tensor, Tensor, list[Tensor]]:
    ids: list[int] = []
    labels: list[int] = []
    for token, label in zip(*item[:2], strict=True):
        width = 49 if token == IMAGE else 1
        ids += [model.config.image_token_id if token == IMAGE else token] * width
        labels += [label] * width
    return torch.tensor(ids), torch.tensor(labels), item[2]


def _padded(rows: list[tuple[Tensor, Tensor, list[Tensor]]], device: str) -> dict[str, Tensor]:
    ids = pad_sequence([row[0] for row in rows], batch_first=True)
    lengths = torch.tensor([len(row[0]) for row in rows])
    inputs = {
        "input_ids": ids,
        "labels": pad_sequence([row[1] for row in rows], batch_first=True, padding_value=IGNORE),
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
    }
    pixels = [image for row in rows for image in row[2]]
    if pixels:
        inputs["pixel_values"] = torch.stack(pixels)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak(device: str) -> float:
    """GiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_rss_gib()


# -- the comparison


def compare(work: Path, stage: str, options: argparse.Namespace) -> None:
    times: dict[str, list[float]] = {name: [] for name in ("vlm", *PEERS)}
    peaks: dict[str, float] = {}
    losses: dict[str, float] = {}
    for _ in range(options.rounds):
        for name in times:
            found = _in_process(work, stage, name, options)
            if name == "vlm":
                (work / f"steps_{stage}.json").write_text(json.dumps(found["samples"]))
            times[name] += [b - a for a, b in zip(found["ends"][WARM_UP:-1], found["ends"][WARM_UP + 1 :], strict=True)]
            peaks[name], losses[name] = found["peak"], found["loss"]
    steps = json.loads((work / f"steps_{stage}.json").read_text())
    lengths = {key: sum(49 if t == IMAGE else 1 for t in item[0]) for key, item in _items(work, stage, steps)}
    per_step = [sum(lengths[key] for key in step) for step in steps[WARM_UP:]]
    spread = sorted(lengths.values())
    print(
        f"\n{stage}: {options.batch} samples a step of {spread[0]} to {spread[-1]} tokens, "
        f"half below {statistics.median(spread):.0f}; first loss "
        + ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items())
    )
    if max(losses.values()) - min(losses.values()) > (2e-2 if options.device == "cuda" else 1e-3):
        raise SystemExit("the contestants do not compute the same loss: nothing to compare")
    speed = {
        name: statistics.median(n / t for n, t in zip(per_step * options.rounds, seconds, strict=True))
        for name, seconds in times.items()
    }
    for name in times:
        print(
            f"  {name:<8} {speed[name]:>10,.0f} tokens/s  {peaks[name]:>6.2f} GiB peak"
            + ("" if name == "vlm" else f"  vlm is {speed['vlm'] / speed[name]:.2f} x as fast")
        )


def _in_process(work: Path, stage: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.train_speed", "--contestant", f"{stage}/{name}", "--work", str(work)]
    command += [f"--{key}={getattr(options, key)}" for key in ("device", "steps", "batch", "accumulate")]
    process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ)
    if process.returncode:
        raise SystemExit(f"{name} failed:\n{process.stdout}")
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="samples of an optimizer step")
    parser.add_argument("--accumulate", type=int, default=1, help="packs our step is dealt into")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        stage, name = options.contestant.split("/")
        run = run_ours if name == "vlm" else lambda *args: run_peer(args[0], args[1], name, args[2])
        result = run(options.work, stage, options)
        print(json.dumps(result | {"peak": _peak(options.device)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_records(work, num=options.batch * (options.steps + 1), batch=options.batch)
        write_language_model(work / "language", hidden=options.hidden, layers=options.layers)
        start = [*fit_arguments(work, "1_align", options), f"--trainer.default_root_dir={work / 'start'}"]
        start += [f"--data.init_args.batch.size={options.batch * (options.steps + 1)}"]  # one step, then an artefact
        start += ["--model.init_args.template=v1"]  # `plain` is no chat that a Hugging Face folder could hold
        assert cli.main(start) == 0
        export(work / "start", work / "peer")
        threads = f"{torch.get_num_threads()} threads" if options.device == "cpu" else torch.cuda.get_device_name()
        print(f"torch {torch.__version__}, {threads}")
        for stage in STAGES:
            compare(work, stage, options)


if __name__ == "__main__":
    main()
