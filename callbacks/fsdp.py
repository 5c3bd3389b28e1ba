"""Fully sharded training with float32 master weights and bfloat16 compute."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import PreTrainedModel

from vlm.building.blocks import stacked_blocks
from vlm.building.network import find_ties
from vlm.building.precision import round_weights
from vlm.errors import UserError
from vlm.module import VisionLanguageModule

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Precision = Literal["32-true", "bf16-mixed", "bf16-true"]


class MixedPrecisionFSDP(Callback):
    """Says how a network is cut into FSDP2 units; `configure_model` applies it while the network is still empty.

    - One unit per block of every stack of a part, one for its token embeddings and one for its vocabulary head.
    - The system itself is the root and holds the rest: connectors, queries, position tables, last norms. It is gathered
      around every method in `forward_methods`, so a system may call any part of a part directly.
    - What is tied to something outside of its unit (a head to the embeddings, BLIP's decoder to its encoder) stays in
      the root with it: between two units torch would silently untie them.

    Every rank has to run the same blocks in the same order, or their gathers would not meet: a rank without an image
    runs a blank one where another rank has one.

    Args:
        precision: `bf16-mixed` computes in bfloat16; what is trained, its gradients and moments stay float32. In
            `bf16-true` these are bfloat16 too: half of the memory, and updates that are small beside their weight are
            lost in its rounding. `32-true` computes in float32.
        reduce_dtype: of gradients while they are summed over ranks.
        reshard_after_forward: free gathered parameters between forward and backward.
        cpu_offload: shards, gradients and moments are in the host's memory, where the optimizer runs; the device has
            what is gathered and activations alone.
    """

    def __init__(
        self,
        precision: Precision = "bf16-mixed",
        reduce_dtype: Literal["bf16", "fp32"] = "fp32",
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
    ) -> None:
        param_dtype = DTYPES["fp32" if precision == "32-true" else "bf16"]
        self.policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=DTYPES[reduce_dtype])
        self.precision = precision
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, VisionLanguageModule):
            raise UserError(f"MixedPrecisionFSDP shards the systems of this package, not {type(pl_module).__name__}")
        if pl_module.device_mesh is None:
            raise UserError("MixedPrecisionFSDP needs trainer.strategy: fsdp2")
        if trainer.precision != "32-true":
            raise UserError(
                f"MixedPrecisionFSDP sets the precision itself; use trainer.precision: 32-true, not {trainer.precision}"
            )
        pl_module.shard = self.shard

    def shard(self, module: nn.Module, mesh: DeviceMesh) -> torch.device | None:
        """Cuts the empty `module` into units over the last dimension of `mesh`; along a first one it is repeated.

        Returns:
            Where the shards are kept, if that is not the device.

        Raises:
            UserError: a parameter has no dimension to shard.
        """
        assert isinstance(module, VisionLanguageModule)
        round_weights(module, self.precision)
        ties = find_ties(module)
        for name, parameter in module.named_parameters():
            if parameter.ndim == 0:
                raise UserError(f"{name} is a scalar, which cannot be sharded; give it the shape (1,)")
        shard = functools.partial(
            fully_shard,
            mesh=mesh,
            mp_policy=self.policy,
            offload_policy=self._offload_policy(mesh),
            reshard_after_forward=self.reshard_after_forward,
        )
        for path, unit in (*stacked_blocks(module), *_vocabularies(module)):
            held = {f"{path}.{name}" for name, _ in unit.named_parameters(remove_duplicate=False)}
            if all((alias in held) == (owner in held) for alias, owner in ties.items()):
                shard(unit)
        # The root takes packs, whose loss weights must not be rounded. It is freed after each forward like the others
        # (by itself torch keeps it): whoever reads parameters after a validation step would see rounded copies.
        root_policy = dataclasses.replace(self.policy, cast_forward_inputs=False)
        shard(module, mp_policy=root_policy, reshard_after_forward=True)
        _gather_around(module, module.forward_methods)
        assert find_ties(module) == ties, "sharding has untied parameters that were one tensor"
        return torch.device("cpu") if self.cpu_offload else None

    def _offload_policy(self, mesh: DeviceMesh) -> OffloadPolicy:
        return CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if self.cpu_offload else OffloadPolicy()


def _vocabularies(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of the token embeddings and heads of the language models."""
    for path, network in module.named_children():
        if isinstance(network, PreTrainedModel):
            layers = (network.get_input_embeddings(), network.get_output_embeddings())
            yield from ((f"{path}.{name}", m) for name, m in network.named_modules() if any(m is x for x in layers))


def _gather_around(module: nn.Module, names: Sequence[str]) -> None:
    """Makes methods forwards of the root unit; one that is called inside another is an ordinary call."""
    running = False

    def outermost(plain: Callable, gathered: Callable) -> Callable:
        @functools.wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal running
            if running:
                return plain(*args, **kwargs)
            running = True
            try:
                return gathered(*args, **kwargs)
            finally:
                running = False

        return call

    for name in names:
        plain = getattr(module, name)
        register_fsdp_forward_method(module, name)
        setattr(module, name, outermost(plain, getattr(module, name)))
