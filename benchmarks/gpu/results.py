"""What a phase finds, written as it is found."""

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Results:
    """Where a phase runs and writes.

    Attributes:
        out: folder of all phases.
        device: CUDA's, or the CPU's for a small try.
        shrink: packs are this many times smaller.
    """

    out: Path
    phase: str
    device: torch.device
    shrink: int = 1

    @property
    def file(self) -> Path:
        return self.out / "results.jsonl"

    @property
    def is_small(self) -> bool:
        return self.device.type == "cpu"

    def note(self, name: str, ok: bool | None, value: str, **more: Any) -> None:
        """Adds a line: `ok` says whether a check held; None: nothing was checked."""
        entry = {"phase": self.phase, "name": name, "ok": ok, "value": value, **more}
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        mark = {True: "right", False: "WRONG", None: ""}[ok]
        print(f"{mark:5} {self.phase}: {name}: {value}", flush=True)

    @contextmanager
    def checking(self, name: str) -> Iterator[None]:
        """Inside, an exception is a failed check and no more."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            with open(self.out / "errors.txt", "a", encoding="utf-8") as stream:
                stream.write(f"== {self.phase}: {name}\n{traceback.format_exc()}\n")
            self.note(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
