"""`vlm export`: a finished stage as a folder that the Hugging Face tools open without this project.

`convert` rewrites published checkpoints tensor by tensor; `export` opens what a stage trained, with all it follows and
the base weights it left frozen, and adds what a published folder has besides weights: tokenizer, processor, chat
template and generation settings.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.errors import UserError

if TYPE_CHECKING:
    from vlm.checkpoints.report import LoadReport

DTYPES = ("float32", "bfloat16", "float16")


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
    """Writes a folder for a system's class of transformers and `AutoProcessor`; returns what happened to the tensors.

    The processor gives the ids and pixels of our codec.
    Opened with `backend="pil"` its pixels are ours; the usual backend resizes with torchvision, a grey level or two
    apart. Of some sizes of images the class cuts the map of tiles otherwise; the report says of which.

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

    from vlm.checkpoints.files.atomic import atomic_directory
    from vlm.checkpoints.published.family import get_family
    from vlm.checkpoints.published.open import family_of, find_weights, is_artefact
    from vlm.checkpoints.resume.opened import read_trained
    from vlm.commands.convert import refuse_surgery
    from vlm.loading import load
    from vlm.registry import published_systems

    weights = find_weights(src)
    system = read_trained(weights).meta["system"] if is_artefact(weights) else family_of(weights).system
    known = [name for name in published_systems() if get_family(name).hub_class is not None]
    if system not in known:
        raise UserError(f"{system}: has no class of its own in Hugging Face's tools; {', '.join(known)} have")
    if is_artefact(weights):
        refuse_surgery(get_family(system), weights)
    with atomic_directory(dst) as folder:
        as_type = getattr(torch, dtype) if dtype else None
        return get_family(system).export(folder, weights, dtype=as_type, load=load)
