"""The data, weights and settings of `benchmarks.train_speed`: pictures with captions, and an instruction mix."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import vlm  # noqa: F401  (before lightning)
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vlm.data import LlavaJson
from vlm.demo.scenes import make_scene
from vlm.demo.sprites import NOUNS
from vlm.levels import look_up
from vlm.prompts import LlamaTokenizer, get_template
from vlm.prompts.template import IMAGE
from vlm.vision.preprocess import ImageTransform

ASSETS = Path(__file__).parents[1] / "vlm/demo/assets"
STAGES = {"1_align": "captions", "2_finetune": "instructions"}
ROWS = 1200
"""Of the vocabulary."""
PRECISIONS = {"float32": "32-true", "bf16": "bf16-mixed"}
"""{name: in the words of a trainer}."""


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


def fit_arguments(work: Path, stage: str, precision: str, options: argparse.Namespace) -> list[str]:
    """The recipe's own files of a stage, with the benchmark's data, language model and batch on top."""
    device = ["--trainer.accelerator=cpu"] if options.device == "cpu" else ["--trainer.accelerator=gpu"]
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
        "--trainer.devices=1",
        f"--trainer.precision={PRECISIONS[precision]}",
        "--trainer.enable_progress_bar=false",
        "--trainer.logger=false",
        "--trainer.max_epochs=1",
        "--checkpoint.every_n_train_steps=100000",
    ]


def read_items(work: Path, stage: str, steps: list[list[str]]) -> Iterator[tuple[str, tuple]]:
    """(id, (ids with image marks, labels, pixels)) of the samples of some steps.

    By our template and transform, which equal the official ones.
    """
    template, mode = ("plain", "crop") if stage == "1_align" else ("v1", "pad")
    tokenizer = LlamaTokenizer(str(ASSETS / "llama"), legacy=False)
    transform = ImageTransform(98, mode=mode)  # type: ignore[arg-type]
    source = LlavaJson(work / f"{STAGES[stage]}.json", image_root=work / "images")
    wanted = {key for step in steps for key in step}
    for sample in (source[index] for index in range(len(source))):
        if sample.id in wanted:
            tokens = get_template(template).tokenize(sample.messages, tokenizer)
            pixels = [look_up(transform(image.read(sample)), transform.table) for image in sample.images]
            yield sample.id, (tokens.ids, tokens.labels, pixels)


def encode(image_token: int, item: tuple) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Ids with room for the features of images, labels, pixels."""
    ids: list[int] = []
    labels: list[int] = []
    for token, label in zip(*item[:2], strict=True):
        width = 49 if token == IMAGE else 1
        ids += [image_token if token == IMAGE else token] * width
        labels += [label] * width
    return torch.tensor(ids), torch.tensor(labels), item[2]
