"""Writes `docs/memory.md`: what fine-tuning each system takes on one GPU, by the arithmetic of `vlm plan`.

python -m benchmarks.memory_table [SYSTEM ...]

A system takes half a minute to some minutes of one core. Rows of systems that are not named stay as they are.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import cli
from vlm.checkpoints.files.atomic import atomic_file
from vlm.commands.plan import planners_of
from vlm.errors import UserError
from vlm.finetuning.start import is_before
from vlm.planning.advice import LORA, QLORA, Change, adapted, largest_pack
from vlm.planning.downloads import downloads_of
from vlm.planning.machine import CONTEXT, GIB, SLACK, Gpu, Machine, Sharing, find_gpu
from vlm.planning.samples import LOOKED_AT
from vlm.planning.stage import Planner, Run
from vlm.recipes.catalogue import find_recipe, systems
from vlm.recipes.graph import TrainingStage
from vlm.recipes.reading import load_recipe

OUT = Path(__file__).parents[1] / "docs" / "memory.md"
GPUS = ("24", "40", "80", "141")
METHODS = ("full", "full, 8 bits", "LoRA", "QLoRA")
PACK = 4096
UTILIZATION = 0.4
A100, RTX = find_gpu("a100"), find_gpu("4090")
TEXT = f"""# Fine-tuning on one GPU: memory, packs, hours

Made by `python -m benchmarks.memory_table` with the arithmetic of `vlm plan` ([planning.md](planning.md)); nothing here
has been measured on a GPU. For your own data and GPU: `vlm plan --weights X --data FILE --lora --gpu 24`.

Assumed are:
- One GPU, `bf16-mixed`, recomputation in the language model, and in the tower where the recipe has it.
- `full` trains what the recipe's stage trains: weights, gradients and AdamW's moments in float32. `full, 8 bits` has
  `stage.optimizer.kind: adamw_8bit`. `LoRA` and `QLoRA` are `configs/finetune/lora.yaml` and `qlora.yaml`: rank 64 on
  the linear layers in the blocks of the language model, all else frozen, in bfloat16 but for tables and norms; QLoRA
  keeps those layers in 4 bits. `-` stands where the recipe trains adapters of its own, which `full` is there; a network
  takes no others beside them.
- Packs, which are micro-batches: samples without padding, `data.max_tokens` in all. The step stays the published one,
  whatever the packs.
- Typical samples (last table), images of 640 x 480. {CONTEXT / GIB:.1f} GiB are CUDA's own, and {SLACK:.0%} of a GPU
  are lost between tensors.

