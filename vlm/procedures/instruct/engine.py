"""Many records at once, each until it is accepted or given up, with everything that was said in the ledger."""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from tqdm import tqdm

from vlm.errors import SampleError, UserError
from vlm.procedures.instruct.answers import Rejected
from vlm.procedures.instruct.ledger import Key, Ledger
from vlm.procedures.instruct.models import Model, Reply, Turn
from vlm.procedures.instruct.procedure import Ask, Outcome, Procedure, Role, outcome
from vlm.procedures.instruct.rate_limiter import Clock, Stopped
from vlm.procedures.instruct.records import Item
from vlm.procedures.instruct.task_specs import Sampling
from vlm.seeding import seed_from

MAX_INITIAL_REJECTIONS = 20
"""So many records of a start, all rejected: something is wrong that more requests do not mend."""
SHUTDOWN_GRACE_S = 10.0


class Engine:
    """Runs a procedure over records.

    Args:
        models: by what they do; one may do both.
        attempts: at each record.
        parallel: requests under way at once.
        clock: is stopped when this ends.
    """

    def __init__(
        self,
        procedure: Procedure,
        models: Mapping[Role, Model],
        ledger: Ledger,
        *,
        attempts: int,
        parallel: int = 1,
        clock: Clock,
    ) -> None:
        self.procedure = procedure
        self.models = models
        self.ledger = ledger
        self.attempts = attempts
        self.parallel = parallel
        self.clock = clock

    def run(self, items: Sequence[Item]) -> dict[str, Outcome]:
        """Asks what is not in the ledger yet.

        Returns:
            {id: outcome} of the records that were rejected. The others can be read from the ledger (`accepted`).

        Raises:
            UserError: a model cannot be used, or nothing that it says.
        """
        rejected: dict[str, Outcome] = {}
        good = asked = 0
        with (
            closing(self._finished(items)) as finished,
            tqdm(total=len(items), unit="record", disable=None) as bar,
        ):
            for item, (found, was_asked) in finished:
                if found.record is None:
                    rejected[item.id] = found
                else:
                    good += was_asked
                asked += was_asked
                bar.update()
                bar.set_postfix(rejected=len(rejected), refresh=False)
                if asked == MAX_INITIAL_REJECTIONS and not good:
                    reasons = Counter(found.reasons[-1] for found in rejected.values())
                    raise UserError(
                        f"{self.ledger.path}: the first {MAX_INITIAL_REJECTIONS} records were all rejected, "
                        f"most often: {reasons.most_common(1)[0][0]}; see there what was said, and correct the model "
                        "or its options"
                    )
        return rejected

    def accepted(self, items: Sequence[Item], rejected: Mapping[str, Outcome]) -> Iterator[dict]:
        """The records of the output in the order of the input, whatever the order they were finished in."""
        for item in items:
            if item.id not in rejected:
                record = self._outcome(item, []).record
                assert record is not None, item.id
                yield record

    def _one(self, item: Item) -> tuple[Outcome, bool]:
        """What becomes of a record, and whether a model was asked for it in this start."""
        asked: list[Key] = []
        return self._outcome(item, asked), bool(asked)

    def _outcome(self, item: Item, asked: list[Key]) -> Outcome:
        # an attempt that an earlier start paid for counts, also where this one would make fewer
        attempts = max(self.attempts, self.ledger.attempts[item.id])
        return outcome(self.procedure, item, self._ask_at(item, asked), attempts=attempts)

    def _ask_at(self, item: Item, asked: list[Key]) -> Callable[[int], Ask]:
        def at(number: int) -> Ask:
            def ask(step: str, turns: list[Turn], *, role: Role, sampling: Sampling) -> Reply:
                key = Key(item.id, number, step)
                if key not in self.ledger:
                    asked.append(key)
                    self.ledger.add(key, self._said(key, turns, role, sampling))
                said = self.ledger[key]
                if "rejected" in said:
                    raise Rejected(said["rejected"])
                return Reply(said["text"], said["end"], said["tokens"])

            return ask

        return at

    def _said(self, key: Key, turns: list[Turn], role: Role, sampling: Sampling) -> dict[str, Any]:
        """What a model says now, in the form of the ledger."""
        try:
            reply = self.models[role].reply(turns, seed=seed_from(self.procedure.seed, *key), sampling=sampling)
        except SampleError as error:  # not for the ledger: the image may be mended
            raise Rejected(error.reason, is_final=True) from error
        except Rejected as error:
            return {"rejected": error.reason}
        return {"text": reply.text, "end": reply.end, "tokens": reply.tokens}

    def _finished(self, items: Sequence[Item]) -> Generator[tuple[Item, tuple[Outcome, bool]], None, None]:
        """Records with what became of them, as they are finished.

        What a thread dies of is raised here. Requests that are under way when this ends get a moment to come back:
        they are paid for.
        """
        waiting, lock = iter(items), threading.Lock()
        finished: queue.SimpleQueue = queue.SimpleQueue()

        def work() -> None:
            try:
                while not self.clock.stopping.is_set():
                    with lock:
                        item = next(waiting, None)
                    if item is None:
                        break
                    finished.put((item, self._one(item)))
            except Stopped:
                pass
            except BaseException as error:
                finished.put(error)
            finished.put(None)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.parallel, len(items)))]
        for thread in threads:
            thread.start()
        try:
            working = len(threads)
            while working:
                found = finished.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    working -= 1
                else:
                    yield found
        finally:
            self.clock.stop()
            end = time.monotonic() + SHUTDOWN_GRACE_S
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
