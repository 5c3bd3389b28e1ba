"""`vlm convert` for systems that are published as one folder."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.checkpoints.artefact import STAGE_FILE, fill_artefact, read_artefact
from vlm.checkpoints.files.atomic import atomic_directory
from vlm.checkpoints.files.locate import CARRIED
from vlm.checkpoints.files.weights import SHARD_BYTES, divert, write_safetensors
from vlm.checkpoints.published.family import Family, OpenedCheckpoint, _copy, get_family, open_family
from vlm.checkpoints.published.llava_reading import Stream, chained
from vlm.checkpoints.report import LoadReport
from vlm.errors import UserError


def open_trained(family: Family, path: str | Path, *, layout: str) -> OpenedCheckpoint:
    """An artefact of ours: a converted checkpoint tensor by tensor, a trained stage as `vlm.load` opens it."""
    artefact = read_artefact(path, system=family.system)
    model = artefact.meta["model"]
    if published := artefact.meta.get("published"):
        config = family.translated(published["config"], source=published["layout"], target=layout)
        shapes = artefact.weights.shapes() | {name: tuple(t.shape) for name, t in artefact.carried.items()}
        stream: Stream = chained(artefact.items, artefact.carried.items)
        return OpenedCheckpoint(layout, config, shapes, stream, model, partial(_copy, artefact.folder, family.files))
    from vlm.loading import load

    module = load(path)
    if module.surgery:
        changed = ", ".join(type(operation).__name__ for operation in module.surgery)
        raise UserError(f"{path}: was changed by {changed}, which published files of {family.system} have no place for")
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_files = partial(_write_files, family, module)
    return OpenedCheckpoint(layout, family.config(module, layout), shapes, tensors.items, model, write_files)


def convert_family(
    src: str | Path,
    dst: Path,
    *,
    system: str,
    target_layout: str,
    source_layout: str = "auto",
    template: str | None = None,
    dtype: torch.dtype | None = None,
) -> LoadReport:
    """`vlm.commands.convert.convert` for the systems of `FAMILIES`; None keeps each tensor's own type."""
    family = get_family(system)
    if target_layout != "ours" and target_layout not in family.marks:
        known = " or ".join(f"--to {name}" for name in (*family.marks, "ours"))
        raise UserError(f"{system}: no class or layout {target_layout!r} is published for it; use {known}")
    if source_layout == "ours" or (source_layout == "auto" and (Path(src) / STAGE_FILE).exists()):
        if target_layout == "ours":
            raise UserError(f"{src}: is an artefact of ours already; name a published layout with --to")
        opened = open_trained(family, src, layout=target_layout)
    else:
        opened = open_family(family, src, layout=source_layout)
    if dtype is not None:
        opened = replace(opened, stream=partial(_as_dtype, opened.stream, dtype))
    with atomic_directory(dst) as folder:
        if target_layout == "ours":
            report = _fill_ours(folder, family, opened, template=template)
        else:
            report = _fill_published(folder, family, opened, layout=target_layout)
        opened.write_files(folder)
    return report


def _fill_ours(folder: Path, family: Family, opened: OpenedCheckpoint, *, template: str | None) -> LoadReport:
    table = family.table(opened.layout, opened.config)
    carried: dict[str, Tensor] = {}
    arguments = {**opened.model["init_args"], **({} if template is None else {"template": template})}
    tokenizer = arguments["tokenizer"]
    arguments["tokenizer"] = tokenizer | {"init_args": tokenizer["init_args"] | {"path": "."}}
    meta = {
        "system": family.system,
        "stage": "published",
        "global_step": 0,
        "model": {"class_path": opened.model["class_path"], "init_args": arguments},
        "published": {"layout": opened.layout, "config": opened.config},
    }
    stream = divert(opened.stream(), table.is_carried, carried)
    fill_artefact(folder, tensors=stream, meta=meta, carried=carried, max_shard_bytes=SHARD_BYTES)
    return LoadReport(loaded=[name for name in opened.shapes if name not in carried], carried=list(carried))


def _fill_published(folder: Path, family: Family, opened: OpenedCheckpoint, *, layout: str) -> LoadReport:
    config = family.translated(opened.config, source=opened.layout, target=layout)
    table = family.table(layout, config)
    kept = {n: shape for n, shape in opened.shapes.items() if table.has_place(n) or not table.is_carried(n)}
    table.check(kept, side="ours")
    beside: dict[str, Tensor] = {}
    stream = divert(opened.stream(), lambda name: name not in kept, beside)
    write_safetensors(folder / "model.safetensors", table.stream_from_ours(stream), max_shard_bytes=SHARD_BYTES)
    if beside:
        write_safetensors(folder / CARRIED, beside.items())
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    carried = [name for name in opened.shapes if table.is_carried(name)]
    return LoadReport(loaded=[name for name in opened.shapes if name not in carried], carried=carried)


def _as_dtype(stream: Stream, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor.to(dtype)) for name, tensor in stream())


def _write_files(family: Family, module: Any, folder: Path) -> None:
    family.write_files(folder, module)
