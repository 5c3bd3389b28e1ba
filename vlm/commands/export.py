"""`vlm export`: a finished stage as a folder that the Hugging Face tools open without this project.

`convert` rewrites published checkpoints tensor by tensor; `export` opens what a stage trained, with all it follows and
the base weights it left frozen, and adds what a published folder has besides weights: tokenizer, processor, chat
template and generation settings.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vlm.checkpoints.published.llava_reading import Model
    from vlm.checkpoints.report import LoadReport
    from vlm.vision.tiling import AnyRes

DTYPES = ("float32", "bfloat16", "float16")
_LLAVA_CLASSES = ("llava_1_5", "llava_next", "vila", "llava")
_LARGEST = 1024  # side in pixels of the pictures that the report speaks of
_SHOWN = 6


def main(argv: list[str]) -> int:
    """Runs `vlm export ARGV`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vlm export", description="Write a finished stage for Hugging Face tools.")
    parser.add_argument("src", help="artefact, or run folder of a stage or recipe")
    parser.add_argument("dst", type=Path, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as they were trained")
    args = parser.parse_args(argv)
    report = export(args.src, args.dst, dtype=args.dtype)
    print(report.render())
    print(f"written: {args.dst}")
    return 0


def export(src: str | Path, dst: str | Path, *, dtype: str | None = None) -> "LoadReport":
    """Writes a folder for the LLaVA classes of transformers and `AutoProcessor`; returns what happened to the tensors.

    Fuyu is written for its own class. For the others it is `LlavaNextForConditionalGeneration` where pictures are cut
    into tiles, `LlavaForConditionalGeneration` where they have one view (the caption stage of LLaVA-NeXT too). The
    processor gives the ids and pixels of our codec.
    Opened with `backend="pil"` its pixels are ours; the usual backend resizes with torchvision, a grey level or two
    apart. Of some sizes of pictures the class cuts the map of tiles otherwise; the report says of which.

    Args:
        src: artefact, or run folder of a stage or recipe.
        dst: folder that does not exist yet; it is complete or not there.
        dtype: one of `DTYPES`; None keeps each tensor's own.

    Raises:
        UserError: Hugging Face has no class that computes the same; nothing is written then.
    """
    dst = Path(dst)
    if dst.exists():
        raise UserError(f"{dst}: exists already; remove it or give another folder")
    import torch

    from vlm.checkpoints.artefact import read_artefact
    from vlm.checkpoints.files.atomic import atomic_directory
    from vlm.checkpoints.published.family import FAMILIES, get_family
    from vlm.checkpoints.published.hf_processor import sizes_cut_otherwise, write_processor, write_tokenizer
    from vlm.checkpoints.published.llava_writing import fill_published
    from vlm.checkpoints.published.open import find_weights, is_artefact, write_chat_settings
    from vlm.commands.convert_family import convert_family
    from vlm.loading import load

    weights = find_weights(src)
    system = read_artefact(weights).meta["system"] if is_artefact(weights) else None
    if system in FAMILIES and get_family(system).is_known_to_transformers:
        as_type = getattr(torch, dtype) if dtype else None
        return convert_family(weights, dst, system=system, target_layout="official", dtype=as_type)
    module = load(src)
    _check(module)
    tiles: AnyRes | None = getattr(module, "tiles", None)
    with atomic_directory(dst) as folder:
        marks = write_tokenizer(folder, module.codec, num_rows=module.language.config.vocab_size, tiles=tiles)
        model = _model(module, folder, tiles=tiles, marks=marks, dtype=getattr(torch, dtype) if dtype else None)
        report = fill_published(folder, model, target="hf")
        patch = module.vision.trunk.patch_embed.patch_size[0]
        write_processor(folder, module.codec, patch_size=patch, pad_id=marks[1], tiles=tiles)
        write_chat_settings(folder, module)
    if tiles is not None:
        found = sizes_cut_otherwise(tiles, largest=_LARGEST)
        sizes = ", ".join(f"{width}x{height}" for width, height in found[:_SHOWN]) + ", ..." * (len(found) > _SHOWN)
        report.notes.append(
            "LlavaNextForConditionalGeneration rounds where the map of the tiles ends, the published code cuts off: of "
            f"the {_LARGEST**2:,} sizes of pictures up to {_LARGEST}x{_LARGEST} px, {len(found)} get features there "
            f"that they do not get here{f' ({sizes})' if found else ''}; all others compute the same"
        )
    return report


def _check(module: Any) -> None:
    """Raises a `UserError` unless a class of transformers computes what this module computes."""
    from timm.layers import QuickGELU
    from torch import nn

    from vlm.checkpoints.tables.llava import HF, check_connector
    from vlm.connectors import MLP, Linear

    if module.system not in _LLAVA_CLASSES:
        known = ", ".join((*_LLAVA_CLASSES, "fuyu"))
        raise UserError(f"{module.system}: has no class of its own in Hugging Face's tools; {known} have")
    connector, tower = module.arguments["connector"], module.arguments["vision"]
    if isinstance(connector, Linear):
        check_connector(HF, "linear")
    what = None
    if not (isinstance(connector, MLP) and connector.depth == 2):
        what = f"the connector {connector}: its projector has exactly two layers"
    elif module.surgery:
        what = f"surgery ({', '.join(type(operation).__name__ for operation in module.surgery)})"
    elif tower.class_token or tower.final_norm:
        what = "class_token or final_norm of the tower: it takes patches before the last norm"
    elif not isinstance(module.vision.trunk.blocks[0].mlp.act, (QuickGELU, nn.GELU)) or isinstance(
        module.vision.trunk.norm_pre, nn.Identity
    ):
        what = f"the tower {tower.name}: it is no CLIP"
    elif getattr(module, "tiles", None) is not None and not module.has_newline:
        what = f"tiles that are merged {module.tiles.merge!r}: it knows spatial_unpad alone"
    if what is not None:
        raise UserError(f"the Hugging Face classes of LLaVA have no place for {what}")


def _model(
    module: Any, folder: Path, *, tiles: "AnyRes | None", marks: tuple[int, int], dtype: "torch.dtype | None"
) -> "Model":
    """A module in memory as the checkpoint that converters read."""
    from timm.layers import QuickGELU

    from vlm.checkpoints.published.llava_config import LlavaConfig
    from vlm.checkpoints.published.llava_reading import Model

    language = module.language.config.to_diff_dict()
    for key in ("_name_or_path", "architectures", "dtype", "transformers_version"):
        language.pop(key, None)
    trunk, facts = module.vision.trunk, module.tower
    block = trunk.blocks[0]
    vision = {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu" if isinstance(block.mlp.act, QuickGELU) else "gelu",
        "hidden_size": facts.dim,
        "image_size": facts.image_size,
        "intermediate_size": block.mlp.fc1.out_features,
        "layer_norm_eps": block.norm1.eps,
        "num_attention_heads": block.attn.num_heads,
        "num_hidden_layers": facts.num_blocks,
        "patch_size": trunk.patch_embed.patch_size[0],
    }
    config = LlavaConfig(
        connector="mlp2x_gelu",
        language=language | {"vocab_size": module.language.config.vocab_size},
        vision=vision,
        vision_layer=-1,
        tower=None,
        layout="ours",
        marks=marks,
        pinpoints=None if tiles is None else [[tiles.tile * across, tiles.tile * down] for across, down in tiles.grids],
    )

    def stream() -> "Iterator[tuple[str, Tensor]]":
        return ((name, tensor.detach().to(dtype)) for name, tensor in module.named_parameters())

    shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
    return Model(module.system, config, shapes, stream, folder, {})