"""


@dataclasses.dataclass
class Entry:
    """What is said of a system.

    Attributes:
        changes: {method: the network it trains}; a network that has adapters of its own takes no other ones.
    """

    system: str
    stage: str
    planner: Planner
    changes: dict[str, Change]

    def with_packs(self, tokens: int, method: str) -> str:
        """GiB."""
        return f"{self.changes[method].total(tokens) / GIB:.1f}"

    def pack_on(self, gpu: str, method: str) -> str:
        return self._pack(self.changes[method]._replace(machine=Machine(find_gpu(gpu))))

    @property
    def shared(self) -> str:
        """Of all that the recipe trains, on as few GPUs as hold it."""
        change = self.changes["fsdp2"]
        while change.machine.devices < 8 and not largest_pack(self.planner, change):
            machine = dataclasses.replace(change.machine, devices=2 * change.machine.devices)
            change = change._replace(machine=machine)
        return f"{change.machine.devices} GPUs, {self._pack(change)}"

    def _pack(self, change: Change) -> str:
        tokens = largest_pack(self.planner, change)
        return f"{tokens:,} ({tokens / self.mean:,.0f})" if tokens else "-"

    @property
    def mean(self) -> float:
        return sum(self.planner.samples.tokens) / len(self.planner.samples.items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", default=systems(), metavar="SYSTEM", help="default: all")
    entries = [entry_of(system) for system in sorted(parser.parse_args().systems)]
    parts = [
        f"## GiB with packs of {PACK:,} tokens\n",
        *_table(entries, METHODS, lambda entry, method: entry.with_packs(PACK, method)),
        "\n## Largest packs\n\n`data.max_tokens` and, in brackets, how many samples that is; at most all of a step. "
        "`-`: the longest typical\nsample does not fit.\n",
    ]
    for gpu in GPUS:
        usable = Machine(find_gpu(gpu)).usable / GIB
        parts += [
            f"**{gpu} GB** ({usable:.1f} GiB for tensors)\n",
            *_table(entries, METHODS, lambda entry, method, gpu=gpu: entry.pack_on(gpu, method)),
            "",
        ]
    parts += [
        "**Several GPUs of 80 GB**, with `callbacks.FSDP2Strategy` (`reduce_gradients: micro_batch`) and\n"
        "`callbacks.MixedPrecisionFSDP`\n",
        *_table(entries, ("full",), lambda entry, _: entry.shared),
        f"\n## Hours for 10,000 samples\n\nOn an A100, if {UTILIZATION:.0%} of its {_peak(A100) / 1e12:.0f} TFLOP/s "
        f"are reached; likewise on an RTX 4090, {_peak(A100) / _peak(RTX):.1f} times as long.\n"
        "Unpacking 4 bits is not counted: QLoRA takes longer.\n",
        *_table(entries, ("full", "LoRA", "QLoRA"), _hours),
        "\n## Samples, parameters, downloads\n\nDownloads: base weights of the recipe's parts, as published.\n",
        *_table(entries, tuple(_ABOUT), lambda entry, what: _ABOUT[what](entry)),
    ]
    page = TEXT + "\n".join(parts) + "\n"
    with atomic_file(OUT) as file:
        file.write((with_rows_of(OUT.read_text(encoding="utf-8"), page) if OUT.is_file() else page).encode())


def with_rows_of(old: str, new: str) -> str:
    """The new page, with the rows of systems that only the old page has, in the order of names."""
    tables = iter([_rows(found[0]) for found in _ROWS.finditer(old)])

    def joined(found: re.Match[str]) -> str:
        return "".join(line for _, line in sorted((next(tables, {}) | _rows(found[0])).items()))

    return _ROWS.sub(joined, new)


def _rows(lines: str) -> dict[str, str]:
    return {line.split(" ")[1]: line for line in lines.splitlines(keepends=True)}


_ROWS = re.compile(r"(?m)(?<=\|---\|\n)(?:\| \w+ \|.*\n)+")
"""All rows of a table."""


def entry_of(system: str) -> Entry:
    """The last stage of a recipe, the first of several, as `vlm fit --weights` fine-tunes."""
    recipe = load_recipe(find_recipe(system))
    names = [node.name for node in recipe.nodes if isinstance(node, TrainingStage)]
    stage = next(name for name in names if not any(is_before(name, other) for other in names))
    asked = argparse.Namespace(recipe=system, stage=stage, demo=False, samples=LOOKED_AT)
    [(_, planner)] = planners_of(asked, describe=cli._describe)
    planner.run = Run("bf16-mixed")
    machine, optimizer = Machine(find_gpu("80")), planner.what.stage.optimizer
    full = planner.build(machine)
    in_8_bits = dataclasses.replace(optimizer, kind="adamw_8bit")
    changes = [Change("full", full, machine, optimizer), Change("full, 8 bits", full, machine, in_8_bits)]
    for name, surgery in (("LoRA", LORA), ("QLoRA", QLORA)):
        with suppress(UserError):
            costs = planner.build(machine, stage=adapted(planner.what.stage), surgery=[surgery])
            changes.append(Change(name, costs, machine, optimizer))
    machines = dataclasses.replace(machine, devices=2, strategy="fsdp2", sharing=Sharing(reduces_each=True))
    changes.append(Change("fsdp2", planner.build(machines), machines, optimizer))
    return Entry(system, stage, planner, {change.name: change for change in changes})


def _table(entries: list[Entry], columns: tuple[str, ...], cell: Callable[[Entry, str], str]) -> Iterator[str]:
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for entry in entries:
        cells = (cell(entry, name) if name in entry.changes or name not in METHODS else "-" for name in columns)
        yield f"| {entry.system} | {' | '.join(cells)} |"


def _hours(entry: Entry, method: str) -> str:
    each = sum(entry.changes[method].costs.per_sample(PACK).values())
    return f"{each * 10_000 / (_peak(A100) * UTILIZATION) / 3600:.1f}"


def _peak(gpu: Gpu) -> float:
    assert gpu.flops is not None
    return gpu.flops


def _longest(entry: Entry) -> int:
    return max(*entry.planner.samples.tokens, entry.planner.samples.longest)


def _trained(entry: Entry, method: str) -> str:
    if method not in entry.changes:
        return "-"
    parameters = entry.changes[method].costs.module.parameters()
    return f"{sum(p.numel() for p in parameters if p.requires_grad) / 1e6:,.0f} M"


def _all(entry: Entry) -> int:
    return sum(p.numel() for p in entry.changes["full"].costs.module.parameters())


def _gigabytes(entry: Entry) -> str:
    return f"{(sum(d.size for d in downloads_of(entry.planner.what)) or 2 * _all(entry)) / 1e9:.1f} GB"


_ABOUT: dict[str, Callable[[Entry], str]] = {
    "stage": lambda entry: entry.stage,
    "tokens a sample": lambda entry: f"{entry.mean:,.0f}",
    "longest": lambda entry: f"{_longest(entry):,}",
    "parameters": lambda entry: f"{_all(entry) / 1e6:,.0f} M",
    "trained, full": lambda entry: _trained(entry, "full"),
    "trained, LoRA": lambda entry: _trained(entry, "LoRA"),
    "download": _gigabytes,
}


if __name__ == "__main__":
    main()
