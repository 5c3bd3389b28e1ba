"""The folder of one stage's run: who works in it, with which settings, and where to go on.

::

    <run>/<stage>/config.yaml           the resolved settings, the record of the run
                  checkpoints/last      name of the newest complete checkpoint in this folder
                  artefact/stage.json   there when the stage is finished
                  .lock                 pid and host of the process that works here
"""

import errno
import fcntl
import json
import os
import socket
import weakref
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import yaml

from vlm.checkpoints.files.atomic import atomic_file
from vlm.checkpoints.resume.pointer import read_last
from vlm.errors import UserError

HOW_IT_RUNS = (
    # the batch is fixed by `data`: how it is dealt to devices and micro-batches changes no sum
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.strategy.*",
    "trainer.accumulate_grad_batches",
    "model.*.checkpointing",
    "stage.recompute",
    "stage.recompute.*",
    "data.*num_workers",
    "data.*micro_batch_size",
    "data.*.max_tokens",
    "trainer.callbacks.callbacks.MixedPrecisionFSDP.reshard_after_forward",
    "trainer.callbacks.callbacks.MixedPrecisionFSDP.cpu_offload",
    # what is shown and kept, and when
    "trainer.callbacks.callbacks.Health*",
    "trainer.callbacks.callbacks.Predictions*",
    "trainer.callbacks.callbacks.ThroughputMonitor*",
    "trainer.callbacks.lightning.pytorch.callbacks.*ProgressBar*",
    "trainer.callbacks.lightning.pytorch.callbacks.*Monitor*",
    "trainer.logger",
    "trainer.logger.*",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.enable_checkpointing",
    "trainer.profiler",
    "trainer.profiler.*",
    "trainer.detect_anomaly",
    "trainer.num_sanity_val_steps",
    "trainer.val_check_interval",
    "trainer.check_val_every_n_epoch",
    "trainer.limit_val_batches",
    "checkpoint.*",
    "throughput.*",
    "health.*",
    "predictions.*",
    "evaluation.*",
    "data.*val_sources",
    "data.*val_sources.*",
    "data.*val_batch_size",
    "data.*test_sources",
    "data.*test_sources.*",
    "data.*shuffle_images",
    "data.*quarantine",  # by its content: the loader refuses another one
    "data.*max_bad_samples",
    # where a start ends or begins
    "trainer.max_time",
    "trainer.default_root_dir",
    "ckpt_path",
    "config",
    "config.*",
)
"""Keys (globs over dotted names) that may differ between the starts of one run: they say how it runs, not what it
computes."""

ABSENT = {
    "trainer.callbacks.callbacks.MixedPrecisionFSDP.precision": "32-true",
    "trainer.callbacks.callbacks.MixedPrecisionFSDP.reduce_dtype": "fp32",
}
"""What a key means where it is not there, if that is not null."""

_MAX_DIFF_LINES = 10
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: "weakref.WeakSet[RunLock]" = weakref.WeakSet()


