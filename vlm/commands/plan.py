"""`vlm plan`: what a stage takes, before anything is downloaded or built."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm.building.inherited_surgery import PlannedSurgery
from vlm.checkpoints.published.open import is_hub_id
from vlm.commands.check_data.stage_view import StageParser, StageView
from vlm.errors import UserError
from vlm.hub import is_cached
from vlm.options import OptionParser
from vlm.planning.advice import advise
from vlm.planning.machine import GPUS, Gpu, Machine, Sharing, Strategy, find_gpu
from vlm.planning.report import as_json, lines_of, table_of
from vlm.planning.samples import LOOKED_AT
from vlm.planning.stage import Planner, Run
from vlm.recipes.catalogue import find_recipe, systems
from vlm.recipes.configs import add_stage_options, stage_options
from vlm.recipes.graph import Recipe, StageRef, TrainingStage
from vlm.recipes.reading import load_recipe

_NODE = 8
"""Devices of a node where the trainer is not told how many."""


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        command="plan",
        remedy="; `vlm plan --help` lists the options",
        prog="vlm plan",
        description="What a stage takes: tokens, parameters, FLOPs, memory of a rank, downloads, hours. Nothing is "
        "downloaded or built, and data is looked at where it is here. With --recipe and no --stage, a table.",
        epilog="All other options are those of `vlm fit`: -c FILE, or --weights X --data FILE --lora.",
    )
    add_stage_options(parser)
    parser.add_argument("--gpu", default="80", help=f"{', '.join(GPUS)}, or a number of GiB; %(default)s")
    parser.add_argument("--devices", type=int, help="how many; by default what the trainer is told, or 1")
    parser.add_argument("--utilization", type=float, default=0.4, help="share of the peak that is reached; %(default)s")
    parser.add_argument("--flops", type=float, help="peak of a GPU in bfloat16; by default of the one named by --gpu")
    parser.add_argument("--samples", type=int, default=LOOKED_AT, help="of your data, at most; %(default)s")
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


def main(arguments: Sequence[str], *, describe: StageParser) -> int:
    """Prints the plan.

    Args:
        describe: from options of `vlm fit` to a stage.

    Returns:
        0, also where the stage does not fit.
    """
    own, others = _parser().parse_known_args(list(arguments))
    for name in ("devices", "utilization", "flops", "samples"):
        if getattr(own, name) is not None and getattr(own, name) <= 0:
            raise UserError(f"--{name} must be more than 0, found {getattr(own, name)}")
    _refuse_download(others)
    gpu = find_gpu(own.gpu)
    speed = {"per_second": own.flops or gpu.flops, "utilization": own.utilization}
    plans = []
    for view, planner in planners_of(own, others, describe=describe):
        plans.append((planner, planner.plan(machine_of(view, gpu, own.devices))))
    if own.json:
        print(json.dumps([as_json(plan, **speed) for _, plan in plans], indent=1))
    elif len(plans) == 1:
        planner, plan = plans[0]
        print(*lines_of(plan, **speed), sep="\n")
        print(*(f"  {line}" for line in advise(planner, plan)), sep="\n")
    else:
        print(*table_of([plan for _, plan in plans], **speed), sep="\n")
    return 0


def planners_of(
    own: argparse.Namespace, others: Sequence[str] = (), *, describe: StageParser
) -> Iterator[tuple[StageView, Planner]]:
    """Each stage that is planned, after the surgery of those before it.

    Args:
        own: `recipe`, `stage`, `demo` and `samples` of `vlm plan`, and what names a stage otherwise.
        others: options of `vlm fit`.
    """
    for options, earlier in _stages(own):
        view = describe([*options, *others], on_gpu=True)
        planned = [
            PlannedSurgery(str(at.stage), describe(at.options, on_gpu=True).module.surgery, at.parts) for at in earlier
        ]
        yield view, Planner(view.module, view.trains, view.data, _run(view.trainer), own.samples, planned)


def _refuse_download(options: Sequence[str]) -> None:
    parser = OptionParser(command="plan", remedy="; `vlm plan --help` lists the options", add_help=False)
    parser.add_argument("--weights")
    weights = parser.parse_known_args(list(options))[0].weights
    if weights is None or not is_hub_id(weights) or Path(weights).expanduser().exists():
        return
    if not is_cached(weights, ("config.json",)):
        raise UserError(
            f"--weights {weights}: is not on this disk, and a plan downloads nothing; fetch it with `hf download "
            f"{weights}`, or estimate its recipe: vlm plan --recipe {{{','.join(systems())}}}"
        )


class _Earlier(NamedTuple):
    """A stage that one starts from, near or far.

    Attributes:
        options: of `vlm fit`.
        parts: {part of the one that starts from it: its part}; empty: everything.
    """

    stage: StageRef
    options: list[str]
    parts: Mapping[str, str]


def _stages(own: argparse.Namespace) -> list[tuple[list[str], list[_Earlier]]]:
    """Options of each stage that is planned, and the stages before it."""
    if own.recipe is None:
        return [(stage_options(own), [])]
    recipe = load_recipe(find_recipe(own.recipe))
    nodes = [node for node in recipe.nodes if isinstance(node, TrainingStage)]
    if own.stage is not None or len(nodes) == 1:
        options = stage_options(own)
        nodes = [node for node in nodes if own.stage in (None, node.name)]
        return [(options, _earlier(recipe, nodes[0], {}, demo=own.demo))]
    return [(_options(own.recipe, node.name, own.demo), _earlier(recipe, node, {}, demo=own.demo)) for node in nodes]


def _options(recipe: str, stage: str, demo: bool) -> list[str]:
    return stage_options(argparse.Namespace(recipe=recipe, stage=stage, demo=demo))


def _earlier(recipe: Recipe, node: TrainingStage, parts: Mapping[str, str], *, demo: bool) -> list[_Earlier]:
    """The stages that a stage starts from, the first ones first.

    Args:
        parts: {part of the stage that is planned: part of this one}; empty: everything.
    """
    found = []
    sources = [*node.follows, *([StageRef(recipe.system, node.continues)] if node.continues else [])]
    for source in sources:
        taken = _through(parts, source.parts)
        if taken is None:
            continue
        path = recipe.path if source.system == recipe.system else find_recipe(source.system)
        origin = load_recipe(path)
        earlier = origin.node(source.stage)
        assert isinstance(earlier, TrainingStage)
        found += _earlier(origin, earlier, taken, demo=demo)
        found.append(_Earlier(source, _options(str(path), source.stage, demo), taken))
    return found


def _through(later: Mapping[str, str], earlier: Mapping[str, str]) -> Mapping[str, str] | None:
    """Two steps of {our part: its part} as one; None: they have no part in common."""
    if not later or not earlier:
        return later or earlier
    both = {ours: earlier[middle] for ours, middle in later.items() if middle in earlier}
    return both or None


def _run(trainer: Any) -> Run:
    epochs, steps = trainer.max_epochs, trainer.max_steps
    if epochs is None and steps == -1:
        epochs = 1000  # Lightning's own
    return Run(str(trainer.precision or "32-true"), epochs, steps, trainer.accumulate_grad_batches)


def machine_of(view: StageView, gpu: Gpu, devices: int | None = None) -> Machine:
    """Where a stage would run by its settings.

    Args:
        devices: in the place of those that the trainer is told.
    """
    return Machine(gpu, devices or _devices(view), _strategy(view), _sharing(view))


def _devices(view: StageView) -> int:
    devices, nodes = view.trainer.devices, view.trainer.num_nodes
    return (devices if isinstance(devices, int) and devices > 0 else 1) * nodes


def _strategy(view: StageView) -> Strategy:
    named = view.trainer.strategy
    name = named if isinstance(named, str) else type(named).__name__
    return "fsdp2" if "fsdp2" in name.lower() else "ddp"


def _sharing(view: StageView) -> Sharing:
    """What the strategy and its callback are told; `vlm` does not import their classes."""
    strategy, devices = view.trainer.strategy, view.trainer.devices
    told = next((c for c in view.trainer.callbacks or [] if hasattr(c, "cpu_offload")), Sharing())
    ranks = getattr(strategy, "ranks_per_shard_group", None)
    if ranks == "node":
        ranks = devices if isinstance(devices, int) and devices > 1 else _NODE
    return Sharing(told.precision, ranks, getattr(strategy, "reduce_gradients", "") == "micro_batch", told.cpu_offload)
