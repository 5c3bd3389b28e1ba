"""A system as its configuration describes it, with stand-ins for files that are not here, on the meta device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vlm.bert import BertSize
from vlm.building.build import assemble
from vlm.building.inherited_surgery import PlannedSurgery
from vlm.errors import UserError
from vlm.hub import is_cached
from vlm.language import CausalLM, Seq2SeqLM, Surgery
from vlm.planning.published import known_model, known_models
from vlm.planning.tokenizer import RoughTokenizer
from vlm.stages import Stage


@dataclass
class Described:
    """What a system is built from.

    Attributes:
        system: its class.
        arguments: of its constructor; every file they name that is needed to build it is here, or has a stand-in.
        surgery: registered by callbacks.
        averages: whether moving averages of what is trained are kept.
        planned: what earlier stages will have done.
        stage: what is trained.
        paths: {part: folder or hub id of its base weights}, stand-ins or not.
        tokenizer_path: of the tokenizer that a stand-in counts for; None: the tokenizer is here.
        notes: what was assumed, for people.
    """

    system: type
    arguments: Mapping[str, Any]
    surgery: Sequence[Surgery]
    averages: bool
    planned: Sequence[PlannedSurgery]
    stage: Stage
    paths: Mapping[str, str]
    tokenizer_path: str | None = None
    notes: list[str] = field(default_factory=list)

    def make(self, *, stage: Stage | None = None, surgery: Sequence[Surgery] = (), **arguments: Any) -> Any:
        """The system, not built.

        Args:
            stage: in the place of its own.
            surgery: besides its own.
            **arguments: in the place of its own.
        """
        module = self.system(**{**self.arguments, **arguments})
        module.stage = stage or self.stage
        module.averages = {} if self.averages else None
        for operation in (*self.surgery, *surgery):
            module.register_surgery(operation)
        return module

    def build(self, **changes: Any) -> Any:
        """The system, built on the meta device; `changes` as in `make`."""
        module = self.make(**changes)
        with torch.device("meta"):
            assemble(module, planned=self.planned)
        return module


def described(module: Any, stage: Stage, planned: Sequence[PlannedSurgery] = ()) -> Described:
    """A system and its stage, with stand-ins for what is not here.

    Args:
        module: as configured, not built; callbacks have registered their surgery.
        planned: what earlier stages will have done.

    Raises:
        UserError: nothing is known of the language model.
    """
    arguments, notes = dict(module.arguments), []
    paths = {name: part.weights for name, part in arguments.items() if getattr(part, "weights", None)}
    language = arguments.get("language")
    if isinstance(language, (CausalLM, Seq2SeqLM)) and language.path is not None and not Path(language.path).is_dir():
        arguments["language"], note = _known(language)
        notes.append(note)
    tokenizer, missing = arguments.get("tokenizer"), None
    if tokenizer is not None and not _is_here(tokenizer.path):
        missing = tokenizer.path
        text = arguments.get("language") or arguments["qformer"]
        # a BERT's table counts the tokens that its tokenizer adds
        has_added = isinstance(text, BertSize)
        rows = text.vocab_size - len(tokenizer.added_tokens) if has_added else text.transformers_config().vocab_size
        arguments["tokenizer"] = RoughTokenizer(
            missing, rows=rows, add_bos=tokenizer.add_bos, added_tokens=tokenizer.added_tokens
        )
    reader = arguments.get("qformer_tokenizer")
    if (
        reader is not None
        and not Path(reader.path).expanduser().exists()
        and not is_cached(reader.path, ("vocab.txt",))
    ):
        arguments["qformer_tokenizer"] = RoughTokenizer(
            reader.path, rows=arguments["qformer"].vocab_size, add_bos=False, added_tokens=reader.added_tokens
        )
    stage, lost = _without_missing(stage)
    notes += lost
    averages = module.averages is not None
    return Described(type(module), arguments, tuple(module.surgery), averages, planned, stage, paths, missing, notes)


def _known(language: CausalLM | Seq2SeqLM) -> tuple[CausalLM | Seq2SeqLM, str]:
    assert language.path is not None
    known = known_model(language.path)
    if known is None:
        raise UserError(
            f"language.path: {language.path} is not on this disk, and its sizes are not known here (known are "
            f"{', '.join(known_models())}); fetch its config.json into a folder and give that, or write its entries "
            "under language.config"
        )
    note = f"language model: {language.path} is not on this disk; sizes as published"
    return replace(language, path=None, config={**known.config, **language.config}), note


def _is_here(path: str) -> bool:
    """Whether a tokenizer can be opened without a download."""
    return Path(path).expanduser().exists() or is_cached(
        path, ("tokenizer.model", "tokenizer.json", "vocab.txt", "qwen.tiktoken")
    )


def _without_missing(stage: Stage) -> tuple[Stage, list[str]]:
    """A stage that starts from what is there: an artefact that is not changes no size but by its surgery."""
    gone = [f.artefact for f in stage.sources if not (Path(f.artefact) / "stage.json").is_file()]
    if not gone:
        return stage, []
    follows = [follow for follow in stage.follows if follow.artefact not in gone]
    continues = None if stage.continues in gone else stage.continues
    note = f"it follows {' and '.join(gone)}, not there yet; if weights there were trained with surgery, add it here"
    return replace(stage, follows=follows, continues=continues), [note]
