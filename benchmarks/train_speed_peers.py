"""The peers of `benchmarks.train_speed`: the same LLaVA as transformers' own class, its samples encoded in advance."""

import argparse
import functools
import json
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import vlm  # noqa: F401  (before lightning)
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from benchmarks.clock import now
from benchmarks.train_speed_mix import ROWS, encode, read_items
from vlm.batch import IGNORE

Row = tuple[Tensor, Tensor, list[Tensor]]
"""Ids with room for features, labels, pixels of the images."""
MICRO_BATCH = 8
"""Samples of a micro-batch in data order, the default of transformers' Trainer; padding hurts larger ones more."""
SORTED = {"1_align": MICRO_BATCH, "2_finetune": 2}
"""The same by stage for the loop that sorts: captions are of much the same length, instructions are not."""
LEARNING_RATE = 1e-5


def run_peer(name: str, work: Path, stage: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """`ends` of the steps in seconds, tokens of each step, and the loss of the first."""
    steps = json.loads((work / f"steps_{stage}.json").read_text())
    model = LlavaForConditionalGeneration.from_pretrained(work / "peer", dtype=torch.float32).to(options.device)
    model.train()
    trained = ("multi_modal_projector",) + (("language_model", "lm_head") if stage == "2_finetune" else ())
    for key, parameter in model.named_parameters():
        parameter.requires_grad = any(part in key for part in trained)
    encoded = {key: encode(model.config.image_token_id, item) for key, item in read_items(work, stage, steps)}
    rows = [[encoded[key] for key in step] for step in steps]
    if name in LOOPS:
        is_sorted = LOOPS[name]
        size = SORTED[stage] if is_sorted else MICRO_BATCH
        return _in_loop(model, rows, precision, options, size=size, is_sorted=is_sorted)
    return _in_trainer(model, rows, precision, options, **TRAINERS[name])


def _in_loop(
    model: Any,
    steps: Sequence[list[Row]],
    precision: str,
    options: argparse.Namespace,
    *,
    size: int,
    is_sorted: bool,
) -> dict[str, Any]:
    """A plain loop."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )
    ends, first = [now(options.device)], 0.0
    for number, rows in enumerate(steps):
        ordered = sorted(rows, key=lambda row: len(row[0])) if is_sorted else rows
        num_labels = sum(int((row[1] != IGNORE).sum()) for row in ordered)
        for start in range(0, len(ordered), size):
            part = ordered[start : start + size]
            with torch.autocast(options.device, torch.bfloat16, enabled=precision == "bf16"):
                share = sum(int((row[1] != IGNORE).sum()) for row in part) / num_labels
                inputs = {key: tensor.to(options.device) for key, tensor in pad(part).items()}
                output = model(**inputs)
                loss = output.loss * share
            loss.backward()
            if number == 0:
                first += share * _loss_over_our_rows(output.logits, inputs["labels"])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ends.append(now(options.device))
    return {"ends": ends, "loss": first, "tokens": [sum(len(row[0]) for row in rows) for rows in steps]}


class _Clock(TrainerCallback):
    def __init__(self, device: str) -> None:
        self.device = device
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(now(self.device))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(now(self.device))


def _in_trainer(
    model: Any,
    steps: Sequence[list[Row]],
    precision: str,
    options: argparse.Namespace,
    *,
    order: str,
    by_trl: bool,
) -> dict[str, Any]:
    """transformers' own Trainer, or TRL's, which makes logits at labels alone."""
    micro_batches = max(1, len(steps[0]) // MICRO_BATCH)
    all_rows, seen = [row for rows in steps for row in rows], []
    samples: Any = [{"input_ids": row[0], "number": number} for number, row in enumerate(all_rows)]

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [all_rows[example["number"]] for example in examples]
        seen.append([len(row[0]) for row in rows])
        return pad(rows)

    clock = _Clock(options.device)
    with tempfile.TemporaryDirectory() as folder:
        kind, settings, more = Trainer, TrainingArguments, {}
        if by_trl:
            kind, settings, more = _trl(options)
            samples = _as_trl_wants(samples)
        trainer = kind(
            model=model,
            args=settings(
                output_dir=folder,
                per_device_train_batch_size=len(steps[0]) // micro_batches,
                gradient_accumulation_steps=micro_batches,
                train_sampling_strategy=order,
                learning_rate=LEARNING_RATE,
                weight_decay=0.0,
                max_grad_norm=1.0,
                num_train_epochs=1,
                bf16=precision == "bf16",
                use_cpu=options.device == "cpu",
                remove_unused_columns=False,
                dataloader_pin_memory=options.device != "cpu",
                save_strategy="no",
                report_to=[],
                logging_strategy="no",
                disable_tqdm=True,
                **more,
            ),
            train_dataset=samples,
            data_collator=collate,
            callbacks=[clock],
        )
        trainer.train()
    tokens = [sum(map(sum, seen[start : start + micro_batches])) for start in range(0, len(seen), micro_batches)]
    return {"ends": clock.ends, "tokens": tokens[: len(clock.ends) - 1]}


def _trl(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """TRL's classes and what they take more: samples are encoded already, and nothing is recomputed."""
    from trl import SFTConfig, SFTTrainer

    kind = functools.partial(SFTTrainer, processing_class=AutoProcessor.from_pretrained(options.work / "peer"))
    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "gradient_checkpointing": False}
    return kind, SFTConfig, prepared


def _as_trl_wants(samples: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    lengths, numbers = zip(*((len(sample["input_ids"]), sample["number"]) for sample in samples), strict=True)
    return Dataset.from_dict({"length": lengths, "number": numbers})


LOOPS = {"padded": False, "sorted": True}
"""{contestant: whether it sorts the samples of a step by length}."""
TRAINERS: dict[str, dict[str, Any]] = {
    "Trainer": {"order": "sequential", "by_trl": False},
    "Trainer, by length": {"order": "group_by_length", "by_trl": False},
}
if find_spec("trl"):
    TRAINERS["TRL, by length"] = {"order": "group_by_length", "by_trl": True}
PEERS = (*LOOPS, *TRAINERS)


def pad(rows: Sequence[Row]) -> dict[str, Tensor]:
    """A micro-batch as a rectangle, padded to its longest sample."""
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
    return inputs


def _loss_over_our_rows(logits: Tensor, labels: Tensor) -> float:
    """A Hugging Face LLaVA has rows for its image and padding tokens, whose logits enter its softmax."""
    return F.cross_entropy(logits[:, :-1, :ROWS].flatten(0, 1).float(), labels[:, 1:].flatten()).item()
