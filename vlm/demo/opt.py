"""Makes the demo's OPT: a byte-level BPE in GPT-2's layout, and plain texts about scenes that are told in words."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Tokenizer, OPTConfig, OPTForCausalLM

from vlm.batch import IGNORE
from vlm.demo.learning import by_length, learn
from vlm.demo.texts import lesson, plain_texts

MARKS = ("<s>", "<pad>", "</s>", "<unk>")
"""The first rows. OPT starts each text with `</s>`, as each ends."""
CONFIG: dict[str, Any] = {
    "hidden_size": 96,
    "word_embed_proj_dim": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "ffn_dim": 256,
    "max_position_embeddings": 512,
    "dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
STEPS = 2800
RATE = 2e-3
_VOCAB_SIZE = 896


def write_tokenizer(folder: Path) -> None:
    """Writes `vocab.json`, `merges.txt` and `tokenizer_config.json` as OPT is published with them."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(plain_texts(), vocab_size=_VOCAB_SIZE, special_tokens=list(MARKS), show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    trained.save_model(str(folder))
    facts = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "add_prefix_space": False,
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=1) + "\n")


def make_opt(folder: Path) -> Iterator[str]:
    """Writes the tokenizer, the configuration and the pretrained weights.

    Yields:
        A line of progress every hundred steps.
    """
    write_tokenizer(folder)
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), **CONFIG))

    def encode(text: str) -> list[int]:
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def make(index: int) -> tuple[list[int], list[int]]:
        told, follows = _text(Random(f"opt {index}"))
        before, behind = [MARKS.index("</s>"), *encode(told)], encode(follows)
        return before + behind, [IGNORE] * len(before) + behind

    chosen = by_length(make, lambda text: len(text[0]), first=0, steps=STEPS, batch=24)
    yield from learn(model, map(_collate, chosen), steps=STEPS, rate=RATE)
    model.half().save_pretrained(folder)


def _text(random: Random) -> tuple[str, str]:
    """(a scene told in words, what follows: its caption, or questions with their answers)."""
    found = lesson(random)
    if random.random() < 0.5:
        return found.told + "\n", f"{random.choice(('', '', 'a photo of '))}{found.caption}\n"
    name = random.choice((" Answer:", " Short answer:"))
    return found.told + "\n", "".join(f"Question: {question}{name} {answer}\n" for question, answer in found.asked)


def _collate(texts: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    pad = MARKS.index("<pad>")
    ids = pad_sequence([torch.tensor(ids) for ids, _ in texts], batch_first=True, padding_value=pad)
    labels = pad_sequence([torch.tensor(labels) for _, labels in texts], batch_first=True, padding_value=IGNORE)
    return {"input_ids": ids, "attention_mask": (ids != pad).long(), "labels": labels}
