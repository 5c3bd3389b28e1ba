"""`vlm convert`: published checkpoints into artefacts of ours, and back.

Official and Hugging Face folders are rewritten tensor by tensor through the table of `vlm.checkpoints.tables.llava`, or
of the system's family (`vlm.checkpoints.published.family`). No dtype changes, and nothing is computed, but for the
adapter of a stage, which is merged into the weights it lies over unless the layout has it beside them. What one layout
has no place for lies in `carried.safetensors` beside it, so that every way round ends with the same bits.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.errors import UserError
from vlm.registry import published_systems

if TYPE_CHECKING:
    from vlm.checkpoints.published.family import Family
    from vlm.checkpoints.report import LoadReport
    from vlm.language import Surgery

TARGETS = ("official", "hf", "ours")


def main(argv: list[str]) -> int:
    """Runs `vlm convert ARGV`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vlm convert", description="Convert a checkpoint between layouts.")
    parser.add_argument("src", help="folder or hub id of a published checkpoint, or the artefact folder of a stage")
    parser.add_argument("dst", type=Path, help="folder to write; must not exist")
    parser.add_argument("--system", required=True, choices=published_systems(), help="which system it is")
    parser.add_argument("--to", required=True, choices=TARGETS, help="layout to write")
    parser.add_argument("--from", dest="source", default="auto", choices=("auto", *TARGETS), help="layout of SRC")
    parser.add_argument("--template", help="how the model is talked to (vlm.prompts); default: that of the system")
    parser.add_argument("--vision", help="folder or hub id of the CLIP tower, when SRC does not hold it")
    parser.add_argument(
        "--base", help="folder or hub id of the LLaMA that SRC is a delta over (LLaVA's first releases)"
    )
    parser.add_argument(
        "--visual_expert",
        action="store_true",
        help="with --to ours: the partial LoRA of SRC as a visual expert, which computes the same",
    )
    args = parser.parse_args(argv)
    if args.visual_expert:
        if args.to != "ours":
            raise UserError(f"--visual_expert --to {args.to}: only our artefacts hold a visual expert; use --to ours")
        from vlm.commands.expert import write_expert

        print(write_expert(args.src, args.dst))
        print(f"written: {args.dst}")
        return 0
    report = convert(
        args.src,
        args.dst,
        system=args.system,
        source_layout=args.source,
        target_layout=args.to,
        vision=args.vision,
        base=args.base,
        template=args.template,
    )
    print(report.render())
    print(f"written: {args.dst}")
    return 0


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    system: str,
    target_layout: str,
    source_layout: str = "auto",
    vision: str | Path | None = None,
    base: str | Path | None = None,
    template: str | None = None,
) -> "LoadReport":
    """Writes the checkpoint `src` to the new folder `dst` in another layout; returns what happened to the tensors.

    Args:
        src: folder, file or hub id.
        dst: folder that does not exist yet; it is complete or not there.
        system: one with published folders (`vlm.registry`).
        target_layout: `official`, `hf` or `ours` (the artefact of a stage).
        source_layout: the same names, or `auto`.
        vision: where the CLIP tower lies when the source has none and the target needs it; by default where the
            source's own config says.
        base: what `src` is a delta over (`vlm.checkpoints.published.delta`).
        template: name of the template an artefact is talked to with, where published files do not say it: of models
            with a linear projector those over Vicuna v0 speak `v0`, later ones `v1`.

    Raises:
        UserError: anything that does not fit together; nothing is written then.
    """
    dst = Path(dst)
    if dst.exists():
        raise UserError(f"{dst}: exists already; remove it or give another folder")
    from vlm.checkpoints.artefact import STAGE_FILE
    from vlm.checkpoints.files.atomic import atomic_directory
    from vlm.checkpoints.published.family import get_family
    from vlm.checkpoints.resume.opened import read_trained
    from vlm.commands.merged import load_merged
    from vlm.commands.written import check_written
    from vlm.loading import load
    from vlm.prompts import get_template

    if template is not None:
        get_template(template)
        if target_layout != "ours":
            raise UserError(f"--template {template}: only our artefacts say how a model is talked to; use --to ours")
    notes: list[str] = []

    def load_plain(path: str | Path) -> Any:
        if family.holds_adapter:
            return load(path, quantized=False)
        module, found = load_merged(path)
        notes.extend(found)
        return module

    family, is_trained = get_family(system), False
    if target_layout != "ours" and target_layout not in family.layouts:
        known = " or ".join(f"--to {name}" for name in (*family.layouts, "ours"))
        raise UserError(f"{system}: no class or layout {target_layout!r} is published for it; use {known}")
    if source_layout == "ours" or (source_layout == "auto" and (Path(src) / STAGE_FILE).exists()):
        if base is not None:
            raise UserError(f"{src}: is an artefact of ours, and only published weights are deltas; leave out --base")
        refuse_surgery(family, src)
        opened = family.open_artefact(src, target=target_layout, vision=vision, load=load_plain)
        is_trained = "published" not in read_trained(src).meta
    else:
        opened = family.open(src, layout=source_layout, target=target_layout, vision=vision, base=base)
    with atomic_directory(dst) as folder:
        report = family.fill(folder, opened, target=target_layout, template=template)
        report.notes += notes
        if is_trained:
            report.notes += check_written(folder, family, src)
        return report


def refuse_surgery(family: "Family", artefact: str | Path) -> None:
    """Refuses an artefact that was changed in a way that its system's published folders have no place for.

    Adapters have one: the weights they are merged into.
    """
    from vlm.language import PeftAdapter
    from vlm.language.surgery import refuse_changed

    if not family.holds_surgery:
        refuse_changed([other for other in _surgery(artefact) if not isinstance(other, PeftAdapter)], artefact)


def has_adapter(artefact: str | Path) -> bool:
    """Whether an artefact was trained with an adapter."""
    from vlm.language import PeftAdapter

    return any(isinstance(operation, PeftAdapter) for operation in _surgery(artefact))


def _surgery(artefact: str | Path) -> "list[Surgery]":
    from vlm.building.instantiate import instantiate
    from vlm.checkpoints.resume.opened import read_trained

    return instantiate(read_trained(artefact).meta["surgery"])
