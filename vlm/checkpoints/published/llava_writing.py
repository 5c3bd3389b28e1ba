"""A LLaVA checkpoint under our names, written in any layout as a new folder."""

import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.checkpoints.artefact import fill_artefact
from vlm.checkpoints.files.locate import CARRIED
from vlm.checkpoints.files.writing import SHARD_BYTES, divert, write_safetensors
from vlm.checkpoints.published.family import chained
from vlm.checkpoints.published.llava_config_writing import write_config
from vlm.checkpoints.published.llava_reading import OpenedLlava, table_of
from vlm.checkpoints.published.vila import FOLDERS, PREFIXES, place_of, write_configs
from vlm.checkpoints.report import LoadReport
from vlm.checkpoints.tables.llava import LAYOUTS, OFFICIAL

_COPIED = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def fill_layout(folder: Path, model: OpenedLlava, *, target: str) -> LoadReport:
    """Writes a model in the layout `official` or `hf` into a folder that the caller makes appear."""
    if target == "official" and FOLDERS in model.config.originals:
        report, small = _fill_folders(folder, model), folder / "llm"
    else:
        report, small = fill_published(folder, model, target=target), folder
    copy_small_files(model.folder, small)
    return report


def _fill_folders(folder: Path, model: OpenedLlava) -> LoadReport:
    """The folders of VILA-1.5, each part in its own."""
    table = table_of(model, FOLDERS)
    table.check(model.shapes, side="ours")
    for part in PREFIXES:
        (folder / part).mkdir()
        # read once for each part: in the order of a stream they may lie mixed, and none is held in memory
        places = ((place_of(name), tensor) for name, tensor in table.stream_from_ours(model.stream()))
        own = ((name, tensor) for (where, name), tensor in places if where == part)
        if written := _any(own):
            write_safetensors(folder / part / "model.safetensors", written, max_shard_bytes=SHARD_BYTES)
        else:
            (folder / part).rmdir()
    write_configs(folder, model.config)
    loaded = [name for name in model.shapes if not table.is_carried(name)]
    return LoadReport(loaded=loaded, carried=[name for name in model.shapes if table.is_carried(name)])


def _any(items: Iterator[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]] | None:
    first = next(items, None)
    return None if first is None else itertools.chain([first], items)


def fill_published(folder: Path, model: OpenedLlava, *, target: str) -> LoadReport:
    """Weights and `config.json` of the layout `official` or `hf` into a folder that the caller makes appear."""
    layout = LAYOUTS[model.config.layout if target == "hf" and model.config.layout.startswith("hf") else target]
    new: list[str] = []
    if target == "hf" and "vision.trunk.norm.weight" not in model.shapes:
        model, new = _with_unused_norm(model)
    table = table_of(model, layout.name)
    kept = {name: shape for name, shape in model.shapes.items() if table.has_place(name) or not table.is_carried(name)}
    table.check(kept, side="ours")
    beside: dict[str, Tensor] = {}
    dtypes: list[str] = []
    stream = divert(model.stream(), lambda name: name not in kept, beside)
    published = _noting_dtype(table.stream_from_ours(stream), dtypes)
    write_safetensors(folder / "model.safetensors", published, max_shard_bytes=SHARD_BYTES)
    if beside:
        write_safetensors(folder / CARRIED, beside.items())
    write_config(folder, model.config, layout, dtype=dtypes[0])
    loaded = [name for name in kept if name not in new and not table.is_carried(name)]
    made = [f"language.{n}[{model.config.vocab_rows}:]" for n in ("model.embed_tokens.weight", "lm_head.weight")]
    new += [name for name in made if layout.is_hf and name not in model.shapes and name.split("[")[0] in model.shapes]
    return LoadReport(loaded=loaded, new=new, carried=[name for name in model.shapes if table.is_carried(name)])


def fill_llava_artefact(folder: Path, model: OpenedLlava, description: Mapping[str, Any]) -> LoadReport:
    """Writes a model as an artefact into a folder that the caller makes appear.

    Args:
        description: `class_path` and `init_args` of its system.
    """
    table = table_of(model, OFFICIAL.name)
    carried: dict[str, Tensor] = {}
    frozen = {}
    if not any(name.startswith("vision.") for name in model.shapes):
        frozen["vision"] = {"source": model.config.tower, "fingerprint": None}
    if model.config.high is not None and not any(name.startswith("vision_high.") for name in model.shapes):
        frozen["vision_high"] = {"source": model.config.high["weights"], "fingerprint": None}
    meta = {
        "system": model.system,
        "stage": "published",
        "global_step": 0,
        "model": description,
        **model.meta,
        "frozen": frozen,
        "ties": {"language.lm_head.weight": "language.model.embed_tokens.weight"} if model.config.tied else {},
        "published": model.config.to_json(),
    }
    stream = divert(model.stream(), table.is_carried, carried)
    fill_artefact(folder, tensors=stream, meta=meta, carried=carried, max_shard_bytes=SHARD_BYTES)
    copy_small_files(model.folder, folder)
    return LoadReport(loaded=[name for name in model.shapes if name not in carried], carried=list(carried))


def _with_unused_norm(model: OpenedLlava) -> tuple[OpenedLlava, list[str]]:
    """A tower that never had the blocks and norm above its features: the class needs a norm, whatever is in it."""
    vision = model.config.vision
    assert vision is not None
    width = vision["hidden_size"]
    norm = {"vision.trunk.norm.weight": torch.ones(width), "vision.trunk.norm.bias": torch.zeros(width)}
    vision = vision | {"num_hidden_layers": model.config.num_blocks}
    config = replace(model.config, vision=vision, vision_layer=-1, originals={})
    shapes = {**model.shapes} | {name: tuple(tensor.shape) for name, tensor in norm.items()}
    return replace(model, config=config, shapes=shapes, stream=chained(model.stream, norm.items)), list(norm)


def _noting_dtype(items: Iterable[tuple[str, Tensor]], dtypes: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in items:
        if tensor.is_floating_point():
            dtypes.append(str(tensor.dtype).removeprefix("torch."))
        yield name, tensor


def copy_small_files(source: Path, target: Path) -> None:
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
