"""The LightningModule that all sixteen systems share: build once, step exactly, save what was trained.

Shape legend: see `vlm.batch`.
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule

from vlm.batch import EVENTS, Batch, Row
from vlm.building.blocks import recompute_blocks
from vlm.building.network import allocate, empty_weights, find_ties, initialisers, load_or_init, tie
from vlm.building.weight_sources import check_finished, is_resuming, weight_sources
from vlm.checkpoints.artefact import read_artefact
from vlm.checkpoints.report import LoadReport
from vlm.checkpoints.resume.moments import restore_moments
from vlm.codec import Codec
from vlm.errors import UserError
from vlm.evaluation.inference import as_pack, chunks_in_step, evaluating, label_scores
from vlm.evaluation.means import EpochMeans
from vlm.language import Decoding
from vlm.metrics.judges import Judges
from vlm.sample import Sample
from vlm.seeding import seed_from
from vlm.stages import Stage


class VisionLanguageModule(LightningModule):
    """Base of the systems.

    A system hands all of its arguments to this constructor, and says how they become a codec (`make_codec`), how its
    parts are built (`build_parts`) and what a batch costs (`losses`). Everything else is here.

    Set by callbacks in their `setup`, or by hand, before `configure_model` runs:

    Attributes:
        arguments: the constructor's arguments; part descriptions among them know base weights and initial values.
        stage: what is trained; None: everything is frozen and in eval mode.
        surgery: changes to the network, applied in order, stored with artefacts and replayed by whoever loads them.
        weights: artefact or published folder to load instead of what the stage follows.
        judges: metrics of answers in validation and test, and how answers are searched for.
        shard: applies FSDP2 to the still empty network; set by the `MixedPrecisionFSDP` callback.
        load_report: where each tensor came from, after `configure_model`.
        frozen_hashes: content of the frozen tensors, {name: hash}; what checkpoints refer to.
        ties: {alias: owner} of parameters that are one tensor.
        running: {term: this rank's share of the step's mean, over the micro-batches done so far}.
    """

    codec: Codec
    system: ClassVar[str]
    """Name of the system in recipes, artefacts and converters."""
    term_weights: ClassVar[Mapping[str, float]] = {}
    """Factor on each loss term; 1 where a term is not listed."""
    forward_methods: ClassVar[tuple[str, ...]] = (
        *("training_step", "validation_step", "test_step"),
        *("_generate", "_score"),
    )
    """Methods that run the network: a sharded system gathers its parameters around each of them."""

    def __init__(self, *, seed: int = 0, **arguments: Any) -> None:
        super().__init__()
        constructors = [vars(kind)["__init__"] for kind in type(self).__mro__ if "__init__" in vars(kind)]
        known = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
        if unknown := sorted(arguments.keys() - known):
            raise TypeError(f"{type(self).__name__} takes no argument {unknown[0]!r}")
        self.seed = seed
        self.arguments = {**arguments, "seed": seed}
        self.stage: Stage | None = None
        self.surgery: list[Any] = []
        self.weights: str | None = None
        self.judges = Judges()
        self.shard: Callable[[nn.Module, Any], None] | None = None
        self.load_report: LoadReport | None = None
        self.frozen_hashes: dict[str, str] = {}
        self.ties: dict[str, str] = {}
        self.running: dict[str, Tensor] = {}
        self._total_steps: int | None = None
        self.codec = self.make_codec()

    # -- what a system says

    @abstractmethod
    def make_codec(self) -> Codec:
        """The codec, from `arguments` alone: the constructor calls it once, before those of subclasses have run."""

    @abstractmethod
    def build_parts(self) -> dict[str, nn.Module]:
        """{part: network}; runs under `empty_weights`. Each part is described by the argument of the same name."""

    @abstractmethod
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """{term: float32[] sum over this pack}; the denominator of each term is `batch.counts[term]`."""

    def label_row(self, batch: Batch) -> Row:
        """The row whose tokens are predicted."""
        return batch.text

    def label_logits(self, batch: Batch) -> Tensor:
        """float[L, vocabulary] at the label positions of `label_row`."""
        raise NotImplementedError(f"{type(self).__name__} predicts no tokens")

    def answers(self, batch: Batch, decoding: Decoding) -> list[str]:
        """What the system says to each sample of a pack that was encoded with `generate=True`."""
        raise NotImplementedError(f"{type(self).__name__} does not answer")

    # -- building

    def configure_model(self) -> None:
        """Builds the network; after it every tensor has its value and nothing is on the meta device.

        The order is fixed: build on meta, surgery, what is trained, recomputation, sharding, memory, base weights,
        artefacts.
        """
        if self.load_report is not None:  # Lightning calls again for validate after fit
            return
        with empty_weights():
            for part, network in self.build_parts().items():
                self.add_module(part, network)
            plain = {name for name, _ in self.named_parameters()}
            for operation in self.surgery:
                operation.apply(self)
        self.ties = find_ties(self)
        if self.stage is not None:
            self.stage.set_trainable(self)
        else:
            self.requires_grad_(False).eval()
        for part, description in self.arguments.items():
            if getattr(description, "checkpointing", False):
                recompute_blocks(self.get_submodule(part))
        if self.device_mesh is not None:
            if self.shard is None:
                raise UserError("a sharding strategy needs the callback callbacks.MixedPrecisionFSDP")
            self.shard(self, self.device_mesh)
        trainer = self._trainer
        allocate(self, trainer.strategy.root_device if trainer is not None else self.device)
        tie(self, self.ties)
        self.load_report, self.frozen_hashes = load_or_init(
            self,
            weight_sources(self),
            seed=self.seed,
            initialisers=initialisers(dict(self.named_children()), self.arguments),
        )
        if self.weights is not None and self.stage is None:
            check_finished(self)
        # a part with base weights may start nothing fresh, but for what surgery added
        complete = tuple(f"{part}." for part, value in self.arguments.items() if getattr(value, "weights", None))
        self.load_report.check(
            allow_new=[n for n in self.load_report.new if n not in plain or not n.startswith(complete)]
        )

    # -- training

    def configure_optimizers(self) -> Any:
        assert self.stage is not None, "StageTransition sets the stage before optimizers are made"
        made = self.stage.configure_optimizers(self, total_steps=self.total_steps, finished_steps=self.finished_steps())
        if self.stage.continues is not None and not is_resuming(self):
            restore_moments(made["optimizer"], read_artefact(self.stage.continues))
        return made

    def finished_steps(self) -> int:
        """Optimizer steps of the stages that this one continues."""
        if self.stage is None or self.stage.continues is None:
            return 0
        return int(read_artefact(self.stage.continues).meta["global_step"])

    def total_steps(self) -> int:
        """Length of the stage as it was when it began: later epochs may have another number of steps."""
        if self._total_steps is None:
            self._total_steps = int(self.trainer.estimated_stepping_batches)
        return self._total_steps

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # by micro-batch: by global step every micro-batch of a window would draw the same dropout masks
        torch.manual_seed(seed_from(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, terms = self._scaled_loss(batch)
        for name, value in terms.items():
            self.running[name] = self.running.get(name, 0.0) + value.detach()
        return loss

    def _scaled_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate, and this pack's share of each term's mean over the step."""
        shares: dict[str, Tensor] = {}
        loss = torch.zeros((), device=self.device)
        for name, total in self.losses(batch).items():
            count = batch.counts.get(name, 0.0)
            shares[name] = total / count if count else total * 0.0
            loss = loss + self.term_weights.get(name, 1.0) * shares[name]
        # Lightning divides by the micro-batches of a window, DDP and FSDP by the ranks: together, the packs of the step
        return loss * batch.packs, shares

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A trained part that the step did not reach has a zero gradient, as if a blank picture had passed it."""
        for parameter in self.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        total: Any = 0.0
        for name, value in self.running.items():
            self._log_sum(f"train/{name}", value)
            total = total + self.term_weights.get(name, 1.0) * value
        self._log_sum("train/loss", total, prog_bar=True)
        for name in (event for event in EVENTS if event in batch.counts):  # of the whole step: alike on every rank
            self.log(f"train/{name}", batch.counts[name], batch_size=1)
        self.running = {}

    def _log_sum(self, name: str, value: Any, *, prog_bar: bool = False) -> None:
        world = self.trainer.world_size
        self.log(name, value, prog_bar=prog_bar, sync_dist=world > 1, reduce_fx="sum", on_step=True, batch_size=1)

    # -- validation

    def on_validation_epoch_start(self) -> None:
        self._means = EpochMeans()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[str]] | None:
        if batch.judged_by is not None:  # by the `Evaluation` callback
            return {"answers": self.answers(batch, self.judges.decoding)}
        self._means.add(self.losses(batch), batch)
        return None

    def on_validation_epoch_end(self) -> None:
        when = "test" if self.trainer.testing else "val"
        for name, mean in self._means.over_ranks(self.trainer.strategy, self.term_weights).items():
            self.log(f"{when}/{name}", mean, prog_bar=name == "loss", batch_size=1)

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    @property
    def is_sharded(self) -> bool:
        """Whether every rank holds a part of every tensor, so that all ranks have to run the network together."""
        return isinstance(self, FSDPModule)

    def over_ranks(self, value: float, operation: Literal["sum", "max"]) -> float:
        """A number combined over the ranks of a sharded system; every rank has to call it. Itself where not sharded."""
        if not self.is_sharded:
            return value
        combined = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(combined, getattr(distributed.ReduceOp, operation.upper()))
        return combined.item()

    # -- use

    def generate(
        self, samples: Sequence[Sample], *, decoding: Decoding | None = None, batch_size: int = 8
    ) -> list[str]:
        """An answer to each sample's conversation; its last assistant message, if any, is left out.

        The ranks of a sharded system call it together, each with its own samples, as many as it has.
        """
        chunks = chunks_in_step(self, samples, batch_size)
        return [answer for chunk in chunks for answer in self._generate(chunk, decoding or Decoding())]

    def _generate(self, samples: Sequence[Sample], decoding: Decoding) -> list[str]:
        with evaluating(self):
            return self.answers(as_pack(self, samples, generate=True), decoding)[: len(samples)]

    def score(self, samples: Sequence[Sample], *, batch_size: int = 8) -> list[Tensor]:
        """Log-probability of each trained token of each sample: float32[labels of the sample].

        The ranks of a sharded system call it together, each with its own samples, as many as it has.
        """
        return [scores for chunk in chunks_in_step(self, samples, batch_size) for scores in self._score(chunk)]

    def _score(self, samples: Sequence[Sample]) -> list[Tensor]:
        with evaluating(self):
            batch = as_pack(self, samples, generate=False)
            return label_scores(self.label_logits(batch), self.label_row(batch), len(samples))

    # -- saving

    def trained_names(self) -> set[str]:
        """Names of the parameters that take gradients, aliases left out."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume checkpoints hold the trained tensors; frozen ones are referred to by content."""
        trained = self.trained_names()
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in trained}
        checkpoint["frozen"] = dict(self.frozen_hashes)
        checkpoint["total_steps"] = self._total_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stored = checkpoint.get("frozen", {})
        ours = self.frozen_hashes
        changed = sorted(name for name in stored.keys() | ours.keys() if stored.get(name) != ours.get(name))
        if changed:
            raise UserError(
                f"cannot resume: {len(changed)} frozen tensors have changed since the start, such as {changed[0]}; "
                "put the base weights or the followed artefact back, or start in another folder"
            )
        self._total_steps = checkpoint["total_steps"]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a resume checkpoint: exactly the trained tensors."""
        trained = self.trained_names()
        if strict and state_dict.keys() != trained:
            odd = sorted(state_dict.keys() ^ trained)
            raise UserError(
                f"cannot resume: checkpoint and stage train different tensors, such as {odd[0]} ({len(odd)} in all)"
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)
