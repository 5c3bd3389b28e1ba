"""What one training stage trains and how: the data behind the `StageTransition` callback.

Parameters are named by patterns: a part (`connector`), a prefix (`language.model.layers`), a glob over full names
(`vision.trunk.blocks.*.norm1.*`), or the word `adapters` for all that LoRA and its kin lay over linear layers. A
pattern that matches nothing, and a parameter matched by two, are errors.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vlm.errors import UserError
from vlm.schedules import Schedule


@dataclass(frozen=True)
class Trained:
    """How the parameters of one pattern are trained.

    Attributes:
        lr: peak learning rate.
        weight_decay: AdamW's decoupled decay.
        decay_vectors: decay biases and norm scales too; False exempts every tensor with fewer than two dimensions.
        layer_decay: factor on the learning rate per layer below the top (BEiT's rule); 1.0: the same everywhere.
    """

    lr: float
    weight_decay: float = 0.0
    decay_vectors: bool = True
    layer_decay: float = 1.0


@dataclass(frozen=True)
class InitFrom:
    """An artefact, or a published system, that the stage starts from.

    Attributes:
        artefact: its folder, the run folder of a finished stage, or a published folder or hub id.
        parts: {our prefix: its prefix}; empty: every tensor it holds, under its own name.
        leave_out: patterns, in its names, of what is dropped on purpose (the text side of BLIP-2's Q-Former).
        fresh: patterns, in our names, of what may start new in these parts; all else that it lacks is an error.
        merge: its adapter becomes part of the weights it lies over; without it, the adapter is inherited and goes on.
    """

    artefact: str
    parts: Mapping[str, str] = field(default_factory=dict)
    leave_out: Sequence[str] = ()
    fresh: Sequence[str] = ()
    merge: bool = False


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay (Loshchilov & Hutter, 2019).

    Attributes:
        kind: how the moments are kept. `adamw`: in float32, 8 bytes a trained parameter. `adamw_8bit`: in blocks of 8
            bits, 2 bytes (Dettmers et al., 2022; by bitsandbytes, which keeps tensors of fewer than 4,096 elements in
            float32). `paged_adamw_8bit`: the same, moved to the host's memory when a GPU runs out of its own.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    kind: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"

    def make(self, groups: list[dict], *, scales_gradients: bool) -> torch.optim.Optimizer:
        """The optimizer of some groups of parameters.

        Args:
            scales_gradients: training in float16, whose scaler and clipping have to see gradients before the update.

        Raises:
            UserError: bitsandbytes is missing, or cannot hold these parameters.
        """
        parameters = [parameter for group in groups for _, parameter in group["params"]]
        if self.kind == "adamw":
            # one kernel, where it saves a copy of all weights and moments: nothing of that is on the CPU
            fused = all(parameter.is_cuda for parameter in parameters) and not scales_gradients
            return torch.optim.AdamW(groups, betas=self.betas, eps=self.eps, fused=fused or None)
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            raise UserError(f"stage.optimizer.kind: {self.kind} takes no sharded weights; use adamw, whose moments are")
        try:
            from bitsandbytes import optim
        except ImportError as error:
            raise UserError(
                f"stage.optimizer.kind: {self.kind} needs bitsandbytes; pip install 'vlm[quantized]'"
            ) from error
        kind = optim.PagedAdamW8bit if self.kind == "paged_adamw_8bit" else optim.AdamW8bit
        return kind(groups, betas=self.betas, eps=self.eps)


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
        name: as in the recipe (`1_align`).
        train: {pattern: how}; everything else is frozen.
        follows: artefacts and published systems it starts from.
        continues: artefact of the stage whose schedule, step counter and optimizer moments go on here.
        modes: {pattern: `train` | `eval`} over modules, for published exceptions. Without one, a module is in train
            mode iff it holds a trained parameter.
        keep_optimizer: write the optimizer's moments into the artefact, for a stage that `continues` this one.
        recompute: {part, or a glob over parts: whether its blocks run again in the backward pass, or n for every n-th},
            in the place of `checkpointing` in their descriptions. Later patterns win.
    """

    name: str
    train: Mapping[str, Trained]
    follows: Sequence[InitFrom] = ()
    continues: str | None = None
    modes: Mapping[str, Literal["train", "eval"]] = field(default_factory=dict)
    optimizer: AdamW = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Schedule)
    keep_optimizer: bool = False
    recompute: Mapping[str, bool | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.continues is not None and self.schedule.total_steps is None:
            raise UserError(
                "stage.continues: the schedule goes on where that stage stopped, so it needs its whole length; "
                "set stage.schedule.total_steps, to the same number in both stages"
            )
        if self.continues is not None and self.schedule.is_per_epoch:
            raise UserError(
                f"stage.continues: epochs begin at 0 again, so schedule.kind: {self.schedule.kind} cannot go on where "
                "that stage stopped; use a kind that goes by steps"
            )

        if self.optimizer.kind != "adamw" and (self.keep_optimizer or self.continues is not None):
            raise UserError(
                f"stage.optimizer.kind: moments of {self.optimizer.kind} are not handed to another stage; use adamw "
                "where a stage continues"
            )

    @property
    def sources(self) -> Sequence[InitFrom]:
        """The artefacts that weights come from; of two that hold a tensor the later one wins."""
        return [*self.follows, *([InitFrom(self.continues)] if self.continues is not None else [])]

    @property
    def network(self) -> tuple[Any, ...]:
        """What of a stage decides how a network is built: what is trained and from what, not at which rates."""
        built = (*sorted(self.modes.items()), *self.recompute.items())
        return (*self.train, *map(repr, self.follows), self.continues, *built)

    def assign(self, names: Iterable[str]) -> dict[str, str]:
        """{parameter name: the pattern that trains it}.

        Raises:
            UserError: a pattern matches nothing, or two match one parameter.
        """
        names = list(names)
        owner: dict[str, str] = {}
        for pattern in self.train:
            matched = [name for name in names if _trains(pattern, name)]
            if not matched and pattern == ADAPTERS:
                raise UserError(
                    "stage.train: there are no adapters to train; add callbacks.LoRAInjection under trainer.callbacks+"
                )
            if not matched:
                known = sorted({name.split(".")[0] for name in names})
                raise UserError(f"stage.train: {pattern!r} matches no parameter; the parts are {', '.join(known)}")
            for name in matched:
                if name in owner and ADAPTERS in (pattern, owner[name]):
                    whole = next(other for other in (owner[name], pattern) if other != ADAPTERS)
                    raise UserError(
                        f"stage.train: {whole!r} trains {name.split('.')[0]} as a whole and its adapter with it; leave "
                        f"one of {ADAPTERS!r} and {whole!r} out"
                    )
                if name in owner:
                    raise UserError(
                        f"stage.train: {owner[name]!r} and {pattern!r} both match {name}; make them disjoint"
                    )
                owner[name] = pattern
        return owner

    def set_trainable(self, module: nn.Module) -> None:
        """Gradients for exactly the trained parameters; train mode for the modules that hold them, eval elsewhere."""
        trained = self.assign(name for name, _ in module.named_parameters())
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)
        for path, child in module.named_modules():
            mode = any(parameter.requires_grad for parameter in child.parameters())
            for pattern, published in self.modes.items():
                if path and matches(pattern, path):
                    mode = published == "train"
            child.training = mode
        for pattern in self.modes:
            if not any(path and matches(pattern, path) for path, _ in module.named_modules()):
                raise UserError(f"stage.modes: {pattern!r} matches no module")

    def optimizer_groups(self, module: nn.Module) -> list[dict]:
        """Groups of `torch.optim.AdamW` with the parameters' names, in the order of the patterns.

        Raises:
            UserError: a parameter takes gradients but no pattern trains it.
        """
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        owner = self.assign(name for name, _ in module.named_parameters())
        stray = sorted(parameters.keys() - owner.keys())
        if stray:
            raise UserError(f"stage.train: {stray[0]} takes gradients but is in no group")
        groups: dict[tuple, dict] = {}
        for name, parameter in parameters.items():
            how = self.train[owner[name]]
            decay = how.weight_decay if how.decay_vectors or parameter.ndim > 1 else 0.0
            scale = how.layer_decay ** _layers_above(name, parameters)
            key = (owner[name], decay, scale)
            group = groups.setdefault(
                key, {"params": [], "lr": how.lr * scale, "weight_decay": decay, "part": owner[name]}
            )
            group["params"].append((name, parameter))
        order = list(self.train)
        return sorted(
            groups.values(), key=lambda group: (order.index(group["part"]), group["lr"], group["weight_decay"])
        )

    def configure_optimizers(
        self, module: nn.Module, *, factor: Callable[[int], float], scales_gradients: bool = False
    ) -> dict:
        """AdamW over the groups and its schedule, in Lightning's form.

        Args:
            factor: of the learning rates, given the number of finished steps.
            scales_gradients: training in float16.
        """
        optimizer = self.optimizer.make(self.optimizer_groups(module), scales_gradients=scales_gradients)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


ADAPTERS = "adapters"
"""In `stage.train`: every tensor of an adapter of peft, in whatever part."""
_OF_ADAPTER = re.compile(r".*\.lora_(A|B|magnitude_vector)\..+")


def is_adapter(name: str) -> bool:
    """Whether a tensor is an adapter's."""
    return _OF_ADAPTER.fullmatch(name) is not None


def _trains(pattern: str, name: str) -> bool:
    return is_adapter(name) if pattern == ADAPTERS else matches(pattern, name)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern (a prefix of whole components, or a glob) names a parameter or module."""
    return name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)


_LAYER = re.compile(r"^(.*?)\.(?:blocks|layers|layer)\.(\d+)\.")


def _layers_above(name: str, names: Iterable[str]) -> int:
    """Layers above a tensor in its stack; embeddings count as below layer 0, heads and norms as the top."""
    stacks: dict[str, int] = {}
    for other in names:
        if match := _LAYER.match(other):
            stacks[match[1]] = max(stacks.get(match[1], 0), int(match[2]) + 1)
    if match := _LAYER.match(name):
        return stacks[match[1]] - int(match[2])
    for stack, depth in stacks.items():
        if name.startswith(stack + ".") and re.search(r"embed|token|norm_pre", name[len(stack) :]):
            return depth + 1
    return 0
