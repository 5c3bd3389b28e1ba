"""A LLaVA checkpoint of any layout, opened as one stream of tensors under our names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.checkpoints.artefact import STAGE_FILE, Artefact, read_artefact
from vlm.checkpoints.files.identity import fingerprint_of, hash_tensor
from vlm.checkpoints.files.locate import CARRIED
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.published.delta import DeltaFiles
from vlm.checkpoints.published.family import OpenedCheckpoint, Stream, chained
from vlm.checkpoints.published.llava_config import LlavaConfig, check_config, read_config, with_tower
from vlm.checkpoints.published.llava_entries import check_known_tower, refuse_class_token
from vlm.checkpoints.published.vila import PartFolders, has_part_folders
from vlm.checkpoints.references import followed, locate, recorded_places
from vlm.checkpoints.resume.opened import is_checkpoint, read_trained
from vlm.checkpoints.tables.clip import clip_table
from vlm.checkpoints.tables.llava import (
    HF,
    LAYOUTS,
    OFFICIAL,
    Connector,
    check_connector,
    detect_connector,
    detect_layout,
    llava_table,
    mlp_depth,
)
from vlm.checkpoints.tables.mini_gemini import MARK, convnext_names, high_tower
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class OpenedLlava(OpenedCheckpoint):
    """A checkpoint with its description.

    Attributes:
        system: name of the system.
        config: its description.
        folder: where tokenizer files may lie.
        meta: `stage.json` of an artefact, empty for published weights.
    """

    system: str
    config: LlavaConfig
    folder: Path
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """What the tensors of one system's checkpoints have.

    Attributes:
        system: its name.
        connectors: kinds of its projector; `mlp` has any number of layers.
        newline: a token at the end of a row of tiles.
        mining: a second tower that features mine.
        hub: a class of transformers holds it.
    """

    system: str
    connectors: tuple[str, ...] = ("mlp",)
    newline: bool = False
    mining: bool = False
    hub: bool = True

    def has_connector(self, connector: Connector) -> bool:
        return ("mlp" if mlp_depth(connector) else connector) in self.connectors


def open_checkpoint(
    src: str | Path,
    kind: Kind,
    *,
    layout: str = "auto",
    vision: str | Path | None = None,
    base: str | Path | None = None,
    target: str = "ours",
) -> OpenedLlava:
    """Opens and checks a published checkpoint; no tensor is read yet.

    Args:
        src: folder, file or hub id.
        kind: which system it should be.
        layout: `official`, `hf`, or `auto`.
        vision: where the CLIP tower lies when `src` does not hold it.
        base: what `src` is a delta over, for LLaVA's first releases.
        target: layout it will be written in; `hf` has no place for a linear projector and always holds a tower, which
            is looked for where the source's config says when `vision` is not given.

    Raises:
        UserError: tensors, config and system do not fit together.
    """
    if has_part_folders(src):
        files: WeightFiles = PartFolders(src)
    else:
        files = WeightFiles(src) if base is None else DeltaFiles(src, base)
    return _with_tower(_open_published(files, kind, layout), src, vision=vision, target=target)


def open_llava_artefact(
    src: str | Path, kind: Kind, *, vision: str | Path | None = None, target: str = "official"
) -> OpenedLlava:
    """The same of an artefact of ours, which says by path where everything lies that it does not hold."""
    return _with_tower(_open_artefact(read_trained(src, system=kind.system)), src, vision=vision, target=target)


def open_llava_module(
    module: Any, src: str | Path, kind: Kind, *, vision: str | Path | None = None, target: str = "official"
) -> OpenedLlava:
    """The same of a system in memory that was trained from a published one.

    Args:
        src: its artefact.
    """
    origin = _origin(read_trained(src), kind)
    tensors = {name: tensor.detach() for name, tensor in module.named_parameters()}
    shapes = {**origin.shapes, **{name: tuple(tensor.shape) for name, tensor in tensors.items()}}

    def stream() -> Iterator[tuple[str, Tensor]]:
        """What training left as it was in the type that it was published in."""
        for name, tensor in origin.stream():
            mine = tensors.get(name, tensor)
            yield name, tensor if torch.equal(tensor.to(mine.dtype), mine) else mine
        yield from ((name, tensor) for name, tensor in tensors.items() if name not in origin.shapes)

    model = replace(origin, shapes=shapes, stream=stream, system=module.system, meta={})
    return _with_tower(model, src, vision=vision, target=target)


def _with_tower(model: OpenedLlava, src: str | Path, *, vision: str | Path | None, target: str) -> OpenedLlava:
    if target == "hf":
        check_connector(HF, model.config.connector)
    lacks_tower = not any(name.startswith("vision.") for name in model.shapes)
    tower = vision if vision is not None else model.config.tower if target == "hf" else None
    if lacks_tower and tower is None and target == "hf":
        raise UserError(f"{src}: holds no vision tower; name the folder of its CLIP with --vision")
    if lacks_tower and tower is not None:
        config, shapes, stream = _tower(model.config, tower)
        model = replace(model, config=config, shapes={**model.shapes, **shapes}, stream=chained(model.stream, stream))
    check_config(model.config, model.shapes, str(src))
    return model


def _open_published(files: WeightFiles, kind: Kind, layout_name: str) -> OpenedLlava:
    system, keys = kind.system, set(files.keys())
    layout = detect_layout(keys)
    if layout_name not in ("auto", "hf" if layout.is_hf else layout.name):
        raise UserError(f"{files.source}: is in the {layout.name} layout, not in {layout_name!r}")
    connector = detect_connector(keys)
    if not kind.has_connector(connector):
        raise UserError(f"{files.source}: has the projector {connector}, but {system} has {kind.connectors[0]}")
    for thing, found, wanted in (
        ("image_newline", layout.newline in keys, kind.newline),
        ("patch info mining", MARK in keys, kind.mining),
    ):
        if found != wanted:
            has, but = ("no", "it") if wanted else ("the", "none")
            raise UserError(f"{files.source}: has {has} {thing}, but {system} has {but}; give another --system")
    is_split = isinstance(files, PartFolders)
    config = read_config(files.folder, layout, connector=connector, is_language_alone=is_split)
    if kind.mining:
        config = replace(config, high=high_tower(config.originals["official"], files.shapes()))
    if isinstance(files, PartFolders):
        config = files.describe(config)
    tower = {
        name.removeprefix(layout.vision): shape
        for name, shape in files.shapes().items()
        if name.startswith(layout.vision)
    }
    file = files.folder / "config.json"
    if config.class_token and (config.pinpoints is not None or kind.mining or connector == "mlp_downsample"):
        refuse_class_token(system, file)
    if tower and config.vision is None:
        local = Path(config.tower) if config.tower and (Path(config.tower) / "config.json").exists() else None
        if local is None:
            check_known_tower(config.tower, file)
        config = with_tower(config, tower, local)
    model = OpenedLlava({}, files.items, system, config, files.folder, {})
    table = table_of(model, layout.name)
    shapes = table.check(files.shapes(), side="theirs")
    stream: Stream = partial(_converted, table, files)
    if (files.folder / CARRIED).exists():
        carried = WeightFiles(files.folder / CARRIED)
        shapes, stream = shapes | carried.shapes(), chained(stream, carried.items)
    return replace(model, shapes=shapes, stream=stream)


def _open_artefact(artefact: Artefact) -> OpenedLlava:
    config = LlavaConfig(**_published(artefact).meta["published"])
    shapes = artefact.weights.shapes() | {name: tuple(tensor.shape) for name, tensor in artefact.carried.items()}
    stream: Stream = chained(artefact.items, artefact.carried.items)
    for part, entry in artefact.meta["frozen"].items():
        if any(name.startswith(f"{part}.") for name in artefact.meta["tensors"]) or entry["fingerprint"] is None:
            continue  # a published checkpoint without its tower only says where the tower comes from
        part_shapes, part_stream = _frozen(part, {**entry, "source": locate(artefact, entry["source"])}, config)
        shapes, stream = shapes | part_shapes, chained(stream, part_stream)
    return OpenedLlava(shapes, stream, artefact.meta["system"], config, artefact.folder, artefact.meta)


def _published(artefact: Artefact) -> Artefact:
    """What comes from a published checkpoint, of an artefact and those it follows: it has the published config."""
    if "published" in artefact.meta:
        return artefact
    if artefact.meta["follows"]:
        return _published(followed(artefact, artefact.meta["follows"][0]))
    raise UserError(
        f"{artefact.folder}: neither it nor an artefact it follows comes from a published checkpoint, so there is no "
        "config.json to write; start the recipe from weights made by `vlm convert ... --to ours`"
    )


def _frozen(part: str, entry: Mapping[str, Any], config: LlavaConfig) -> tuple[Shapes, Stream]:
    """A part that an artefact refers to: out of another artefact, a CLIP folder, or a folder of the language model."""
    source = entry["source"]
    prefix = f"{part}."
    if (Path(source) / STAGE_FILE).exists():
        other = _open_artefact(read_artefact(source))
        shapes, stream = other.shapes, other.stream
    elif part == "vision":
        _, shapes, stream = _tower(config, source)
    elif part == "vision_high":
        files = WeightFiles(source)
        names = {key: f"{prefix}trunk.{name}" for key, name in convnext_names(files.keys()).items()}
        shapes = {names[key]: shape for key, shape in files.shapes().items() if key in names}

        def stream() -> Iterator[tuple[str, Tensor]]:
            return ((names[key], tensor) for key, tensor in files.items() if key in names)

    else:
        files = WeightFiles(source)
        shapes = {f"{prefix}{name}": shape for name, shape in files.shapes().items()}

        def stream() -> Iterator[tuple[str, Tensor]]:
            return ((f"{prefix}{name}", tensor) for name, tensor in files.items())

    table = llava_table(
        OFFICIAL, connector=config.connector, num_blocks=config.num_blocks, vocab_rows=config.vocab_rows
    )
    own = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}

    def verified() -> Iterator[tuple[str, Tensor]]:
        hashes = {}
        for name, tensor in stream():
            if name in own:
                if not table.is_carried(name):
                    hashes[name] = hash_tensor(tensor)
                yield name, tensor
        if fingerprint_of(hashes) != entry["fingerprint"]:
            raise UserError(f"{source}: the {part} in it is not the one the artefact was trained with; find that one")

    return own, verified


def _origin(artefact: Artefact, kind: Kind) -> OpenedLlava:
    """The published checkpoint that an artefact comes from.

    Raises:
        UserError: there is none.
    """
    if "published" in artefact.meta:
        return _open_artefact(artefact)
    for reference in artefact.meta["follows"][:1]:
        places = recorded_places(artefact, reference)
        if "published" in reference:
            return open_checkpoint(
                reference["path"] if reference["published"] == "hub" else next(p for p in places if p.is_dir()), kind
            )
        saved = next((place for place in places if is_checkpoint(place)), None)
        return _origin(followed(artefact, reference) if saved is None else read_trained(saved), kind)
    raise UserError(
        f"{artefact.folder}: neither it nor an artefact it follows comes from a published checkpoint, so there is no "
        "config.json to write; start the recipe from weights made by `vlm convert ... --to ours`"
    )


def _tower(config: LlavaConfig, source: str | Path) -> tuple[LlavaConfig, Shapes, Stream]:
    files = WeightFiles(source)
    theirs = "vision_model." if any(name.startswith("vision_model.") for name in files.shapes()) else ""
    names = {name.removeprefix(theirs): shape for name, shape in files.shapes().items() if name.startswith(theirs)}
    if "embeddings.patch_embedding.weight" not in names:
        raise UserError(f"{source}: holds no CLIP vision tower")
    config = with_tower(config, names, files.folder if (files.folder / "config.json").exists() else None)
    table = clip_table(theirs=theirs, num_blocks=config.num_blocks)
    return config, table.check(files.shapes(), side="theirs"), partial(_converted, table, files)


def table_of(model: OpenedLlava, layout: str) -> Table:
    """The conversion table between a model and one of `LAYOUTS`."""
    config = model.config
    return llava_table(
        LAYOUTS[layout],
        connector=config.connector,
        num_blocks=config.num_blocks,
        vocab_rows=config.vocab_rows,
        tied=config.tied,
        newline=config.pinpoints is not None,
        mining=config.high is not None,
        num_experts=config.num_experts,
    )


def _converted(table: Table, files: WeightFiles) -> Iterator[tuple[str, Tensor]]:
    return table.stream_to_ours(files.items())
