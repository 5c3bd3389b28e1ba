"""The order in which a network is built: empty; surgery; what is trained; recomputation; sharding; memory; values.

`VisionLanguageModule.configure_model` runs `assemble` and `fill`.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from vlm.building.blocks import recompute_blocks, recomputed_parts
from vlm.building.inherited_surgery import PlannedSurgery, inherited_surgery, of_parts
from vlm.building.network import allocate, find_ties, initialisers, load_or_init, tie
from vlm.building.precision import compute_dtype, keep_frozen_in
from vlm.building.stage_record import references
from vlm.building.weight_sources import check_finished, check_new, weight_sources
from vlm.errors import UserError
from vlm.language.surgery import combine
from vlm.moving import check_moving, copied_layers, copied_names
from vlm.stages import InitFrom


def stands(module: Any) -> bool:
    """Whether the network of a system is there as this start of its trainer needs it.

    One that was opened to answer (`vlm.load`) is built again to be trained, from the same weights, which the stage then
    follows.

    Raises:
        UserError: nothing says what to train, or the network was trained in another stage.
    """
    if module.is_fitting and module.stage is None and not module.has_own_optimizers:
        raise UserError(
            "nothing says what to train; give the trainer callbacks.StageTransition, or set module.stage = "
            "vlm.stages.Stage(name, train={'connector': vlm.stages.Trained(lr=1e-3)})"
        )
    given, used = module.built_for
    if module.load_report is not None:
        if not module.is_fitting or module.stage is used:
            return True
        known = [stage.network for stage in (given, used) if stage is not None]
        if module.stage is not None and module.stage.network in known:  # rates and schedule may be others
            module.stage = replace(module.stage, follows=used.follows if used is not None else ())
            return True
    if module.load_report is not None and given is not None:
        assert module.stage is not None
        raise UserError(
            f"this network was built for stage {given.name!r}; for stage {module.stage.name!r}, as given now, make a "
            "new one: vlm.load opens what a stage left"
        )
    for part in list(module._modules):
        delattr(module, part)
    used = module.stage
    if module.load_report is not None and used is not None and module.weights is not None:
        used, module.weights = replace(used, follows=[InitFrom(module.weights), *used.follows]), None
    module.built_for, module.stage = (module.stage, used), used
    return False


def assemble(module: Any, *, planned: Sequence[PlannedSurgery] = ()) -> set[str]:
    """Builds a network without values: parts, surgery, what is trained, recomputation.

    Runs under `empty_weights`, or under the meta device where nothing will be filled (`vlm.planning`).

    Args:
        planned: what earlier stages will have done, where their artefacts are not there yet.

    Returns:
        Names of the parameters that surgery added.
    """
    for part, network in module.build_parts().items():
        module.add_module(part, network)
    plain = {name for name, _ in module.named_parameters()}
    inherited = [pair for earlier in planned for pair in of_parts(module, *earlier)] + inherited_surgery(module)
    if not module.quantized:
        inherited = [(origin, operation.unquantized()) for origin, operation in inherited]
    module.surgery = combine(module, inherited, module.surgery)
    for operation in module.surgery:
        operation.apply(module)
    module.ties = find_ties(module)
    moving = check_moving(module)
    if module.stage is not None:
        module.stage.set_trainable(module)
        if both := sorted(module.trained_names() & moving):
            raise UserError(f"stage.train: {both[0]} moves without a gradient; leave it out of the patterns")
        earlier = [operation for _, operation in inherited]
        for operation in module.surgery:
            operation.check_trained(module, is_new=operation not in earlier)
    else:
        module.requires_grad_(False).eval()
    for part, every in recomputed_parts(module).items():
        recompute_blocks(module.get_submodule(part), every=every)
    if module.compile_network is not None:
        module.compile_network(module)
    return {name for name, _ in module.named_parameters()} - plain


def fill(module: Any, *, added: Collection[str]) -> None:
    """Shards an assembled network where there is a mesh, gives it memory, and every tensor its value.

    Args:
        added: names of the parameters that surgery added.

    Raises:
        UserError: it cannot be sharded, or its weights are not what they have to be.
    """
    module.frozen_dtype, shards_on = None, None
    if module.device_mesh is not None:
        if module.shard is None:
            raise UserError("a sharding strategy needs the callback callbacks.MixedPrecisionFSDP")
        for operation in module.surgery:
            if (reason := operation.cannot_shard) is not None:
                raise UserError(f"trainer.strategy: {reason}")
        shards_on = module.shard(module, module.device_mesh)
    elif (dtype := compute_dtype(module)) is not None:
        keep_frozen_in(module, dtype)
        module.frozen_dtype = dtype
    trainer = module._trainer
    allocate(module, trainer.strategy.root_device if trainer is not None else module.device, shards_on=shards_on)
    tie(module, module.ties)
    sources = weight_sources(module)
    moving = check_moving(module)
    module.load_report, module.frozen_hashes = load_or_init(
        module,
        sources,
        seed=module.seed,
        initialisers=initialisers(dict(module.named_children()), module.arguments),
        copies=copied_names(module.state_dict().keys() - module.ties.keys(), module.copies) | copied_layers(module),
        moving=moving,
    )
    # DDP would send buffers from the first rank to all before each forward. Every rank writes the same into its own
    # queues, and what is not stored (tables of rotary positions) is the same on all.
    constant = {name for name, _ in module.named_buffers()} - module.state_dict().keys()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(moving | constant))
    if module.weights is not None and module.stage is None:
        check_finished(module)
    check_new(module, sources, added=added)
    if module.stage is not None:
        references(module)
