"""A system of LLaVA's kind as a folder that transformers' LLaVA classes and `AutoProcessor` open."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.layers import QuickGELU
from torch import Tensor, nn

from vlm.checkpoints.published.hf_processor import sizes_cut_otherwise, write_processor, write_tokenizer
from vlm.checkpoints.published.language_entries import HEAD_OF_HUB
from vlm.checkpoints.published.llava_chat import write_chat_settings
from vlm.checkpoints.published.llava_config import LlavaConfig
from vlm.checkpoints.published.llava_reading import OpenedLlava
from vlm.checkpoints.published.llava_writing import fill_published
from vlm.checkpoints.report import LoadReport
from vlm.checkpoints.tables.llava import HF, check_connector
from vlm.connectors import MLP, Linear
from vlm.errors import UserError
from vlm.vision.tiling import AnyRes

_LARGEST = 1024  # side in pixels of the images that the report speaks of
_SHOWN = 6


def fill_exported(folder: Path, module: Any, *, dtype: torch.dtype | None) -> LoadReport:
    """Writes a finished system into a folder that the caller makes appear.

    It is a `LlavaNextForConditionalGeneration` where images are cut into tiles, a `LlavaForConditionalGeneration` where
    they have one view (the caption stage of LLaVA-NeXT too).

    Raises:
        UserError: neither class computes the same.
    """
    check_exportable(module)
    tiles: AnyRes | None = getattr(module, "tiles", None)
    marks = write_tokenizer(folder, module.codec, num_rows=module.language.config.vocab_size, tiles=tiles)
    model = _checkpoint(module, folder, tiles=tiles, marks=marks, dtype=dtype)
    report = fill_published(folder, model, target="hf")
    patch = module.vision.trunk.patch_embed.patch_size[0]
    write_processor(
        folder,
        module.codec,
        patch_size=patch,
        pad_id=marks[1],
        tiles=tiles,
        class_token=module.arguments["vision"].class_token,
    )
    write_chat_settings(folder, module)
    if tiles is not None:
        found = sizes_cut_otherwise(tiles, largest=_LARGEST)
        sizes = ", ".join(f"{width}x{height}" for width, height in found[:_SHOWN]) + ", ..." * (len(found) > _SHOWN)
        report.notes.append(
            "LlavaNextForConditionalGeneration rounds where the map of the tiles ends, the published code cuts off: of "
            f"the {_LARGEST**2:,} sizes of images up to {_LARGEST}x{_LARGEST} px, {len(found)} get features there "
            f"that they do not get here{f' ({sizes})' if found else ''}; all others compute the same"
        )
    return report


def check_exportable(module: Any) -> None:
    """Raises a `UserError` unless a class of transformers computes what this module computes."""
    connector, tower = module.arguments["connector"], module.arguments["vision"]
    if isinstance(connector, Linear):
        check_connector(HF, "linear")
    what = None
    if not (isinstance(connector, MLP) and connector.depth == 2):
        what = f"the connector {connector}: its projector has exactly two layers"
    elif tower.final_norm or (tower.class_token and getattr(module, "tiles", None) is not None):
        what = "final_norm of the tower, or class_token beside tiles: it takes patches before the last norm"
    elif not isinstance(module.vision.trunk.blocks[0].mlp.act, (QuickGELU, nn.GELU)) or isinstance(
        module.vision.trunk.norm_pre, nn.Identity
    ):
        what = f"the tower {tower.name}: it is no CLIP"
    elif getattr(module, "tiles", None) is not None and not module.has_newline:
        what = f"tiles that are merged {module.tiles.merge!r}: it knows spatial_unpad alone"
    for key, plain in HEAD_OF_HUB.items():
        if getattr(module.language.config, key, plain) != plain:
            what = f"a language model with {key}: its head is plain"
    if what is not None:
        raise UserError(f"the Hugging Face classes of LLaVA have no place for {what}")


def _checkpoint(
    module: Any, folder: Path, *, tiles: AnyRes | None, marks: tuple[int, int], dtype: torch.dtype | None
) -> OpenedLlava:
    """A module in memory as the checkpoint that converters read."""
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
        class_token=module.arguments["vision"].class_token,
        marks=marks,
        pinpoints=None if tiles is None else [[tiles.tile * across, tiles.tile * down] for across, down in tiles.grids],
    )

    def stream() -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.detach().to(dtype)) for name, tensor in module.named_parameters())

    shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
    return OpenedLlava(shapes, stream, module.system, config, folder, {})
