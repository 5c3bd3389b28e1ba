"""How a published LLaVA is talked to: its template, its view of an image, the tokens that it added."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm.checkpoints.published.entries import read_json
from vlm.checkpoints.published.llava_reading import OpenedLlava
from vlm.checkpoints.published.vila import FOLDERS
from vlm.errors import UserError

CHAT_FILE = "vlm.json"
"""Beside the weights that `vlm export` writes: what a published config has no place for."""
_PAD = "[PAD]"
_MARKS = ("<im_start>", "<im_end>")
"""Tokens that LLaVA's first release added: to pad with, and around an image."""


def marks_images(model: OpenedLlava) -> bool:
    """Whether images stand between tokens of their own."""
    originals = model.config.originals
    root = originals.get("official") or originals.get(FOLDERS, {}).get("") or {}
    return bool(root.get("mm_use_im_start_end"))


def next_template(model: OpenedLlava) -> str:
    """LLaVA-NeXT's templates go with the language model that it was built on, which its files name in passing."""
    hf = model.config.originals.get("hf", {}).get("text_config", {})
    kinds = {model.config.originals.get("official", {}).get("model_type"), hf.get("model_type")}
    if kinds & {"llava_mistral", "mistral"}:
        return "mistral_instruct"
    if model.config.language["vocab_size"] >= 128_000:
        return "llava_llama_3"
    return "chatml_direct" if model.config.language["hidden_size"] == 7168 else "v1"  # Yi-34B


def mini_gemini_template(model: OpenedLlava) -> str:
    """The conversation of Mini-Gemini that goes with a language model; in its own code the folder's name decides."""
    language = model.config.language
    kinds = {"gemma": "gemma", "mixtral": "mistral_instruct"}
    if language.get("model_type") in kinds:
        name = kinds[language["model_type"]]
    elif language["vocab_size"] >= 128_000:
        name = "llama_3"
    else:
        name = "chatml_direct" if language["hidden_size"] == 7168 else "vicuna_v1"  # Yi-34B
    return f"mini_gemini_{name}"


def added_tokens(folder: Path) -> dict[str, Any]:
    """Arguments of the tokenizer of LLaVA's first release: its tokens behind LLaMA's, in the order of their ids."""
    file = folder / "added_tokens.json"
    ids = read_json(file)
    if ids is None:
        raise UserError(f"{file}: missing; it names the marks around an image, fetch it")
    tokens = sorted(ids, key=ids.__getitem__)
    if not set(_MARKS) <= set(tokens) or [ids[t] - ids[tokens[0]] for t in tokens] != list(range(len(tokens))):
        raise UserError(f"{file}: must name {' and '.join(_MARKS)}, with ids without a gap; found {ids}")
    if tokens[0] == _PAD:  # the tokenizer puts it first by itself
        return {"pad_token": _PAD, "added_tokens": tokens[1:]}
    return {"added_tokens": tokens}


def read_chat_settings(folder: Path) -> dict[str, Any]:
    """What `write_chat_settings` wrote; empty in folders of others."""
    return read_json(folder / CHAT_FILE) or {}


def write_view(folder: Path, image: str) -> None:
    """How an image becomes a square view, into a folder without a file of the Hugging Face tools for it."""
    (folder / CHAT_FILE).write_text(json.dumps({"image": image}, indent=2) + "\n", encoding="utf-8")


def write_chat_settings(folder: Path, module: Any) -> None:
    """How a system of ours is talked to, so that its exported folder opens here as what it was."""
    arguments = {key: module.arguments[key] for key in ("template", "image", "max_tokens")}
    tokenizer = asdict(module.codec.tokenizer)
    del tokenizer["path"]
    (folder / CHAT_FILE).write_text(
        json.dumps({**arguments, "tokenizer": tokenizer}, indent=2) + "\n", encoding="utf-8"
    )
