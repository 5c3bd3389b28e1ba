"""Makes the demo's FlanT5: SentencePiece with sentinels, denoising of texts, and answers to what is asked in words."""

import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import sentencepiece
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

from vlm.batch import IGNORE
from vlm.checkpoints.files.atomic import atomic_file
from vlm.demo.learning import by_length, learn
from vlm.demo.texts import lesson, plain_texts

CONFIG: dict[str, Any] = {
    "d_model": 96,
    "d_kv": 24,
    "d_ff": 160,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
NUM_SENTINELS = 100
STEPS = 3500
RATE = 3e-3
_VOCAB_SIZE = 760
_NORMALISED = dict(zip("\n\t，。：？", "  ,.:?", strict=True))
"""Of NFKC, whose full table would be as large as the rest, what the texts need."""
_ASK = ("{}", "{}", "Question: {} Short answer:", "Question: {} Answer:", "{}\nAnswer the question.")
_DESCRIBE = ("", "", "a photo of", "Write a short description for the image.", "Describe the image in detail.")


def write_tokenizer(folder: Path) -> None:
    """Writes `spiece.model` (`<pad>` 0, `</s>` 1, `<unk>` 2; no sentinels) and `tokenizer_config.json`."""
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        rules.writelines(f"{ord(character):X}\t{ord(plain):X}\n" for character, plain in _NORMALISED.items())
        rules.flush()
        _train(model, rules.name)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "spiece.model") as file:
        file.write(model.getvalue())
    facts = {"tokenizer_class": "T5Tokenizer", "extra_ids": NUM_SENTINELS, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=1) + "\n")


def _train(model: io.BytesIO, rules: str) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_texts(),
        model_writer=model,
        model_type="unigram",
        vocab_size=_VOCAB_SIZE,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=1.0,
        normalization_rule_tsv=rules,
        num_threads=1,
        minloglevel=2,
    )


def _texts() -> Iterator[str]:
    """The texts, and each of their words before another mark once: a word that nothing ever follows is no candidate."""
    words: dict[str, None] = {}
    for text in plain_texts():
        words |= dict.fromkeys(text.split())
        yield text
    yield from (f"{word}{mark}" for word in words for mark in ".?")


def make_t5(folder: Path) -> Iterator[str]:
    """Writes the tokenizer, the configuration and the pretrained weights.

    Yields:
        A line of progress every hundred steps.
    """
    write_tokenizer(folder)
    tokenizer = T5Tokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **CONFIG))

    def make(index: int) -> tuple[list[int], list[int]]:
        asked, answer = _exercise(Random(f"t5 {index}"))
        encoded = tokenizer.backend_tokenizer.encode_batch([asked, answer])
        return encoded[0].ids, encoded[1].ids

    chosen = by_length(make, lambda pair: len(pair[0]), first=0, steps=STEPS, batch=24)
    yield from learn(model, map(_collate, chosen), steps=STEPS, rate=RATE)
    model.half().save_pretrained(folder)


def _exercise(random: Random) -> tuple[str, str]:
    """(what is read, what is to be written): instruction, prefix or a text with holes."""
    found = lesson(random)
    kind = random.random()
    if kind < 0.5:
        question, answer = random.choice(found.asked)
        return f"{found.told}\n{random.choice(_ASK).format(question)}", answer
    if kind < 0.75:
        return f"{found.told}\n{random.choice(_DESCRIBE)}", found.caption
    words = found.caption.split(" ")
    if kind < 0.9:  # a prefix of its caption stands behind the scene
        at = random.randrange(len(words))
        return f"{found.told}\n{' '.join(words[:at])}", " ".join(words[at:])
    holes: list[str] = []
    filled: list[str] = []
    place = 0
    while place < len(words):
        if random.random() < 0.1:
            width, mark = random.randint(1, 3), f"<extra_id_{len(filled)}>"
            holes.append(mark)
            filled.append(" ".join((mark, *words[place : place + width])))
            place += width
        else:
            holes.append(words[place])
            place += 1
    return " ".join(holes), " ".join((*filled, f"<extra_id_{len(filled)}>"))


def _collate(pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    ids = pad_sequence([torch.tensor(ids) for ids, _ in pairs], batch_first=True)
    labels = pad_sequence([torch.tensor(labels) for _, labels in pairs], batch_first=True, padding_value=IGNORE)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}