class RunLock:
    """A held lock. It ends with `release`, with the `with` block, or with the process, however that dies."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        _held.add(self)

    def release(self) -> None:
        if not self._file.closed:
            self._file.truncate(0)
            self._file.close()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _forget_in_child() -> None:
    # A forked loader worker shares the open file and would hold the lock on after its parent was killed. Closing its
    # copy releases nothing: the lock goes with the last copy.
    for lock in _held:
        lock._file.close()


os.register_at_fork(after_in_child=_forget_in_child)


class RunFolder:
    """The folder of one stage's run (see the module's drawing). Nothing is made before it is needed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: RunLock | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def artefact(self) -> Path:
        return self.path / "artefact"

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def finished(self) -> bool:
        """Whether the stage ran to its end: the artefact is complete once it has its `stage.json`."""
        return (self.artefact / "stage.json").is_file()

    @property
    def shortened(self) -> str | None:
        """What cut a finished stage short, None for one of its whole length."""
        return json.loads((self.artefact / "stage.json").read_text(encoding="utf-8")).get("shortened")

    def lock(self) -> RunLock:
        """Takes the folder for this process. One process of a distributed run calls it: rank 0.

        Returns:
            The lock, usable in a `with`; this object keeps it as well.

        Raises:
            UserError: another process works here; the message names its pid and host.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / ".lock"
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  (stays open as long as the lock is held)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "which has not written its pid yet"
            file.close()
            if error.errno in _NO_LOCKS:
                raise UserError(
                    f"{path}: this filesystem has no file locks ({error.strerror}); put the run folder on another one"
                ) from error
            if not isinstance(error, BlockingIOError):
                raise
            raise UserError(
                f"{self.path}: another process works in this run folder ({owner}); "
                "wait for it, stop it, or choose another folder"
            ) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on host {socket.gethostname()}\n")
        file.flush()
        self._lock = RunLock(file)
        return self._lock

    def save_config(self, resolved: Mapping[str, Any]) -> None:
        """Writes `config.yaml`, in one step: the old one or the new one is there, never half of one."""
        text = yaml.safe_dump(_plain(resolved), sort_keys=False, allow_unicode=True)
        with atomic_file(self.config_file) as file:
            file.write(text.encode())

    def check_config(self, resolved: Mapping[str, Any], *, how_it_runs: Sequence[str] = HOW_IT_RUNS) -> None:
        """Refuses settings that compute something else than the run so far, or than the finished one. Writes nothing.

        Two spellings of one existing path are the same, and so are two places of what was moved along with the run.

        Args:
            how_it_runs: keys that may differ.

        Raises:
            UserError: the differences, at most ten, as `key: old -> new`; or `config.yaml` cannot be read.
        """
        try:
            stored = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.config_file}: cannot be read ({reason}); choose another run folder") from error
        if not isinstance(stored, dict):
            raise UserError(f"{self.config_file}: holds no settings; choose another run folder")
        # through YAML, so that both sides went the same way (1e-5 is a string in YAML 1.1, a tuple a list)
        old, new = (
            ABSENT | dict(_flatten(_named_callbacks(yaml.safe_load(yaml.safe_dump(_plain(side))))))
            for side in (stored, resolved)
        )
        roots = _root(stored), _root(resolved)
        # a key that is not there counts as null: an option added since with no value changes nothing
        differences = [
            f"  {key}: {_show(old.get(key))} -> {_show(new.get(key))}"
            for key in [*old, *(key for key in new if key not in old)]
            if not any(fnmatchcase(key, pattern) for pattern in how_it_runs)
            and not _same(old.get(key), new.get(key), roots)
        ]
        if not differences:
            return
        lines = differences[:_MAX_DIFF_LINES]
        if len(differences) > _MAX_DIFF_LINES:
            lines.append(f"  and {len(differences) - _MAX_DIFF_LINES} more")
        begun, on = ("finished", "take it as it is") if self.finished else ("started", "go on")
        raise UserError(
            f"{self.config_file}: this run was {begun} with other settings (old -> new):\n"
            + "\n".join(lines)
            + f"\nPut the old values back to {on}, or start afresh in another run folder."
        )

    def last_checkpoint(self) -> Path | None:
        """The checkpoint (a file or a folder) to go on from; None before the first one."""
        return read_last(self.checkpoints)


def _plain(value: Any) -> Any:
    """The value as `yaml.safe_dump` takes it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _named_callbacks(config: dict[str, Any]) -> dict[str, Any]:
    """`trainer.callbacks` as {class path: arguments}: adding one must not shift the names of those behind it."""
    if not isinstance(trainer := config.get("trainer"), dict):
        return config
    trainer = dict(trainer)
    entries = trainer.pop("callbacks", None) or []
    named: dict[str, Any] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        path, arguments = (
            (entry["class_path"], entry.get("init_args")) if isinstance(entry, dict) else (str(entry), None)
        )
        named[f"{path} again" if path in named else path] = arguments or {}
    return config | {"trainer": trainer | ({"callbacks": named} if named else {})}


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": [1]}} -> ("a.b.0", 1). An empty mapping or list is a value of its own."""
    items: Iterator[tuple[Any, Any]] | None = None
    if isinstance(value, dict) and value:
        items = iter(value.items())
    elif isinstance(value, list) and value:
        items = iter(enumerate(value))
    if items is None:
        yield prefix, value
        return
    for key, item in items:
        yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))


def _root(config: Mapping[str, Any]) -> str | None:
    """The folder that a run lies in, together with the stages it follows and the data it needs."""
    trainer = config.get("trainer")
    folder = trainer.get("default_root_dir") if isinstance(trainer, Mapping) else config.get("node")
    return None if folder is None else os.path.dirname(os.path.abspath(folder))


def _same(old: Any, new: Any, roots: tuple[str | None, str | None] = (None, None)) -> bool:
    if isinstance(old, bool) != isinstance(new, bool):
        return False
    if old == new:
        return True
    if isinstance(old, str) and isinstance(new, str) and os.path.exists(old) and os.path.exists(new):
        return os.path.samefile(old, new)
    if isinstance(old, str) and isinstance(new, str) and None not in roots:
        inside = [os.path.relpath(path, root) for path, root in zip((old, new), roots, strict=True)]
        return inside[0] == inside[1] and not inside[0].startswith(os.pardir) and os.sep in inside[0]
    return False


def _show(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("...").rstrip()
    return text if len(text) <= 80 else f"{text[:77]}..."
