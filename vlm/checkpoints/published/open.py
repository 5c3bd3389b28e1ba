"""A published folder (official, or of Hugging Face's tools), opened as one of our systems as it is."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm.checkpoints.artefact import STAGE_FILE
from vlm.checkpoints.files.locate import find_files
from vlm.checkpoints.files.weights import WeightFiles, WeightSource
from vlm.checkpoints.published.family import Family, family_source, find_family, open_family
from vlm.checkpoints.published.llava_reading import CONNECTORS, Model, open_checkpoint, table_of
from vlm.checkpoints.published.vila import PartFolders, has_part_folders, image_mode
from vlm.checkpoints.tables.llava import detect_connector, detect_layout
from vlm.checkpoints.tables.mini_gemini import MARK
from vlm.errors import UserError

CHAT_SETTINGS_FILE = "vlm.json"
"""Beside the weights that `vlm export` writes: what a published config has no place for."""
SYSTEMS: dict[str, tuple[str, dict[str, str]]] = {
    "llava": ("vlm.systems.LLaVA", {"template": "v0", "image": "crop"}),
    "llava_1_5": ("vlm.systems.LLaVA15", {"template": "v1", "image": "pad"}),
    "llava_next": ("vlm.systems.LLaVANext", {"template": "v1"}),
    "mini_gemini": ("vlm.systems.MiniGemini", {"image": "pad"}),
    "vila": ("vlm.systems.VILA", {"template": "v1", "image": "pad"}),
}
"""Class of a system, and how its published weights are talked to."""
_PAD = "[PAD]"
_MARKS = ("<im_start>", "<im_end>")
"""Tokens that LLaVA's first release added: to pad with, and around a picture."""


def find_weights(path: str | Path) -> str:
    """What `--weights` may name: an artefact, a run folder (its last finished stage), a published folder or hub id.

    Raises:
        UserError: nothing of that kind is there, or several last stages (`2_chat`, `2_science_qa`).
    """
    folder = Path(path).expanduser()
    for candidate in (folder, folder / "artefact"):
        if (candidate / STAGE_FILE).is_file():
            return str(candidate)
    kinds = "an artefact, a run folder with a finished stage, or a published LLaVA folder"
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give the folder it lies in: {kinds}")
    if not folder.exists():
        if len(folder.parts) == 2 and not folder.is_absolute() and not folder.parent.exists():  # a hub id
            return str(path)
        raise UserError(f"{folder}: no such folder; give {kinds}")
    if finished := sorted(folder.glob(f"*/artefact/{STAGE_FILE}")):
        stages = [file.parent.parent for file in finished]
        last = [stage for stage in stages if stage.name.split("_")[0] == stages[-1].name.split("_")[0]]
        if len(last) > 1:
            raise UserError(f"{folder}: ends in several stages; name one of them: {', '.join(map(str, last))}")
        return str(finished[-1].parent)
    if begun := sorted(file.parent for file in (*folder.glob("config.yaml"), *folder.glob("*/config.yaml"))):
        raise UserError(f"{begun[-1]}: this stage is not finished (no artefact); start its `vlm fit` again to go on")
    if has_part_folders(folder):
        return str(folder)
    try:
        find_files(folder)
    except UserError as error:
        raise UserError(f"{folder}: neither {STAGE_FILE} nor weight files in it; give {kinds}") from error
    return str(folder)


def is_artefact(path: str | Path) -> bool:
    return (Path(path) / STAGE_FILE).is_file()


def open_published(path: str) -> Model:
    """A published folder or hub id with its vision tower, which may lie where its config says.

    Raises:
        UserError: another architecture, or files that do not fit together.
    """
    try:
        split = has_part_folders(path)
        keys = (PartFolders if split else WeightFiles)(path).keys()
        connector = detect_connector(keys)
        # VILA v1.0 in LLaVA-1.5's layout computes what LLaVA-1.5 does, and its files do not tell them apart
        system = next((name for name, kind in CONNECTORS.items() if kind == connector and not split), "vila")
        if detect_layout(keys).newline in keys:
            system = "llava_next"
        elif MARK in keys:
            system = "mini_gemini"
        model = open_checkpoint(path, system=system)
        if any(name.startswith("vision.") for name in model.shapes):
            return model
        if model.config.tower is None:
            raise UserError("holds no vision tower, and its config.json names none (mm_vision_tower)")
        return open_checkpoint(path, system=system, vision=model.config.tower)
    except UserError as error:
        raise error if path in str(error) else UserError(f"{path}: {error}") from error


