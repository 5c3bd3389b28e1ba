"""Makes the demo's BERT: a lower-case WordPiece vocabulary, and masked words of captions and of what is asked."""

import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from vlm.batch import IGNORE
from vlm.demo.learning import by_length, learn
from vlm.demo.texts import lesson, plain_texts

CONFIG: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
}
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
STEPS = 3000
RATE = 2e-3
_VOCAB_SIZE = 700
_MASKED_SHARE = 0.25


def write_tokenizer(folder: Path) -> None:
    """Writes `vocab.txt` and `tokenizer_config.json` as BERT is published with them; every ASCII letter is in it."""
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(plain_texts(), vocab_size=_VOCAB_SIZE, special_tokens=list(MARKS), show_progress=False)
    found = trained.get_vocab()
    words = sorted(found, key=found.__getitem__)
    letters = string.ascii_lowercase + string.digits
    words += [word for letter in letters for word in (letter, f"##{letter}") if word not in found]
    words += [mark for mark in string.punctuation if mark not in found]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    facts = {"do_lower_case": True, "model_max_length": 512, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=1) + "\n")


def make_bert(folder: Path) -> Iterator[str]:
    """Writes the tokenizer, the configuration and the pretrained weights.

    Yields:
        A line of progress every hundred steps.
    """
    write_tokenizer(folder)
    tokenizer = BertTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **CONFIG))

    def make(index: int) -> tuple[list[int], list[int]]:
        return _masked(tokenizer.backend_tokenizer, Random(f"bert {index}"))

    chosen = by_length(make, lambda text: len(text[0]), first=0, steps=STEPS, batch=32)
    yield from learn(model, map(_collate, chosen), steps=STEPS, rate=RATE)
    model.half().save_pretrained(folder)


def _masked(tokenizer: tokenizers.Tokenizer, random: Random) -> tuple[list[int], list[int]]:
    """(ids, labels) of a caption, of a question with its answer, or of both one behind the other."""
    found = lesson(random)
    pair = [found.caption, " ".join(random.choice(found.asked))]
    kind = random.random()
    texts = pair if kind < 0.5 else pair[:1] if kind < 0.8 else pair[1:]
    ids = [MARKS.index("[CLS]")]
    for text in texts:
        ids += [*tokenizer.encode(text, add_special_tokens=False).ids, MARKS.index("[SEP]")]
    labels = [IGNORE] * len(ids)
    for place, token in enumerate(ids):
        if token < len(MARKS) or random.random() >= _MASKED_SHARE:
            continue
        labels[place] = token
        kind = random.random()  # BERT's own shares
        if kind < 0.8:
            ids[place] = MARKS.index("[MASK]")
        elif kind < 0.9:
            ids[place] = random.randrange(len(MARKS), tokenizer.get_vocab_size())
    return ids, labels


def _collate(texts: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    ids = pad_sequence([torch.tensor(ids) for ids, _ in texts], batch_first=True)
    labels = pad_sequence([torch.tensor(labels) for _, labels in texts], batch_first=True, padding_value=IGNORE)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}
