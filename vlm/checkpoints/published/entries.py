"""Entries of published configuration files. Each one is read, has the one value that is computed here, is known to be
harmless, or is refused: what changes numbers never passes unseen.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.errors import UserError

BOOKKEEPING = frozenset(
    {
        # where the files come from and how they were saved; each tensor keeps the type it has in its file
        *("_name_or_path", "_commit_hash", "architectures", "auto_map", "custom_pipelines", "model_type"),
        *("transformers_version", "torch_dtype", "dtype", "use_safetensors", "_attn_implementation_autoset"),
        *("attn_implementation", "_attn_implementation", "_flash_attn_2_enabled"),
        # what new weights start from; there are none
        *("initializer_range", "initializer_factor"),
        # what a forward pass returns beside the logits, and whether it keeps keys and values
        *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate"),
        *("output_scores", "torchscript", "use_return_dict"),
        # of classifiers and other tasks
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
        "ignore_index",
        *("is_encoder_decoder", "is_decoder", "decoder_start_token_id", "tokenizer_class", "prefix", "use_bfloat16"),
        # memory against time: layers in pieces of equal result
        *("chunk_size_feed_forward", "pretraining_tp"),
        # marks of the tokenizer, whose own files count
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "suppress_tokens", "begin_suppress_tokens"),
        *("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "exponential_decay_length_penalty"),
        # how answers are searched for, which `vlm predict` has options for
        *("max_length", "min_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "typical_p"),
        *("num_beams", "num_beam_groups", "num_return_sequences", "early_stopping", "diversity_penalty"),
        *("length_penalty", "repetition_penalty", "encoder_no_repeat_ngram_size", "no_repeat_ngram_size"),
        *("remove_invalid_values",),
    }
)  # fmt: skip
"""Entries of any `config.json` that change nothing that is computed here, or that other files say."""
OFF: tuple[Any, ...] = (None, False, {}, [], "")
"""Values of an entry that switches something on."""


@dataclass(frozen=True)
class Entries:
    """What is known of the entries of one kind of file.

    Attributes:
        read: those whose values are obeyed.
        only: {entry: values that are computed here}; another is refused. None means that the entry is not there.
        harmless: those that change nothing, beside `BOOKKEEPING`.
        of: entries that the class of transformers has which opens this file: it ignores all others. None: the file is
            read by code of its own, so that an entry nobody knows may change anything.
    """

    read: frozenset[str]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    of: Collection[str] | None = None

    def check(self, content: Mapping[str, Any], file: str | Path) -> None:
        """Refuses what is neither obeyed nor harmless.

        Raises:
            UserError: names the file, the entry and its value.
        """
        known = self.read | self.harmless | BOOKKEEPING
        for key, value in content.items():
            if key in self.only:
                if value is not None and not any(_same(value, allowed) for allowed in self.only[key]):
                    raise refusal(file, key, value, expected=self.only[key])
            elif value is not None and key not in known and (self.of is None or key in self.of):
                raise UserError(
                    f"{file}: {key} is {_shown(value)}, an entry that is not known here and may change what is "
                    "computed; take it out of the file if it changes nothing"
                )


def refusal(file: str | Path, key: str, value: Any, *, expected: Collection[Any]) -> UserError:
    """The error for a value that is not computed here."""
    known = " or ".join(dict.fromkeys(_shown(item) for item in expected if item is not None))
    return UserError(
        f"{file}: {key} is {_shown(value)}, and only {known} is computed here; weights that were trained otherwise "
        "cannot be opened, so correct the entry only if it is wrong"
    )


def read_json(file: Path) -> dict[str, Any] | None:
    """The content of a file of settings; None where there is no such file.

    Raises:
        UserError: it holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{file}: is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no settings; is it the file of these weights?")
    return content


def read_config_json(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder of weights.

    Raises:
        UserError: there is none.
    """
    file = folder / "config.json"
    if (content := read_json(file)) is None:
        raise UserError(f"{file}: missing; it says the number of heads, which the tensors do not")
    return content


def _same(value: Any, allowed: Any) -> bool:
    if isinstance(allowed, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return abs(value - allowed) <= 1e-6 * max(1.0, abs(allowed))
    if isinstance(allowed, bool) or isinstance(value, bool):
        return value is allowed
    if isinstance(allowed, (list, tuple)) and isinstance(value, (list, tuple)):
        return len(value) == len(allowed) and all(_same(*pair) for pair in zip(value, allowed, strict=True))
    return bool(value == allowed)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