def describe_published(path: str) -> dict[str, Any]:
    """`class_path` and `init_args` of the system in a published folder, all of its weights to come from there."""
    if (family := _family_of(path)) is not None:
        return dict(open_family(family, path).model)
    model = open_published(path)
    class_path, arguments = chat_settings(model)
    parts = model.config.model_parts(has_tower=True)
    marks = arguments.pop("tokenizer", {})
    tokenizer = {"class_path": "vlm.prompts.LlamaTokenizer", "init_args": {"path": str(model.folder), **marks}}
    # Gemma's SentencePiece model puts no blank in front and has symbols of its own
    rewritten = model.config.language.get("model_type") == "gemma" and (model.folder / "tokenizer.json").is_file()
    if rewritten or not (model.folder / "tokenizer.model").is_file():
        if not (model.folder / "tokenizer.json").is_file():
            raise UserError(f"{path}: has neither tokenizer.model nor tokenizer.json; put the tokenizer's files beside")
        tokenizer = {
            "class_path": "vlm.prompts.HubTokenizer",
            "init_args": {"path": str(model.folder), "add_bos": True},
        }
    arguments = {**parts, **arguments, "tokenizer": tokenizer}
    if (own := model.folder / CHAT_SETTINGS_FILE).is_file():
        stated = json.loads(own.read_text(encoding="utf-8"))
        tokenizer["init_args"] = tokenizer["init_args"] | stated.pop("tokenizer", {})
        arguments |= stated
    return {"class_path": class_path, "init_args": arguments}


def chat_settings(model: Model) -> tuple[str, dict[str, Any]]:
    """Class of a published model and how it is talked to: its template, its view of a picture, tokens it added."""
    class_path, arguments = SYSTEMS[model.system]
    official = model.config.originals.get("official", {})
    if model.system == "llava_next":
        return class_path, arguments | {"template": _next_template(model)}
    if model.system == "mini_gemini":
        return class_path, arguments | {"template": f"mini_gemini_{_family(model)}"}
    if model.system == "vila":
        return class_path, arguments | {"image": image_mode(model.config)}
    if not official.get("mm_use_im_start_end"):
        return class_path, dict(arguments)
    if model.system != "llava":
        raise UserError(f"{model.folder}: mm_use_im_start_end is set; no {model.system} of ours marks its pictures")
    return class_path, {**arguments, "template": "v0_first_marked", "tokenizer": _added_tokens(model.folder)}


def _next_template(model: Model) -> str:
    """LLaVA-NeXT's templates go with the language model that it was built on, which its files name in passing."""
    hf = model.config.originals.get("hf", {}).get("text_config", {})
    kinds = {model.config.originals.get("official", {}).get("model_type"), hf.get("model_type")}
    if kinds & {"llava_mistral", "mistral"}:
        return "mistral_instruct"
    if model.config.language["vocab_size"] >= 128_000:
        return "llava_llama_3"
    return "chatml_direct" if model.config.language["hidden_size"] == 7168 else "v1"  # Yi-34B


def _family(model: Model) -> str:
    """The conversation of Mini-Gemini that goes with a language model; in its own code the folder's name decides."""
    language = model.config.language
    kinds = {"gemma": "gemma", "mixtral": "mistral_instruct"}
    if language.get("model_type") in kinds:
        return kinds[language["model_type"]]
    if language["vocab_size"] >= 128_000:
        return "llama_3"
    return "chatml_direct" if language["hidden_size"] == 7168 else "vicuna_v1"  # Yi-34B


def _added_tokens(folder: Path) -> dict[str, Any]:
    """Arguments of the tokenizer of LLaVA's first release: its tokens behind LLaMA's, in the order of their ids."""
    file = folder / "added_tokens.json"
    try:
        ids = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); it names the marks around a picture, fetch it") from error
    tokens = sorted(ids, key=ids.__getitem__)
    if not set(_MARKS) <= set(tokens) or [ids[t] - ids[tokens[0]] for t in tokens] != list(range(len(tokens))):
        raise UserError(f"{file}: must name {' and '.join(_MARKS)}, with ids without a gap; found {ids}")
    if tokens[0] == _PAD:  # the tokenizer puts it first by itself
        return {"pad_token": _PAD, "added_tokens": tokens[1:]}
    return {"added_tokens": tokens}


def write_chat_settings(folder: Path, module: Any) -> None:
    """How a system of ours is talked to, so that its exported folder opens here as what it was."""
    arguments = {key: module.arguments[key] for key in ("template", "image", "max_tokens")}
    tokenizer = asdict(module.codec.tokenizer)
    del tokenizer["path"]
    (folder / CHAT_SETTINGS_FILE).write_text(
        json.dumps({**arguments, "tokenizer": tokenizer}, indent=2) + "\n", encoding="utf-8"
    )


def published_source(path: str) -> WeightSource:
    """Every tensor of a published folder that the network computes with, under our names."""
    if (family := _family_of(path)) is not None:
        return family_source(family, path)
    model = open_published(path)
    table = table_of(model, model.config.layout)
    names = frozenset(name for name in model.shapes if not table.is_carried(name))
    return WeightSource(f"published weights {path}", names, lambda: iter(model.stream()))


def _family_of(path: str) -> Family | None:
    return None if has_part_folders(path) else find_family(WeightFiles(path).keys())
