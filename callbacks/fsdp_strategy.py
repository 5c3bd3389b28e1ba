"""The strategy that fully sharded training runs under."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import distributed
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from callbacks.fsdp import MixedPrecisionFSDP
from vlm.checkpoints.files.atomic import atomic_directory, remove_leftovers
from vlm.checkpoints.resume.pointer import point_last
from vlm.checkpoints.resume.single_file import AtomicCheckpointIO
from vlm.checkpoints.resume.sharded import copy_shard, cut_like, read_sharded, write_shard, write_state
from vlm.errors import UserError
from vlm.module import VisionLanguageModule
from vlm.moving import changing_names


class FSDP2Strategy(ModelParallelStrategy):
    """`trainer.strategy: fsdp2`.

    Every rank holds a part of every tensor (see `MixedPrecisionFSDP` for the units) and sees its own data.

    A checkpoint is a folder named as the file of another strategy would be, `step=500.ckpt`: each rank writes its rows
    of the trained tensors and of the optimizer state, rank 0 the counters. It appears as a whole or not at all, and can
    be resumed with another number of ranks or another strategy. It has to be on a filesystem that all ranks share.

    Args:
        process_group_backend: `nccl` or `gloo`; None: what suits the device.
        timeout_minutes: after which a rank gives up waiting for the others; None: torch's own (10 with NCCL, 30 with
            gloo).
        ranks_per_shard_group: so many ranks share one copy of weights, gradients and moments, and the copies take the
            same steps (hybrid sharding): `node` for the devices of a node, so that only gradients travel between nodes.
            None: all ranks share one copy.
        reduce_gradients: once in a `step`, where until then every rank keeps what is trained as one whole gradient; or
            with each `micro_batch`, which has more to send and no such gradient to hold.
    """

    def __init__(
        self,
        process_group_backend: str | None = None,
        timeout_minutes: float | None = None,
        ranks_per_shard_group: int | Literal["node"] | None = None,
        reduce_gradients: Literal["step", "micro_batch"] = "step",
    ) -> None:
        if timeout_minutes is not None and timeout_minutes <= 0:
            raise UserError(f"trainer.strategy: timeout_minutes must be more than 0, found {timeout_minutes:g}")
        timeout = default_pg_timeout if timeout_minutes is None else timedelta(minutes=timeout_minutes)
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.ranks_per_shard_group = ranks_per_shard_group
        self.reduce_gradients = reduce_gradients
        self._writers: distributed.ProcessGroup | None = None

    # -- the ranks

    def setup_environment(self) -> None:
        self._setup_distributed()
        assert self.lightning_module is not None
        self._device_mesh = self.lightning_module._device_mesh = self._make_mesh()

    def _make_mesh(self) -> DeviceMesh:
        """The ranks that share a copy; with several copies, (copies, ranks that share one).

        Raises:
            UserError: the ranks cannot be divided so.
        """
        ranks = self.num_processes if self.ranks_per_shard_group == "node" else self.ranks_per_shard_group
        ranks = self.world_size if ranks is None else ranks
        if ranks < 1 or self.world_size % ranks:
            raise UserError(
                f"trainer.strategy: ranks_per_shard_group: {ranks} does not divide the {self.world_size} ranks of this "
                "run; use a divisor, or null"
            )
        device = self.root_device.type
        if ranks == self.world_size:
            return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
        return init_device_mesh(device, (self.world_size // ranks, ranks), mesh_dim_names=("replicate", "shard"))

    def _get_process_group_backend(self) -> str:
        if self._process_group_backend is None and self._offloads and self.root_device.type == "cuda":
            return "cpu:gloo,cuda:nccl"  # norms of gradients are summed over the ranks where the gradients are
        return super()._get_process_group_backend()

    @property
    def _offloads(self) -> bool:
        assert self.lightning_module is not None
        callbacks = self.lightning_module.trainer.callbacks  # type: ignore[attr-defined]
        return any(isinstance(callback, MixedPrecisionFSDP) and callback.cpu_offload for callback in callbacks)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def model_to_device(self) -> None:
        """Says where the network is; `configure_model` has put every tensor into its place."""
        assert self.lightning_module is not None
        self.lightning_module._device = self.root_device

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around each micro-batch of an accumulation but the last."""
        assert isinstance(self.model, FSDPModule)
        block = self.model.set_requires_gradient_sync
        if self.reduce_gradients == "micro_batch":  # sums within a copy, and between copies at the end
            block = self.model.set_requires_all_reduce
        block(False)
        try:
            yield
        finally:
            block(True)

    # -- what a checkpoint holds: references, no copies

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True  # by the ordinary path: what `load_checkpoint` returns is already cut for this rank

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert isinstance(self.lightning_module, VisionLanguageModule)
        changing = changing_names(self.lightning_module)
        return {name: tensor for name, tensor in self.lightning_module.state_dict().items() if name in changing}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return super(ModelParallelStrategy, self).optimizer_state(optimizer)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super(ModelParallelStrategy, self).load_model_state_dict(checkpoint, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)  # brings every moment to where its parameter is

    # -- files

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Saves as a whole; every rank has to call it.

        Raises:
            UserError: on every rank, when any of them cannot write; the checkpoints before this one are intact.
        """
        assert storage_options is None, "no storage options: checkpoints go to a mounted filesystem"
        self._write(Path(self.broadcast(filepath)), checkpoint)

    def prepare_save(self, checkpoint: dict[str, Any], filepath: Any) -> Callable[[], None]:
        """Copies what this rank has to the CPU.

        Returns:
            The rest of `save_checkpoint`, for a thread. The ranks talk in a group of their own there, so that neither
            devices nor the training are waited for.
        """
        if self._writers is None:
            self._writers = distributed.new_group(backend="gloo")
        path = Path(self.broadcast(filepath))
        own = copy_shard(checkpoint) if self._writes else None
        return functools.partial(self._write, path, own, group=self._writers)

    @property
    def _writes(self) -> bool:
        """Whether this rank belongs to the first copy; the others are the same."""
        return self.global_rank < self.device_mesh["shard"].size()

    def _write(self, path: Path, checkpoint: Any, *, group: distributed.ProcessGroup | None = None) -> None:
        with contextlib.ExitStack() as stack:

            def begin() -> str:
                remove_leftovers(path.parent)
                return str(stack.enter_context(atomic_directory(path)))

            begun = [self._together(begin if self.is_global_zero else None, group)]
            distributed.broadcast_object_list(begun, src=0, group=group)
            temporary = Path(begun[0])

            def write() -> None:
                if not temporary.is_dir():
                    raise UserError(
                        f"{path.parent} is not shared by all nodes; put the run folder on a shared filesystem"
                    )
                shards = self.device_mesh["shard"]
                if self._writes:
                    write_shard(temporary, checkpoint, rank=shards.get_local_rank(), world=shards.size())
                if self.is_global_zero:
                    write_state(temporary, checkpoint, world=shards.size())

            self._together(write, group)

            def finish() -> None:
                stack.close()
                point_last(path)

            self._together(finish if self.is_global_zero else None, group)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """What was saved, cut for this rank of this run; single files of other strategies are understood too.

        Raises:
            UserError: on every rank, when any of them cannot read.
        """
        path = Path(self.broadcast(checkpoint_path))

        def read() -> dict[str, Any]:
            if path.is_dir():
                return read_sharded(path, self.device_mesh)
            return self._cut(AtomicCheckpointIO().load_checkpoint(path))

        return self._together(read)

    def _cut(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Replaces the tensors of a checkpoint, and their optimizer states, by this rank's parts of them."""
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        for kind in checkpoint.keys() & {"state_dict", "averages"}:
            tensors = checkpoint[kind]
            checkpoint[kind] = {n: cut_like(t, parameters[n]) if n in parameters else t for n, t in tensors.items()}
        for optimizer, stored in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            owners = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for owner, states in zip(owners, stored["state"].values(), strict=False):
                states.update({name: cut_like(value, owner) for name, value in states.items()})
        return checkpoint

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            AtomicCheckpointIO().remove_checkpoint(filepath)

    def _together(self, action: Callable[[], Any] | None, group: distributed.ProcessGroup | None = None) -> Any:
        """Runs an action on the ranks that have one; when it fails on any of them, every rank raises."""
        result, error = None, None
        try:
            result = action() if action is not None else None
        except Exception as raised:
            error = raised
        mine = None if error is None else (isinstance(error, UserError), f"{type(error).__name__}: {error}", str(error))
        errors: list[Any] = [None] * self.world_size
        distributed.all_gather_object(errors, mine, group=group)
        if error is not None:
            raise error
        for rank, other in enumerate(errors):
            if other is not None:
                by_user, described, message = other
                raise UserError(message) if by_user else RuntimeError(f"rank {rank}: {described}")
        return result


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded training (FSDP2)", override=True)
