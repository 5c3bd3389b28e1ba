"""Pretrains the demo's language model on text: scenes told or drawn in words, questions about them, and small talk.

It has never met an image, a patch or a connector. What it brings is what a language model brings to every published
system: the words, the form of the answers, and how to find in its context what is asked for.
"""

from collections.abc import Iterator, Sequence
from random import Random

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from vlm.batch import IGNORE
from vlm.demo import tasks
from vlm.demo.learning import by_length, learn
from vlm.demo.scenes import make_scene
from vlm.prompts import TextSpan, Tokenized, Tokenizer, get_template, tokenize
from vlm.sample import Message, TextPart

_PLAIN_SHARE = 0.2
_TALK_SHARE = 0.05
_GRID_SHARE = 0.8
_CHINESE_SHARE = 0.3
_BARE_SHARE = 0.7
_CELLS = (2, 3, 4, 5, 7)
CHAT_TEMPLATES = ("v1", "v1", "v0", "v0", "mpt", "chatml_direct", "llama_2", "mistral_instruct")
"""What chat tuning draws from: of these the systems' language models know one each."""
_TURNS = 8
_CHOICE_SHARE = 0.35  # of the English documents of chat tuning that ask about a scene


def document(index: int, tokenizer: Tokenizer, *, templates: Sequence[str] = ("v1",)) -> Tokenized:
    """Text number `index`: a dialogue, or a scene told in words with its caption or questions about it.

    Args:
        templates: names of conversation templates, one of which is drawn. Where there are several, for chat tuning,
            the scene may stand behind the first question as well, and a question may have lettered options.
    """
    random = Random(f"document {index}")
    language: tasks.Language = "zh" if random.random() < _CHINESE_SHARE else "en"
    scene = make_scene(random, split="train", size=96)
    kind = random.random()
    is_bare = random.random() < _BARE_SHARE  # without the long fixed texts, which are soon known
    is_grid = random.random() < _GRID_SHARE
    is_chat = len(templates) > 1
    if is_grid:
        told = tasks.as_grid(scene, language, cells=random.choice(_CELLS))
    else:
        told = tasks.as_lines(scene, language, random)
    if kind < _PLAIN_SHARE:
        return tokenize([TextSpan(f"{told}\n"), TextSpan(f"{tasks.caption(scene, language)}\n", True)], tokenizer)
    if kind < _PLAIN_SHARE + _TALK_SHARE:
        pairs = [(turn.question, turn.answer) for turn in tasks.dialogue(random, language)]
    else:
        asked = tasks.questions(scene, language, random)
        # a drawing does not tell where exactly a card ends
        asked = [turn for turn in asked if not (is_grid and turn.task in ("refer", "ground"))]
        asked = random.sample(asked, min(_TURNS, len(asked)))
        request = f"\n{tasks.SHORT[language]}" if is_bare else ""
        if is_chat and language == "en" and random.random() < _CHOICE_SHARE:
            pairs = [_with_options(turn, random) for turn in asked if turn.task in tasks.OPTIONS]
        else:
            pairs = [(turn.question.removesuffix(request), turn.answer) for turn in asked]
        if random.random() < 0.3:
            pairs.append((random.choice(tasks.CAPTION_REQUESTS[language]), tasks.caption(scene, language)))
        behind = is_chat and random.random() < 0.5
        pairs[0] = (f"{pairs[0][0]}\n{told}" if behind else f"{told}\n{pairs[0][0]}", pairs[0][1])
    roles = ("user", "assistant")
    messages = [Message(role, (TextPart(text),)) for pair in pairs for role, text in zip(roles, pair, strict=True)]
    if is_bare:
        messages.insert(0, Message("system", (TextPart("."),)))
    name = random.choice(templates) if is_chat else templates[0]
    return tokenize(get_template(name).render(messages), tokenizer)


def _with_options(turn: tasks.Turn, random: Random) -> tuple[str, str]:
    """(question with lettered options, answer with its letter)."""
    found = tasks.choices(turn.answer, tasks.OPTIONS[turn.task], random)
    options = " ".join(f"({letter}) {option}" for letter, option in zip("ABCD", found, strict=False))
    question = turn.question.removesuffix(f"\n{tasks.SHORT['en']}")
    said = f"So it is {turn.answer}. " if random.random() < 0.5 else ""
    return f"{question}\nContext: N/A\nOptions: {options}", f"{said}The answer is {'ABCD'[found.index(turn.answer)]}."


def train_language(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    *,
    steps: int,
    first: int = 0,
    batch: int = 16,
    rate: float = 1e-3,
    templates: Sequence[str] = ("v1",),
) -> Iterator[str]:
    """Trains a causal language model in place on documents of `document`, the answers from what stands before them.

    Args:
        steps: of one cycle of the learning rate.
        first: number of steps trained before, whose documents do not come again.
        templates: of the conversations (`document`).

    Yields:
        A line of progress every hundred steps.
    """

    def make(index: int) -> Tokenized:
        return document(index, tokenizer, templates=templates)

    chosen = by_length(make, lambda found: len(found.ids), first=first, steps=steps, batch=batch)
    yield from learn(model, map(collate, chosen), first=first, steps=steps, rate=rate)


def collate(documents: Sequence[Tokenized]) -> dict[str, Tensor]:
    """Rows of a batch as a model of transformers takes them, padded on the right."""
    ids = pad_sequence([torch.tensor(found.ids) for found in documents], batch_first=True)
    labels = [torch.tensor(found.labels) for found in documents]
    return {"input_ids": ids, "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE)}
