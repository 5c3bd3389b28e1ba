"""transformers' own LLaVA in a plain loop on the same samples: what training without packs reaches."""

import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.clock import now
from benchmarks.gpu.networks import MAKERS, TINY, TOWER, VICUNA
from benchmarks.gpu.results import Results
from benchmarks.gpu.texts import samples_of
from vlm.batch import IGNORE
from vlm.codec import Encoded

MICRO_BATCH, MICRO_BATCHES, STEPS = 4, 4, 3


def run_padded(results: Results) -> None:
    """Connector and language model trained under bf16 autocast with recomputation, micro-batches in data order."""
    model = _model(results).train()
    trained = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    optimizer = torch.optim.AdamW(trained, lr=2e-5, weight_decay=0.0, fused=results.device.type == "cuda")
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    micro_batches = _micro_batches(results, model.config.image_token_id)
    ends = []
    for _ in range(STEPS):
        for inputs in micro_batches:
            with torch.autocast(results.device.type, torch.bfloat16):
                loss = model(**{name: tensor.to(results.device) for name, tensor in inputs.items()}).loss
            (loss / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ends.append(now(results.device.type))
    seconds = statistics.median(after - before for before, after in itertools.pairwise(ends))
    real = sum(int(inputs["attention_mask"].sum()) for inputs in micro_batches)
    area = sum(inputs["attention_mask"].numel() for inputs in micro_batches)
    padding = 1 - real / area
    text = f"{real / seconds:,.0f} tokens/s without padding, which is {padding:.0%}"
    results.note("speed", None, text, speed={"speed/tokens_per_s": real / seconds}, padding=padding)


def _model(results: Results) -> nn.Module:
    sizes = TINY if results.is_small else VICUNA
    tower: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    tower |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
    if results.is_small:
        tower |= {"hidden_size": TOWER["embed_dim"], "intermediate_size": 64, "num_hidden_layers": 3}
        tower |= {"num_attention_heads": 4, "image_size": 56}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower),
        # a row for the token that stands for an image
        text_config=LlamaConfig(**(sizes | {"vocab_size": sizes["vocab_size"] + 64})),
        image_token_index=sizes["vocab_size"],
        vision_feature_layer=-2,
    )
    with results.device:
        model = LlavaForConditionalGeneration(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _micro_batches(results: Results, image_token: int) -> list[dict[str, Tensor]]:
    kind, arguments, _ = MAKERS["llava_1_5"](is_small=results.is_small)
    codec = kind(**arguments).codec
    count = MICRO_BATCH * MICRO_BATCHES
    with tempfile.TemporaryDirectory() as folder:
        items = [
            codec.encode(sample)
            for sample, _ in zip(samples_of(Path(folder), picture=(640, 480), limit=8000), range(count), strict=False)
        ]
        return [
            _padded(codec, items[start : start + MICRO_BATCH], image_token) for start in range(0, count, MICRO_BATCH)
        ]


def _padded(codec: Any, items: list[Encoded], image_token: int) -> dict[str, Tensor]:
    """A micro-batch as a rectangle, padded to its longest sample."""
    sequences = [item.text[0] for item in items]
    ids = [s.ids.index_fill(0, s.slots["image"], image_token) for s in sequences]
    # transformers shifts labels itself
    labels = [torch.cat([s.targets.new_full((1,), IGNORE), s.targets[:-1]]) for s in sequences]
    lengths = torch.tensor([len(one) for one in ids])
    padded = pad_sequence(ids, batch_first=True)
    views = codec.collate(items, counts={"lm": 1.0}).views["image"]
    return {
        "input_ids": padded,
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long(),
        "pixel_values": views.pixels.float(),
    }
