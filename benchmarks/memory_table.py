"""Writes `docs/memory.md`: what fine-tuning each system takes, by the arithmetic of `vlm plan`.

python -m benchmarks.memory_table
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import cli
from vlm.planning.advice import LORA, QLORA, adapted
from vlm.planning.machine import GIB, Machine, find_gpu
from vlm.planning.memory import memory_of
from vlm.planning.packs import PackCosts
from vlm.planning.stage import Planner, Run
from vlm.recipes.catalogue import find_recipe, systems
from vlm.recipes.configs import stage_options
from vlm.recipes.graph import TrainingStage
from vlm.recipes.reading import load_recipe
from vlm.stages import AdamW

OUT = Path(__file__).parents[1] / "docs" / "memory.md"
GPUS = {"24": "24 GB", "40": "40 GB", "80": "80 GB", "141": "141 GB"}
UTILIZATION = 0.4
TEXT = """# Memory and hours of fine-tuning

Made by `python -m benchmarks.memory_table` with the arithmetic of `vlm plan` (`docs/planning.md`); nothing here has
been measured on a GPU. The last stage of each recipe at paper size under `bf16-mixed`, recomputation where the recipe
has it, one GPU, packs of one sample of the longest kind: more samples a pack take more. `full` trains what the stage
trains, AdamW's moments in 32 or in 8 bits; `lora` and `qlora` are `configs/finetune/lora.yaml` and `qlora.yaml` in
the place of the language model. GiB; a GPU is named if it holds all that beside what CUDA itself takes (0.7 GiB, and
4% that are lost between tensors).

| system | stage | | trained | weights | gradients | moments | pack | all | smallest GPU | hours per 10,000 samples |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    lines = [line for system in systems() for line in rows(system)]
    hours = f"Hours: one A100 at {UTILIZATION:.0%} of 312 TFLOP/s, an assumption; typical lengths of the samples."
    OUT.write_text(TEXT + "\n".join(lines) + f"\n\n{hours}\n")


def rows(system: str) -> Iterator[str]:
    recipe = load_recipe(find_recipe(system))
    stage = [node for node in recipe.nodes if isinstance(node, TrainingStage)][-1]
    view = cli._describe(stage_options(_asked(system, stage.name)))
    planner = Planner(view.module, view.trains, view.data, Run("bf16-mixed"))
    planner.samples = dataclasses.replace(planner.samples, items=planner.samples.items[-2:])
    machine = Machine(find_gpu("80"))
    stage_of, what = planner.what.stage, planner.what
    in_8_bits = dataclasses.replace(stage_of.optimizer, kind="adamw_8bit")
    full = planner.build(machine)
    kinds = [("full", full, stage_of.optimizer), ("full, 8 bits", full, in_8_bits)]
    for name, surgery in (("lora", LORA), ("qlora", QLORA)):
        costs = planner.build(machine, stage=adapted(what.stage), surgery=[surgery])
        kinds.append((name, costs, stage_of.optimizer))
    for name, costs, optimizer in kinds:
        yield _row(system, stage.name, name, planner, costs, optimizer, machine)


def _row(
    system: str,
    stage: str,
    name: str,
    planner: Planner,
    costs: PackCosts,
    optimizer: AdamW,
    machine: Machine,
) -> str:
    longest = max(*planner.samples.tokens, planner.samples.longest)
    memory = memory_of(costs.module, costs.of(longest), machine, optimizer)
    fitting = [label for key, label in GPUS.items() if memory.total <= Machine(find_gpu(key)).usable]
    trained = sum(p.numel() for p in costs.module.parameters() if p.requires_grad)
    hours = sum(costs.per_sample().values()) * 10_000 / (312e12 * UTILIZATION) / 3600
    sizes = [memory.fixed["weights"], memory.fixed["gradients"], memory.fixed["optimizer"], sum(memory.pack.values())]
    cells = [f"{size / GIB:.1f}" for size in (*sizes, memory.total)]
    return (
        "| "
        + " | ".join(
            [system, stage, name, f"{trained / 1e6:,.0f}M", *cells, fitting[0] if fitting else "none", f"{hours:.1f}"]
        )
        + " |"
    )


def _asked(system: str, stage: str) -> argparse.Namespace:
    return argparse.Namespace(recipe=system, stage=stage, demo=False)


if __name__ == "__main__":
    main()
