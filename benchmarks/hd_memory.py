"""What an image of many tiles takes: memory and time of InternLM-XComposer2-4KHD at published tokens and reduced width.

    python -m benchmarks.hd_memory [--out docs/hd_memory.md]

Tiles are as published: 336 px, 576 patches, 144 tokens. Tower and language model are narrow, so that a training step
(all of it, with recomputation, in float32) and an answer run on a laptop. Each image has a process of its own, whose
peak is read above what it had before the step. Let nothing else run beside it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import vlm  # noqa: F401  (first: repairs torchvision)
import torch
from PIL import Image

from benchmarks.demo_scores import machine
from benchmarks.memory import peak_rss_gib
from vlm.checkpoints.files.atomic import atomic_file
from vlm.codec import step_counts
from vlm.connectors import MLP
from vlm.language import CausalLM, Decoding, PartialLoRA
from vlm.prompts import LlamaTokenizer
from vlm.sample import parse_sample
from vlm.stages import Stage, Trained
from vlm.systems import XComposer2HD4K
from vlm.vision import TimmTower

ROOT = Path(__file__).parents[1]
STRIPS = (1, 11, 33, 55)
PAGE = (3840, 1600)
TOWER = {"embed_dim": 64, "depth": 4, "num_heads": 4}
LANGUAGE = {
    "model_type": "llama", "vocab_size": 1200, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
HEAD = """# An image of many tiles: memory and time

Written by `python -m benchmarks.hd_memory` on {machine}. InternLM-XComposer2-4KHD
with published tiles (336 px, 144 tokens each) and a narrow tower and language model: one training step of everything,
with recomputation, and an answer of two tokens, in float32 (threads: {threads}). A process for each image; its peak,
above what it had before the step.

| image | tiles | tokens | GiB of a step | s | GiB of an answer | s |
|---|---|---|---|---|---|---|
"""
LINE = "| {width} x {height} | {tiles} | {tokens:,} | {train_gib:.2f} | {train_s:.1f} | "
LINE += "{answer_gib:.2f} | {answer_s:.1f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/hd_memory.md")
    parser.add_argument("--measure", nargs=3, metavar=("WIDTH", "HEIGHT", "WHAT"), help="one image, in this process")
    options = parser.parse_args()
    if options.measure:
        width, height, what = options.measure
        print(json.dumps(measured((int(width), int(height)), what)))
        return 0
    rows = [row((336, 336 * num)) for num in STRIPS] + [row(PAGE)]
    lines = [LINE.format(**found) for found in rows]
    text = HEAD.format(machine=machine(), threads=torch.get_num_threads()) + "\n".join(lines)
    told = "\n\n".join(linear(rows[:-1], kind) for kind in ("train", "answer"))
    with atomic_file(options.out) as file:
        file.write(f"{text}\n\n{told}\n".encode())
    return 0


def row(size: tuple[int, int]) -> dict[str, Any]:
    """Both measurements of an image."""
    found: dict[str, Any] = {"width": size[0], "height": size[1]}
    for what in ("train", "answer"):
        command = [sys.executable, "-m", "benchmarks.hd_memory", "--measure", *map(str, size), what]
        found |= json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout)
    print(found, file=sys.stderr)
    return found


def measured(size: tuple[int, int], what: str) -> dict[str, float]:
    """Peak and seconds of a step or an answer."""
    # as many tiles as it has: a strip is a tile wide, a page has the most that are allowed
    num = 55 if size == PAGE else size[1] // 336
    module = XComposer2HD4K(
        vision=TimmTower("vit_large_patch14_clip_quickgelu_336", options=TOWER, checkpointing=True),
        connector=MLP(),
        language=CausalLM(config=LANGUAGE, checkpointing=True),
        partial_lora=PartialLoRA(rank=16),
        tokenizer=LlamaTokenizer(str(ROOT / "vlm/demo/assets/llama"), legacy=False),
        template="xcomposer2_plain",
        hd_num=num,
        max_tokens=16384,
    )
    module.stage = Stage("2_sft", dict.fromkeys(("vision", "connector", "separators", "language"), Trained(1e-4)))
    module.configure_model()
    with tempfile.TemporaryDirectory() as folder:
        Image.effect_noise(size, 64).convert("RGB").save(Path(folder) / "page.png")
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What does it say?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "EXIT"}]},
        ]
        sample = parse_sample({"images": ["page.png"], "messages": messages}, image_root=folder)
        before, start = peak_rss_gib(), time.monotonic()
        item = module.codec.encode(sample, generate=what == "answer")
        if what == "train":
            module.train()
            module.losses(module.codec.collate([item], counts=step_counts([item])))["lm"].backward()
        else:
            module.generate([sample], decoding=Decoding(max_new_tokens=2, min_new_tokens=2))
    took = {f"{what}_gib": peak_rss_gib() - before, f"{what}_s": time.monotonic() - start}
    columns, rows = module.codec.tiles.grid(*size)
    return took | {"tiles": columns * rows, "tokens": module.codec.num_tokens(*size)}


def linear(rows: list[dict[str, Any]], what: str) -> str:
    """What a tile adds, and how far the strips are from a line."""
    tiles = torch.tensor([[found["tiles"], 1.0] for found in rows], dtype=torch.float64)
    gib = torch.tensor([found[f"{what}_gib"] for found in rows], dtype=torch.float64)
    slope, offset = torch.linalg.lstsq(tiles, gib[:, None]).solution.flatten().tolist()
    off = (tiles @ torch.tensor([slope, offset], dtype=torch.float64) - gib).abs().max().item()
    words = {"train": "A training step", "answer": "An answer"}[what]
    return (
        f"{words} of a strip takes {1024 * slope:.1f} MiB more with each tile; no strip is further than "
        f"{1024 * off:.0f} MiB ({off / gib.max().item():.1%} of the largest) from that line."
    )


if __name__ == "__main__":
    sys.exit(main())
