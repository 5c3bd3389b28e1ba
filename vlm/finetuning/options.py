"""The words of `vlm fit`, `check-data` and `show-data` that say what to start from and what to train on."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from vlm.checkpoints.files.atomic import atomic_file
from vlm.command_line.run_entry import is_first_process
from vlm.errors import UserError
from vlm.finetuning.start import Start, open_start
from vlm.options import OptionParser

METHODS = ("lora", "dora", "qlora")
_DATA_CLASSES = ("InstructionData", "MultitaskData", "PretrainingData", "VisionLanguageData")


@dataclass(frozen=True)
class FineTuning:
    """Options of `vlm fit` in the place of the short words.

    Attributes:
        options: what LightningCLI is told.
        summary: lines for a person; empty where only `--weights` was given.
        folder: run folder that gets `finetune.yaml`, the settings as one file.
    """

    options: list[str]
    summary: Sequence[str] = ()
    folder: Path | None = None

    @property
    def tell(self) -> Callable[[str], None] | None:
        """Says what is going to be trained and keeps it; None where the user's own files say it."""
        return None if self.folder is None else self._tell

    def _tell(self, settings: str) -> None:
        if not is_first_process():
            return
        assert self.folder is not None
        file = self.folder / "finetune.yaml"
        with atomic_file(file) as opened:
            opened.write(settings.encode())
        print(*self.summary, f"\n{settings}", f"the same again: vlm fit -c {file}", sep="\n", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(command="fit", add_help=False)
    parser.add_argument("--weights")
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--images", type=Path)
    for method in METHODS:
        parser.add_argument(f"--{method}", action="store_true")
    parser.add_argument("--val-split", "--val_split", type=float)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", "--batch_size", type=int)
    return parser


def read_options(options: Sequence[str], *, on_gpu: bool | None = None) -> FineTuning:
    """Replaces `--weights` and what goes with it by options of a stage; without it they stay as they are.

    ::

        --weights X -c STAGE.yaml                         the stage of these files, from X
        --weights X --data FILE [--data FILE ...]         fine-tuning of X as its recipe does it
          [--images DIR] [--val-split SHARE]              image root; share that is held out, by image
          [--lora | --dora | --qlora] [--lora.rank=N]     adapters in the place of all weights
          [--lr RATE] [--epochs N] [--batch-size N]       in the place of the recipe's
          [--run DIR]                                     by default named after X and the data

    Args:
        on_gpu: what `--data` is made settings for; None: this machine.

    Raises:
        UserError: weights or data that are not there or not known, or words that contradict each other.
    """
    words, settings = _split_settings(options)
    own, rest = _parser().parse_known_args(words)
    classes = [word for word in own.data if _is_class(word)]
    own.data = [word for word in own.data if not _is_class(word)]
    rest = [*rest, *(word for name in classes for word in ("--data", name))]
    if own.weights is None:
        if own.data:
            raise UserError(f"--data {own.data[0]}: say what to fine-tune with --weights, or name a class of vlm.data")
        return FineTuning(list(options))
    start = open_start(own.weights)
    _check_rest(rest, start)
    if own.data:
        from vlm.finetuning.settings import make_settings

        chosen = [method for method in METHODS if getattr(own, method) or method in settings]
        if len(chosen) > 1:
            raise UserError(f"--{chosen[0]} and --{chosen[1]} both say what is trained; keep one")
        own.method, own.method_settings = (chosen[0], settings.get(chosen[0], {})) if chosen else (None, {})
        made = make_settings(start, own, on_gpu=on_gpu)
        text = json.dumps(made.settings)
        return FineTuning(["--config", text, *rest], made.summary, made.folder)
    if given := [f"--{name.replace('_', '-')}" for name, value in vars(own).items() if name != "weights" and value]:
        raise UserError(f"{given[0]} goes with --data FILE; with -c the files say it")
    if not any(_name(word) in ("-c", "--config") or _name(word).startswith("--data") for word in rest):
        raise UserError(f"--weights {own.weights}: say what to train on, with --data FILE or -c STAGE.yaml")
    return FineTuning(["--model", json.dumps(start.model), *rest, "--stage.follows", json.dumps([start.follow()])])


def _split_settings(options: Sequence[str]) -> tuple[list[str], dict[str, dict[str, object]]]:
    """Takes `--lora.KEY=VALUE` and `--lora.KEY VALUE` out: {method: {key: value}}."""
    rest: list[str] = []
    found: dict[str, dict[str, object]] = {}
    items = iter(options)
    for item in items:
        method, dot, tail = item.removeprefix("--").partition(".")
        if not (item.startswith("--") and dot and method in METHODS):
            rest.append(item)
            continue
        key, equals, value = tail.partition("=")
        found.setdefault(method, {})[key] = yaml.safe_load(value if equals else next(items, ""))
    return rest, found


def _is_class(word: str) -> bool:
    """Whether the value of `--data` is a data module of ours, not data."""
    return word.rpartition(".")[2] in _DATA_CLASSES or word.lstrip().startswith("{")


def _name(word: str) -> str:
    return word.partition("=")[0]


def _check_rest(rest: Sequence[str], start: Start) -> None:
    """Refuses options that say something else than `--weights`."""
    for at, word in enumerate(rest):
        name, equals, value = word.partition("=")
        value = value if equals else rest[at + 1] if at + 1 < len(rest) else ""
        if name in ("--stage.follows", "--stage.continues"):
            raise UserError(f"--weights and {name} both say what the stage starts from; keep one")
        if name in ("--model", "--model.class_path") and not value.lstrip().startswith("{"):
            _check_class(value, name, start)
        if name in ("-c", "--config") and Path(value).is_file():
            try:
                content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError):
                continue  # said by the parser of all options
            model = content.get("model") if isinstance(content, dict) else None
            named = model.get("class_path") if isinstance(model, dict) else model
            if isinstance(named, str):
                _check_class(named, value, start)


def _check_class(named: str, where: str, start: Start) -> None:
    ours = str(start.model["class_path"])
    if named.rpartition(".")[2] != ours.rpartition(".")[2]:
        raise UserError(
            f"{where}: its model is {named}, and --weights {start.given} are of {ours}; give files of that one"
        )
