"""From a record to a conversation: what is asked of which model, step by step, and what becomes of the answers."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, Protocol

from vlm.procedures.instruct.answers import Rejected, check, count_words, rounds_of, tidy
from vlm.procedures.instruct.models import Reply, Turn
from vlm.procedures.instruct.records import Item
from vlm.procedures.instruct.task_specs import Kind, Sampling, ask_about, detailed_request, lines
from vlm.seeding import seed_from

Role = Literal["writer", "describer"]
NUM_STYLES = 5  # as Mini-Gemini shows


class Ask(Protocol):
    """Puts a question to a model, or finds its answer in the ledger."""

    def __call__(self, step: str, turns: list[Turn], *, role: Role, sampling: Sampling) -> Reply: ...


@dataclass(frozen=True)
class Procedure:
    """What is done with every record.

    Attributes:
        sampling: of the writer.
        describing: of the model that describes (curate).
        styles: prompts that five are drawn from (recaption, in-context).
    """

    kind: Kind
    seed: int
    sampling: Sampling
    describing: Sampling
    styles: tuple[str, ...]

    def attempt(self, item: Item, ask: Ask) -> dict[str, Any]:
        """One attempt at a record of LLaVA's form.

        Nothing in it depends on other records: every draw is made from the seed and the record's id.

        Raises:
            Rejected: what came back cannot be used.
        """
        if self.kind.form == "curate":
            return self._record(item, [(self._question(item), self._curated(item, ask))])
        text = self._said(ask("answer", self.turns(item), role="writer", sampling=self.sampling))
        if self.kind.skip is not None and text.strip(".!\"'") == self.kind.skip:
            raise Rejected("the model advises against this request", is_final=True)
        if self.kind.form == "answer":
            return self._record(item, [(self._question(item), check(text, self.kind, part="answer"))])
        rounds = rounds_of(text, self.kind)
        if self.kind.form == "pairs":
            return self._record(item, rounds)
        ((request, prompt),) = rounds
        turns = [*item.turns, ("human", f"{request} <GEN>"), ("gpt", f"<h>{' '.join(prompt.split())}</h>")]
        return {"id": item.id, "conversations": [{"from": role, "value": text} for role, text in turns]}

    def turns(self, item: Item) -> list[Turn]:
        """What the writer is asked about a record."""
        names = ("Person", "Assistant")
        request = ask_about(
            self.kind.request,
            captions=lines(item.captions),
            boxes=lines(item.boxes),
            question=item.question or "",
            dialogue="\n\n".join(f"{names[role == 'gpt']}: {text}" for role, text in item.turns),
        )
        drawn = Random(seed_from(self.seed, item.id, "styles")).sample(self.styles, min(NUM_STYLES, len(self.styles)))
        system = ask_about(self.kind.system, styles=lines([f"- {style}" for style in drawn]))
        examples = [
            turn for asked, answer in self.kind.examples for turn in (Turn("user", asked), Turn("assistant", answer))
        ]
        picture = item.sample if self.kind.sees else None
        return [Turn("system", system), *examples, Turn("user", request, picture)]

    def _curated(self, item: Item, ask: Ask) -> str:
        kind, step = self.kind, Turn("user", self.kind.describe, item.sample)
        first = ask("describe", [step], role="describer", sampling=self.describing)
        description = self._said(first, may_be_cut=True)
        if not description:
            raise Rejected("empty answer")
        tokens = count_words([description]) if first.tokens is None else first.tokens
        if tokens < kind.short:
            going_on = [step, Turn("assistant", description), Turn("user", kind.go_on)]
            more = self._said(ask("continue", going_on, role="describer", sampling=self.describing), may_be_cut=True)
            description = f"{description} {more}".strip()
        repairing = [Turn("system", kind.system), Turn("user", ask_about(kind.request, description=description))]
        repaired = self._said(ask("repair", repairing, role="writer", sampling=self.sampling))
        return check(repaired, kind, part="answer")

    def _said(self, reply: Reply, *, may_be_cut: bool = False) -> str:
        if reply.end == "refused":
            raise Rejected("refuses")
        if reply.end == "length" and not may_be_cut:
            raise Rejected("cut off by --max_tokens")
        return tidy(reply.text)

    def _question(self, item: Item) -> str:
        if self.kind.question == "record":
            assert item.question is not None
            return item.question
        return detailed_request(self.seed, item.id) if self.kind.question is not None else ""

    def _record(self, item: Item, rounds: list[tuple[str, str]]) -> dict[str, Any]:
        record: dict[str, Any] = {"id": item.id}
        turns = [(role, text) for pair in rounds for role, text in zip(("human", "gpt"), pair, strict=True)]
        if item.image is not None:
            record["image"] = item.image
            question = turns[0][1]
            in_front = Random(seed_from(self.seed, item.id, "place")).random() < 0.5
            asked = ["<image>", question] if in_front else [question, "<image>"]
            turns[0] = ("human", "\n".join(part for part in asked if part))
        return record | {"conversations": [{"from": role, "value": text} for role, text in turns]}


@dataclass(frozen=True)
class Outcome:
    """What became of a record.

    Attributes:
        record: of the output; None where every attempt was rejected.
        reasons: of every rejected attempt.
    """

    record: dict[str, Any] | None
    reasons: tuple[str, ...] = ()


def outcome(procedure: Procedure, item: Item, ask_at: Callable[[int], Ask], *, attempts: int) -> Outcome:
    """Attempts until one is accepted. `ask_at(number)` puts the questions of an attempt."""
    reasons: list[str] = []
    for number in range(attempts):
        try:
            return Outcome(procedure.attempt(item, ask_at(number)), tuple(reasons))
        except Rejected as error:
            reasons.append(error.reason)
            if error.is_final:
                break
    return Outcome(None, tuple(reasons))
