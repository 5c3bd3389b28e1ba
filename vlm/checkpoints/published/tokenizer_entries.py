"""The tokenizer that a published folder's files describe, as one of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import SentencePieceProcessor

from vlm.checkpoints.published.entries import Entries, read_json
from vlm.errors import UserError

_HARMLESS = frozenset(
    {
        # marks and special tokens; of LLaMA's the model itself has them, and templates write their own ends of a turn
        *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
        *("additional_special_tokens", "extra_special_tokens", "special_tokens_map_file", "image_token"),
        # templates of ours say how a model is talked to
        *("chat_template", "use_default_system_prompt", "processor_class", "response_schema"),
        # rows have no padding; a sample that is too long is an error
        *("model_max_length", "padding_side", "truncation_side", "max_length", "stride", "truncation_strategy"),
        *("pad_to_multiple_of", "pad_token_type_id", "model_input_names", "padding", "truncation"),
        # how ids become text again, which is a matter of ours
        *("clean_up_tokenization_spaces", "spaces_between_special_tokens", "errors"),
        # where the files come from and how they are opened
        *("name_or_path", "tokenizer_file", "vocab_file", "trust_remote_code", "is_local"),
        *("local_files_only", "backend", "use_fast", "from_slow", "auto_map", "init_inputs"),
        *("tokenizer_type", "tokenizer_object"),
    }
)  # fmt: skip
_READ = frozenset({"legacy", "add_bos_token", "tokenizer_class", "added_tokens_decoder"})
_LLAMA_ONLY: dict[str, tuple[Any, ...]] = {
    "add_eos_token": (False,),
    "add_prefix_space": (True,),
    "sp_model_kwargs": ({},),
    "split_special_tokens": (False,),
    "do_lower_case": (False,),
    "tokenizer_class": ("LlamaTokenizer", "LlamaTokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast"),
}
_IMAGE_TOKENS = frozenset({"<image>", "<pad>"})
"""Of Hugging Face folders: images and padding take their places without tokens."""


def describe_tokenizer(
    folder: Path, *, rewritten: bool = False, added: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`class_path` and `init_args` of the tokenizer in a folder.

    Args:
        rewritten: the SentencePiece model alone does not say how it is used (Gemma), so its `tokenizer.json` counts.
        added: arguments of a SentencePiece tokenizer for tokens that the folder adds to it on purpose.

    Raises:
        UserError: there is none, or it makes other ids than ours would.
    """
    has_model, has_json = ((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    if not (has_model or has_json):
        raise UserError(f"{folder}: has neither tokenizer.model nor tokenizer.json; put the tokenizer's files beside")
    known = frozenset({*(added or {}).get("added_tokens", ()), (added or {}).get("pad_token", "<pad>")})
    strange = None if rewritten or not has_model else _strange_token(folder, known)
    if has_json and (rewritten or strange or not has_model):
        arguments = {"path": str(folder), "add_bos": starts_with_bos(folder)}
        return {"class_path": "vlm.prompts.HubTokenizer", "init_args": arguments}
    if strange:
        raise UserError(strange)
    arguments = {"path": str(folder), **_llama_settings(folder), **(added or {})}
    return {"class_path": "vlm.prompts.LlamaTokenizer", "init_args": arguments}


def describe_t5_tokenizer(folder: Path) -> dict[str, Any]:
    """The same of a folder over T5.

    Raises:
        UserError: it has none.
    """
    if (folder / "spiece.model").is_file():
        return {"class_path": "vlm.prompts.T5Tokenizer", "init_args": {"path": str(folder)}}
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: has neither spiece.model nor tokenizer.json; put the tokenizer's files beside")
    arguments = {"path": str(folder), "pad_token": "<pad>", "eos_token": "</s>"}
    return {"class_path": "vlm.prompts.HubTokenizer", "init_args": arguments}


def _llama_settings(folder: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` says of a SentencePiece model of LLaMA's kind, where that is not the usual."""
    file = folder / "tokenizer_config.json"
    content = read_json(file) or {}
    Entries(_READ - _LLAMA_ONLY.keys(), _LLAMA_ONLY, _HARMLESS).check(content, file)
    settings: dict[str, Any] = {}
    if content.get("legacy") is False:  # transformers 4 takes it as set where the file does not say
        settings["legacy"] = False
    if content.get("add_bos_token") is False:
        settings["add_bos"] = False
    return settings


def _strange_token(folder: Path, known: frozenset[str]) -> str | None:
    """What is wrong with a token that the SentencePiece model does not have, whose text would be cut into others."""
    added = {token: found for token, found in _added(folder).items() if token not in known | _IMAGE_TOKENS}
    if not added:
        return None
    rows = SentencePieceProcessor(str(folder / "tokenizer.model")).get_piece_size()
    for token, (index, file) in added.items():
        if index >= rows:
            return (
                f"{file}: adds the token {token!r} with the id {index} to the {rows} of tokenizer.model; put the "
                "tokenizer.json that has it beside"
            )
    return None


def _added(folder: Path) -> dict[str, tuple[int, Path]]:
    file = folder / "added_tokens.json"
    found = {token: (int(index), file) for token, index in (read_json(file) or {}).items()}
    file = folder / "tokenizer_config.json"
    entries: Mapping[str, Any] = (read_json(file) or {}).get("added_tokens_decoder") or {}
    return {entry["content"]: (int(index), file) for index, entry in entries.items()} | found


def starts_with_bos(folder: Path) -> bool:
    """Whether a text starts with the BOS token, as the file's own rule says; without any rule it does."""
    settings = read_json(folder / "tokenizer_config.json") or {}
    bos = settings.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    if bos is None:
        return False
    if isinstance(settings.get("add_bos_token"), bool):
        return settings["add_bos_token"]
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return backend.post_processor is None or backend.encode("a").ids[:1] == [backend.token_to_id(bos)]
