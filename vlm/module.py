"""The LightningModule that all sixteen systems share: build once, step exactly, save what was trained.

Shape legend: see `vlm.batch`.
"""

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule

from vlm.answering import Answering
from vlm.batch import EVENTS, Batch
from vlm.building.build import assemble, fill, stands
from vlm.building.network import empty_weights
from vlm.building.precision import check_precision
from vlm.building.stage_record import stage_record
from vlm.building.weight_sources import is_resuming
from vlm.checkpoints.artefact import read_artefact
from vlm.checkpoints.report import LoadReport
from vlm.checkpoints.resume.moments import restore_moments
from vlm.checkpoints.resume.opened import RECORD
from vlm.codec import Codec
from vlm.data.loading.trainer_progress import ends_step
from vlm.errors import SampleError, UserError
from vlm.evaluation.inference import answer_each
from vlm.evaluation.judges import Judges
from vlm.evaluation.means import EpochMeans, with_loss
from vlm.language import Decoding, Surgery
from vlm.monitoring.over_ranks import over_ranks
from vlm.moving import changing_names
from vlm.sample import Sample
from vlm.seeding import seed_from
from vlm.stages import Stage


class VisionLanguageModule(Answering):
    """Base of the systems.

    A system hands all of its arguments to this constructor, and says how they become a codec (`make_codec`), how its
    parts are built (`build_parts`) and what a batch costs (`losses`). Everything else is here.

    Set by callbacks in their `setup`, or by hand, before `configure_model` runs:

    Attributes:
        arguments: the constructor's arguments; part descriptions among them know base weights and initial values.
        stage: what is trained; None: everything is frozen and in eval mode, and `fit` is refused.
        surgery: changes to the network (`register_surgery`). `configure_model` puts those before them that the weights
            were trained with; artefacts store all, so that whoever loads one has them.
        weights: artefact or published folder to load instead of what the stage follows.
        quantized: inherited surgery keeps in 4 bits what it did in training; False: it keeps nothing so.
        judges: who judges which samples in validation and test.
        decoding: how `predict_step` searches for answers; greedy where it is None.
        shard: applies FSDP2 to the still empty network; set by the `MixedPrecisionFSDP` callback.
        compile_network: compiles blocks of the still empty network; set by the `CompiledBlocks` callback.
        load_report: where each tensor came from, after `configure_model`.
        frozen_hashes: content of the frozen tensors as they were read, {name: hash}; what checkpoints refer to.
        frozen_dtype: of the frozen weights of linear layers and convolutions under `bf16-mixed` or `16-mixed`; None:
            they are in float32 like everything else.
        computes_in: what autocast computes in where there is no trainer (`vlm.load`); None: in float32.
        ties: {alias: owner} of parameters that are one tensor.
        running: {term: this rank's share of the step's mean, over the micro-batches done so far}.
        averages: {name: float32 moving average of a trained tensor}, which artefacts hold in the place of the tensor;
            kept by the `EMA` callback, None without it.
        references: the stage, and how its artefact refers to what it follows.
        epochs_done: epochs of the stage that are done when the present step begins, as in 1.25; infinite outside of
            training, where every ramp is over. `global_step` has the steps.
    """

    term_weights: ClassVar[Mapping[str, float]] = {}
    """Factor on each loss term; 1 where a term is not listed."""
    in_batch_terms: ClassVar[tuple[str, ...]] = ()
    """Loss terms that compare the samples of a step with each other (`vlm.in_batch`)."""
    moving: Sequence[str] = ()
    """Patterns of the tensors that training changes without a gradient (momentum copies, queues); they are written in
    `on_step_start` and `on_step_end` alone."""
    copies: Mapping[str, str] = MappingProxyType({})
    """{prefix: prefix of the tensors that those below it start as copies of, where no source has them}."""
    forward_methods: ClassVar[tuple[str, ...]] = (
        *("training_step", "validation_step", "test_step"),
        *("_generate", "_score", "_embed", "_match"),
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
        self.surgery: list[Surgery] = []
        self.weights: str | None = None
        self.quantized = True
        self.judges = Judges()
        self.decoding: Decoding | None = None
        self.shard: Callable[[nn.Module, Any], torch.device | None] | None = None
        self.load_report: LoadReport | None = None
        self.frozen_hashes: dict[str, str] = {}
        self.frozen_dtype: torch.dtype | None = None
        self.computes_in: torch.dtype | None = None
        self.ties: dict[str, str] = {}
        self.running: dict[str, Tensor] = {}
        self.averages: dict[str, Tensor] | None = None
        self.epochs_done = math.inf
        self.references: tuple[Stage | None, list[dict[str, Any]]] = (None, [])
        self.compile_network: Callable[[nn.Module], None] | None = None
        self._next_epoch = 0
        self._total_steps: int | None = None
        self.built_for: tuple[Stage | None, Stage | None] = (None, None)
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

    def on_step_start(self) -> None:
        """Before the first micro-batch of an optimizer step: where momentum copies move.

        Moving tensors are not written in `losses`: inside the `forward_methods`, a sharded system has gathered copies
        of its parameters, and what is written to them is lost.
        """

    def on_step_end(self) -> None:
        """After the update of an optimizer step and before anything is saved: where queues take in its features."""

    # -- building

    def register_surgery(self, operation: Surgery) -> None:
        """Has `configure_model` change the network; registered again, it still happens once.

        Raises:
            UserError: the network is built already, without this change.
        """
        if operation in self.surgery:
            return
        if self.load_report is not None and not (self.is_fitting and self.built_for[0] is None):
            raise UserError(f"surgery: {operation} comes after the network was built; register it before")
        self.surgery.append(operation)

    @property
    def has_own_optimizers(self) -> bool:
        """Whether a subclass says itself what is trained."""
        return type(self).configure_optimizers is not VisionLanguageModule.configure_optimizers

    @property
    def is_fitting(self) -> bool:
        """Whether a trainer trains it, or is about to."""
        return self._trainer is not None and self._trainer.state.fn == "fit"

    def setup(self, stage: str) -> None:
        if stage == "fit":  # a module may be fitted again, also after a fit that was interrupted
            self.running, self.epochs_done = {}, math.inf
            self._next_epoch, self._total_steps = 0, None

    def configure_model(self) -> None:
        """Builds the network (`vlm.building.build`); after it every tensor has its value and nothing is on the meta
        device."""
        if stands(self):  # Lightning calls again for validate after fit
            check_precision(self)
            return
        with empty_weights():
            added = assemble(self)
        fill(self, added=added)

    def cpu(self) -> Self:
        """A trainer that ends calls it, also after an error that has left tensors without values: none is moved then,
        or that error would hide behind another one."""
        return self if any(tensor.is_meta for tensor in self.parameters()) else super().cpu()

    # -- training

    def configure_optimizers(self) -> Any:
        assert self.stage is not None  # `configure_model` has seen to it
        if not self.stage.train:
            raise UserError(f"stage {self.stage.name!r} trains nothing; name parts under stage.train")
        schedule, finished = self.stage.schedule, self.finished_steps()

        def factor(step: int) -> float:
            step += finished
            # The factor at step 0 is the same for every length. Asked for its number of steps before the first one, a
            # trainer makes the loader before it has restored where the loader stands.
            total = schedule.total_steps or (self.total_steps() if step else 1)
            epochs = self.trainer.max_epochs if schedule.is_per_epoch else None
            return schedule.factor(step, total, epoch=self._next_epoch, epochs=epochs)

        scales = str(self.trainer.precision) == "16-mixed"
        made = self.stage.configure_optimizers(self, factor=factor, scales_gradients=scales)
        if self.stage.continues is not None and not is_resuming(self):
            earlier = read_artefact(self.stage.continues)
            if earlier.meta.get("averaged") and self.averages is None:
                raise UserError(
                    f"stage.continues: {earlier.folder} keeps moving averages; add callbacks.EMA, or follow it to "
                    "start from the averages alone"
                )
            restore_moments(made["optimizer"], earlier)
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
        # by pack: by global step all packs of a step would draw the same dropout masks; counted over micro-batches and
        # ranks, a pack draws the same ones however the packs of a step are shared
        torch.manual_seed(
            seed_from(self.seed, self.current_epoch, batch_idx * self.trainer.world_size + self.global_rank)
        )
        accumulate = self.trainer.accumulate_grad_batches
        if batch_idx % accumulate == 0:
            step, steps = batch_idx // accumulate, -(-int(self.trainer.num_training_batches) // accumulate)
            self.epochs_done = self.current_epoch + step / steps
            self._next_epoch = self.current_epoch + (step + 1 == steps)
            self.on_step_start()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.on_step_end()  # not in `on_train_batch_end`: callbacks save in theirs, which comes first

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
        """A trained part that the step did not reach has a zero gradient, as if a blank image had passed it."""
        for parameter in self.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if not ends_step(self.trainer, batch_idx):
            return
        losses = with_loss(self.running, self.term_weights)
        # the progress bar of Lightning, or its sums over ranks, would have the host wait for the device at every step
        for name, value in zip(losses, over_ranks(torch.stack(list(losses.values()))), strict=True):
            self.log(f"train/{name}", value, batch_size=1)
        for name in (event for event in EVENTS if event in batch.counts):  # of the whole step: alike on every rank
            self.log(f"train/{name}", torch.tensor(batch.counts[name]), batch_size=1)
        self.running = {}

    # -- validation

    def on_validation_epoch_start(self) -> None:
        self._means = EpochMeans()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any] | None:
        if batch.judged_by is not None:  # by the `Evaluation` callback
            return {"said": self.judges.by_name[batch.judged_by].ask(self, batch)}
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

    def predict_step(self, batch: Sequence[Sample | SampleError], batch_idx: int) -> list[str | SampleError]:
        """An answer to each sample of a list of `predict_dataloader`, or why there is none."""
        return answer_each(self, batch, decoding=self.decoding, batch_size=max(1, len(batch)))

    @property
    def is_sharded(self) -> bool:
        """Whether every rank holds a part of every tensor, so that all ranks have to run the network together."""
        return isinstance(self, FSDPModule)

    @property
    def num_replicas(self) -> int:
        """How many ranks hold each part of a gradient."""
        if not self.is_sharded:
            return self.trainer.world_size
        assert self.device_mesh is not None
        return self.device_mesh.size() // self.device_mesh["shard"].size()

    def over_ranks(self, value: float, operation: Literal["sum", "max"]) -> float:
        """A number combined over the ranks of a sharded system; every rank has to call it. Itself where not sharded."""
        if not self.is_sharded:
            return value
        combined = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(combined, getattr(distributed.ReduceOp, operation.upper()))
        return combined.item()

    # -- saving

    def trained_names(self) -> set[str]:
        """Names of the parameters that take gradients, aliases left out."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checkpoints hold what training changes, and what else it takes to look at it (`stage.json`).

        Frozen tensors are referred to by content.
        """
        changing = changing_names(self)
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in changing}
        checkpoint["frozen"] = dict(self.frozen_hashes)
        if self.averages:
            checkpoint["averages"] = dict(self.averages)
        if self.stage is not None and self._trainer is not None:
            step = self.finished_steps() + self.trainer.global_step
            checkpoint[RECORD] = stage_record(self, self.trainer.default_root_dir, global_step=step)
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
        if ("averages" in checkpoint) != (self.averages is not None):
            raise UserError(
                "cannot resume: only one of the checkpoint and this run keeps moving averages; put callbacks.EMA back, "
                "or take it out, as it was at the start"
            )
        self._total_steps = checkpoint["total_steps"]

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, map_location: Any = None, **arguments: Any) -> Self:  # type: ignore[override]
        """`vlm.load`: a checkpoint says how its network is built, and around what.

        Raises:
            UserError: it holds another system, or further arguments are given, which it has already.
        """
        from vlm.loading import load

        if arguments:
            raise UserError(
                f"load_from_checkpoint: {next(iter(arguments))!r} is in the checkpoint; leave it out, or build a "
                f"{cls.__name__} and give its trainer ckpt_path={str(checkpoint_path)!r}"
            )
        module = load(checkpoint_path, device=map_location)
        if not isinstance(module, cls):
            raise UserError(f"{checkpoint_path}: holds a {type(module).__name__}; open it with vlm.load")
        return module

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a resume checkpoint: exactly the tensors that training changes."""
        changing = changing_names(self)
        if strict and state_dict.keys() != changing:
            odd = sorted(state_dict.keys() ^ changing)
            raise UserError(
                f"cannot resume: checkpoint and stage train different tensors, such as {odd[0]} ({len(odd)} in all)"
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)
