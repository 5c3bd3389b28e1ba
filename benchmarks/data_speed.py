"""Loader throughput beside a plain DataLoader + PIL pipeline on the same files, in one run.

    python -m benchmarks.data_speed [--pictures 600] [--size 480] [--view 336] [--batch 32] [--workers 0 1 2]

    vlm      `LlavaJson` and `InstructionData`: records read by offset, packed rows, images of a step decoded once
    plain    a Dataset over the parsed list: Image.open, pad to a square, resize, normalise with numpy; the tokenizer on
             the whole conversation; a collate function that pads to the longest

Both read the same JPEG files, tokenize with the same tokenizer and make the same pixels (checked before anything is
timed). Each contestant goes over the data twice per number of workers, in turns, in processes of their own; the faster
pass counts, which is the one with warm file caches for both.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import vlm  # noqa: F401  (before lightning)
import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from benchmarks.memory import peak_rss_gib
from vlm.data import InstructionData, LlavaJson
from vlm.data.sampling.batches import BatchSpec
from vlm.demo.scenes import make_scene
from vlm.demo.tasks import conversation, questions
from vlm.prompts import LlamaTokenizer, get_template
from vlm.systems.spliced import SplicedCodec
from vlm.vision import TowerFacts
from vlm.vision.preprocess import CLIP_MEAN, CLIP_STD, ImageTransform

ASSETS = Path(__file__).parents[1] / "vlm/demo/assets"
PASSES = 2


def write_data(folder: Path, *, pictures: int, size: int) -> Path:
    """JPEG images of scenes with four questions each, in LLaVA's form."""
    records = []
    for index in range(pictures):
        random = Random(f"data speed {index}")
        scene = make_scene(random, split="train", size=size)
        scene.draw().save(folder / f"{index}.jpg", quality=90)
        asked = questions(scene, "en", random)
        turns = [(turn.question, turn.answer) for turn in random.sample(asked, min(4, len(asked)))]
        turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        records.append({"id": str(index), "image": f"{index}.jpg", "conversations": conversation(turns)})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def make_codec(view: int) -> SplicedCodec:
    patches = (view // 14) ** 2
    return SplicedCodec(
        tokenizer=LlamaTokenizer(str(ASSETS / "llama"), legacy=False),
        template=get_template("v1"),
        tower=TowerFacts(dim=1024, grid=view // 14, num_tokens=patches, image_size=view, num_blocks=23, depth=24),
        transform=ImageTransform(view, mode="pad"),
        augment=None,
        max_tokens=4096,
    )


class Plain(Dataset):
    """What most training scripts do, per sample."""

    def __init__(self, path: Path, view: int) -> None:
        self.folder, self.view = path.parent, view
        self.records = json.loads(path.read_text())
        self.tokenizer = LlamaTokenizer(str(ASSETS / "llama"), legacy=False)

    def __len__(self) -> int:
        return len(self.records)

    def pixels(self, name: str) -> torch.Tensor:
        image = Image.open(self.folder / name).convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in CLIP_MEAN))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        values = np.asarray(square.resize((self.view, self.view), Image.Resampling.BICUBIC)).astype(np.float32) / 255
        values = (values - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
        return torch.from_numpy(values.transpose(2, 0, 1).copy())

    def tokens(self, conversations: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        """The whole text once, and every turn once more to count what is masked."""
        turns = [turn["value"] for turn in conversations]
        rounds = [(f"USER: {turns[i]} ASSISTANT:", f" {turns[i + 1]}</s>") for i in range(0, len(turns), 2)]
        ids, _ = self.tokenizer.encode("".join(question + answer for question, answer in rounds))
        labels = list(ids)
        start = 0
        for question, answer in rounds:
            masked = len(self.tokenizer.encode(question)[0])
            labels[start : start + masked] = [-100] * masked
            start += len(self.tokenizer.encode(question + answer)[0])
        return ids, labels

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        record = self.records[index]
        ids, labels = self.tokens(record["conversations"])
        return self.pixels(record["image"]), torch.tensor(ids), torch.tensor(labels)


def collate(items: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    pixels, ids, labels = zip(*items, strict=True)
    return (
        torch.stack(pixels),
        pad_sequence(list(ids), batch_first=True),
        pad_sequence(list(labels), batch_first=True, padding_value=-100),
    )


def ours(path: Path, *, view: int, batch: int, workers: int) -> Any:
    data = InstructionData([LlavaJson(path)], batch=BatchSpec(batch), num_workers=workers)
    return data.train_loader(make_codec(view))


def plain(path: Path, *, view: int, batch: int, workers: int) -> Any:
    return DataLoader(Plain(path, view), batch_size=batch, shuffle=True, num_workers=workers, collate_fn=collate)


CONTESTANTS = {"vlm": ours, "plain": plain}


def _pass(name: str, path: Path, options: dict[str, int], num: int, results: Any) -> None:
    torch.set_num_threads(1)
    loader = CONTESTANTS[name](path, **options)
    start = time.perf_counter()
    packs = sum(1 for _ in loader)
    seconds = time.perf_counter() - start
    assert packs
    results.put((num / seconds, peak_rss_gib() * 1024))


def measure(name: str, path: Path, options: dict[str, int], num: int) -> tuple[float, float]:
    """(samples per second, peak MiB without its workers) of one pass in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_pass, args=(name, path, options, num, results))
    process.start()
    found = results.get()
    process.join()
    return found


def check_pixels(path: Path, view: int) -> None:
    """Both contestants must make the same pixels, or their times mean nothing."""
    pack = next(iter(ours(path, view=view, batch=1, workers=0)))
    theirs = Plain(path, view).pixels(f"{pack.samples[0].id}.jpg")
    difference = float((pack.views["image"].pixels[0] - theirs).abs().max())
    assert difference < 1e-5, f"the contestants' pixels differ by {difference}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--size", type=int, default=480, help="mean shorter side of the stored pictures")
    parser.add_argument("--view", type=int, default=336)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_data(Path(folder), pictures=options.pictures, size=options.size)
        check_pixels(path, options.view)
        print(
            f"{options.pictures} JPEG pictures, shorter side {options.size}, view {options.view}, "
            f"steps of {options.batch}"
        )
        for workers in options.workers:
            settings = {"view": options.view, "batch": options.batch, "workers": workers}
            rates: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTESTANTS}
            for _ in range(PASSES):
                for name in CONTESTANTS:
                    rates[name].append(measure(name, path, settings, options.pictures))
            best = {name: max(found) for name, found in rates.items()}
            line = "  ".join(f"{name} {rate:.0f} samples/s, {memory:.0f} MiB" for name, (rate, memory) in best.items())
            print(f"{workers} workers: {line}  ratio {best['vlm'][0] / best['plain'][0]:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
