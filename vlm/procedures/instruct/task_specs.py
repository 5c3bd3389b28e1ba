"""What can be asked for: the prompts of the papers' data as files (`prompts/*.yaml`), and how answers are read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from vlm.procedures.llava_captions import requests
from vlm.seeding import seed_from

PROMPTS = Path(__file__).parent / "prompts"
NAMES = (
    *("conversation", "detail", "reasoning"),
    *("image-conversation", "image-detail", "image-reasoning", "image-answer"),
    *("recaption", "in-context"),
    "curate",
)


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_p: nucleus that tokens are drawn from.
        max_tokens: limit on the answer.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 1024


@dataclass(frozen=True)
class Box:
    """An object and where it is, as shares of the picture's width and height."""

    name: str
    left: float
    top: float
    right: float
    bottom: float

    def __str__(self) -> str:
        return f"{self.name}: [{self.left:.3f}, {self.top:.3f}, {self.right:.3f}, {self.bottom:.3f}]"


@dataclass(frozen=True)
class Kind:
    """One kind of data.

    Attributes:
        name: on the command line.
        what: it makes, in a line.
        needs: what a record must bring: `captions`, `image`, `question`, `turns`; `boxes` are taken where it has them.
        sees: whether the model is shown the image.
        form: how an answer is read: `pairs` of question and answer, one `answer`, a request and a prompt
            (`generation`), or MiniGPT-4's steps (`curate`).
        system: instructions. `{styles}` is the place of prompts for a diffusion model.
        request: what is asked about a record, with places for what it brings.
        examples: (request, answer) pairs that come first.
        question: where the question of an `answer` comes from: LLaVA's `detailed` requests, or the `record`; None: the
            stage that trains on it asks (`data.instructions`).
        skip: an answer that says the record should not be used.
        attempts: at a usable answer, by default.
        sampling: by default.
        describing: the same for the model that describes (curate).
        limits: of rounds, and of questions and answers in characters: (least, most).
        forbidden: patterns that no answer may hold, by the name of their group.
        may_repeat: whether a sentence may stand in an answer twice, as in a song; elsewhere it is a model's slip.
        describe: what the describing model is asked first (curate).
        go_on: what it is asked where it was shorter than `short` tokens (curate).
        short: see `go_on`.
        source: content of the files, by which a later start tells whether it asks the same.
    """

    name: str
    what: str
    needs: frozenset[str]
    sees: bool
    form: Literal["pairs", "answer", "generation", "curate"]
    system: str
    request: str
    sampling: Sampling
    describing: Sampling
    limits: Mapping[str, tuple[int, int]]
    forbidden: Mapping[str, tuple[re.Pattern[str], ...]]
    may_repeat: bool = False
    examples: tuple[tuple[str, str], ...] = ()
    question: str | None = None
    skip: str | None = None
    attempts: int = 3
    describe: str = ""
    go_on: str = ""
    short: int = 0
    source: Mapping[str, Any] = field(default_factory=dict)


def ask_about(request: str, **parts: str) -> str:
    """A request with its places filled in; `str.format` would trip over braces in what a record brings."""
    return re.sub(r"\{(\w+)\}", lambda match: parts.get(match[1], match[0]), request).strip()


def lines(values: Sequence[object]) -> str:
    return "\n".join(map(str, values))


@cache
def load_kind(name: str) -> Kind:
    """A kind by its name."""
    data = _read(f"{name}.yaml")
    assert data["form"] in ("pairs", "answer", "generation", "curate"), name
    rules = _read("rules.yaml")
    return Kind(
        name=name,
        what=data["what"],
        needs=frozenset(data["needs"]),
        sees=data.get("sees", False),
        form=data["form"],
        system=data["system"].strip(),
        request=data["request"],
        sampling=Sampling(max_tokens=data["max_tokens"]),
        describing=Sampling(**data.get("describing", {})),
        limits={key: (least, most) for key, (least, most) in data["limits"].items()},
        forbidden={
            group: tuple(re.compile(pattern, re.IGNORECASE) for pattern in rules[group]) for group in data["forbidden"]
        },
        may_repeat=data.get("may_repeat", False),
        examples=tuple(_example(entry, data["request"]) for entry in data.get("examples", ())),
        question=data.get("question"),
        skip=data.get("skip"),
        attempts=data.get("attempts", 3),
        describe=data.get("describe", ""),
        go_on=data.get("continue", ""),
        short=data.get("short", 0),
        source=data | {"rules": {group: rules[group] for group in data["forbidden"]}},
    )


@cache
def styles() -> tuple[str, ...]:
    """Prompts for a diffusion model that show the style to write in."""
    return tuple(_read("styles.yaml"))


def detailed_request(seed: int, name: str) -> str:
    """One of LLaVA's 16 requests for a detailed description, drawn from the seed and the record's id alone."""
    return requests("detailed")[seed_from(seed, name, "request") % len(requests("detailed"))]


def _example(entry: Mapping[str, Any], request: str) -> tuple[str, str]:
    boxes = [Box(box["name"], *box["box"]) for box in entry.get("boxes", ())]
    asked = ask_about(request, captions=lines(entry["captions"]), boxes=lines(boxes))
    if "answer" in entry:
        return asked, entry["answer"]
    blocks = (f"Question:\n{turn['question']}\n===\nAnswer:\n{turn['answer']}\n===" for turn in entry["rounds"])
    return asked, lines(list(blocks))


def _read(name: str) -> Any:
    return yaml.safe_load((PROMPTS / name).read_text(encoding="utf-8"))
