"""`vlm export`: a finished stage as a folder that the Hugging Face tools open without this project.

`convert` rewrites published checkpoints tensor by tensor; `export` opens what a stage trained, with all it follows and
the base weights it left frozen, and adds what a published folder has besides weights: tokenizer, processor, chat
template and generation settings.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm.errors import UserError

if TYPE_CHECKING:
    from vlm.checkpoints.published.family import Family
    from vlm.checkpoints.report import LoadReport

DTYPES = ("float32", "bfloat16", "float16")
WHAT = ("merged", "adapter", "base")


def main(argv: list[str]) -> int:
    """Runs `vlm export ARGV`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vlm export", description="Write a finished stage for Hugging Face tools.")
    parser.add_argument("src", help="artefact, or run folder of a stage or recipe")
    parser.add_argument("dst", type=Path, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as they were trained")
    parser.add_argument(
        "--write",
        choices=WHAT,
        default="merged",
        help="of a stage with an adapter (LoRA): the weights it was merged into; the adapter alone, for peft; or the "
        "weights that is laid over",
    )
    args = parser.parse_args(argv)
    report = export(args.src, args.dst, dtype=args.dtype, write=args.write)
    print(report.render())
    print(f"written: {args.dst}")
    return 0


def export(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    write: Literal["merged", "adapter", "base"] = "merged",
) -> "LoadReport":
    """Writes a folder for a system's class of transformers and `AutoProcessor`; returns what happened to the tensors.

    The processor gives the ids and pixels of our codec.
    Opened with `backend="pil"` its pixels are ours; the usual backend resizes with torchvision, a grey level or two
    apart. Of some sizes of images the class cuts the map of tiles otherwise; the report says of which.

    Args:
        src: artefact, or run folder of a stage or recipe.
        dst: folder that does not exist yet; it is complete or not there.
        dtype: one of `DTYPES`; None keeps each tensor's own.
        write: of a stage with an adapter: everything, the adapter merged into its weights; the adapter alone, as
            `peft.PeftModel.from_pretrained(model, dst)` opens it; or everything without it.

    Raises:
        UserError: Hugging Face has no class that computes the same, or the merged weights do not compute what the
            adapter does; nothing is written then.
    """
    dst = Path(dst)
    if dst.exists():
        raise UserError(f"{dst}: exists already; remove it or give another folder")
    import torch

    from vlm.checkpoints.files.atomic import atomic_directory
    from vlm.checkpoints.published.family import get_family
    from vlm.checkpoints.published.hf_processor import OTHER_PIXELS
    from vlm.checkpoints.published.open import family_of, find_weights, is_artefact
    from vlm.checkpoints.resume.opened import read_trained
    from vlm.commands.convert import has_adapter, refuse_surgery
    from vlm.commands.merged import load_merged, load_without_adapter
    from vlm.commands.written import check_written
    from vlm.registry import published_systems

    weights = find_weights(src)
    system = read_trained(weights).meta["system"] if is_artefact(weights) else family_of(weights).system
    known = [name for name in published_systems() if get_family(name).hub_class is not None]
    if system not in known:
        raise UserError(f"{system}: has no class of its own in Hugging Face's tools; {', '.join(known)} have")
    family, as_type = get_family(system), getattr(torch, dtype) if dtype else None
    adapted = is_artefact(weights) and has_adapter(weights)
    if write != "merged" and not adapted:
        raise UserError(f"{weights}: has no adapter; leave out --write {write}")
    if is_artefact(weights):
        refuse_surgery(family, weights)
    with atomic_directory(dst) as folder:
        if write == "adapter":
            if dtype is not None:
                raise UserError(f"--dtype {dtype}: an adapter is written as it was trained; leave it out")
            return _write_adapter(folder, family, weights)
        notes: list[str] = []

        def load_plain(path: str | Path) -> Any:
            if write == "base":
                return load_without_adapter(path)
            module, found = load_merged(path, dtype=as_type)
            notes.extend(found)
            return module

        report = family.export(folder, weights, dtype=as_type, load=load_plain)
        report.notes += [*notes, OTHER_PIXELS]
        if is_artefact(weights):
            report.notes += check_written(folder, family, weights)
        return report


def _write_adapter(folder: Path, family: "Family", weights: str) -> "LoadReport":
    from vlm.checkpoints.published.peft_folder import fill_peft_folder
    from vlm.checkpoints.resume.opened import read_trained
    from vlm.loading import load

    artefact, module = read_trained(weights), load(weights, quantized=False)
    table, made = family.memory_table(module)
    sources = {entry["source"] for entry in artefact.meta["frozen"].values()}
    base = sources.pop() if len(sources) == 1 and not artefact.meta["follows"] else None
    trained = frozenset(artefact.meta["trained"])
    report = fill_peft_folder(folder, module, table, trained=trained, made=made, base=base)
    where = base or "what `vlm export ... --write base` writes"
    report.notes.append(f"peft.PeftModel.from_pretrained(model, folder) lays it over {family.hub_class}: {where}")
    return report
