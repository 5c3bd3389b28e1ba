"""From a description to a finished network: empty on the meta device, then every tensor filled exactly once.

A 7-billion-parameter model is never held twice, and what a tensor is filled with depends on neither the number of
devices nor the way it is sharded: weights are streamed from files one at a time, and new tensors are drawn in full from
a generator seeded by (seed, name) before each rank keeps its part.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm.checkpoints.files.identity import hash_tensor
from vlm.checkpoints.files.parts import assign
from vlm.checkpoints.files.source import Change, WeightSource
from vlm.checkpoints.report import LoadReport, Resized
from vlm.errors import UserError
from vlm.seeding import seed_from

Initialiser = Callable[[nn.Module], None]
"""Draws the tensors that a module holds itself (not those of its children), in place."""


@contextmanager
def empty_weights() -> Iterator[None]:
    """Inside, new modules keep their buffers, on the CPU, but their parameters take no memory (on the meta device).

    On the CPU whatever surrounds it: Lightning builds in the context of its device, whose tables would differ in their
    last bits. Unlike `torch.device("meta")`, tables that constructors compute (rotary frequencies) stay real; unlike
    accelerate's context of this kind, parameters that are registered twice stay tied.
    """
    register: Any = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        with torch.device("cpu"):
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def find_ties(module: nn.Module) -> dict[str, str]:
    """{alias: owner} of parameters that are one tensor under two names, in registration order."""
    owners: dict[int, str] = {}
    ties = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if owners.setdefault(id(parameter), name) != name:
            ties[name] = owners[id(parameter)]
    return ties


def tie(module: nn.Module, ties: Mapping[str, str]) -> None:
    """Makes each alias the same parameter object as its owner again."""
    for alias, owner in ties.items():
        parent, _, leaf = alias.rpartition(".")
        module.get_submodule(parent)._parameters[leaf] = module.get_parameter(owner)


def allocate(module: nn.Module, device: torch.device, *, shards_on: torch.device | None = None) -> None:
    """Gives memory to everything on the meta device and moves the rest; the values are still undefined.

    What is marked `stays_empty` gets its memory when its layer is given the value, in another form.

    Args:
        shards_on: where sharded tensors are kept, if that is not `device`.
    """

    def move(tensor: Tensor) -> Tensor:
        if getattr(tensor, "stays_empty", False):
            return tensor
        place = shards_on if shards_on is not None and isinstance(tensor, DTensor) else device
        return torch.empty_like(tensor, device=place) if tensor.is_meta else tensor.to(place)

    module._apply(move)


def initialisers(parts: Mapping[str, nn.Module], descriptions: Mapping[str, Any]) -> dict[str, Initialiser]:
    """{part: how its new tensors are drawn}: by its description's rule, or by each layer's own where it has none."""

    def initialiser(network: nn.Module, description: Any) -> Initialiser:
        def initialise(module: Any) -> None:
            module = getattr(module, "base_layer", module)  # of an adapter, whose own tensors are those of the base
            if hasattr(module, "initialise_new"):  # modules of surgery know how their paths start
                module.initialise_new()
            elif hasattr(description, "initialise"):
                description.initialise(network, module)
            else:
                module.reset_parameters()

        return initialise

    return {part: initialiser(network, descriptions.get(part)) for part, network in parts.items()}


@torch.no_grad()
def load_or_init(
    module: nn.Module,
    sources: Sequence[WeightSource],
    *,
    seed: int,
    initialisers: Mapping[str, Initialiser],
    copies: Mapping[str, str] = MappingProxyType({}),
    moving: Collection[str] = (),
) -> tuple[LoadReport, dict[str, str]]:
    """Fills every parameter and persistent buffer of `module` exactly once.

    Args:
        module: allocated; parameters may be sharded.
        sources: where several provide a tensor, the last one wins.
        seed: of the new tensors, together with their names.
        initialisers: per part (first component of a name), how its new tensors are drawn.
        copies: {tensor: the tensor whose value it takes when no source has its own}: the value as it was read or
            drawn, also where the network keeps that in another type.
        moving: tensors without gradients that are not frozen; buffers among them are drawn like parameters.

    Returns:
        What was loaded, and the content hash of every frozen tensor.

    Raises:
        UserError: a source has a tensor that the network does not, one of another shape, or two for one of the network.
    """
    tensors = dict(module.state_dict(keep_vars=True))
    device = next((tensor.device for tensor in tensors.values() if not tensor.is_meta), torch.device("cpu"))
    aliases = find_ties(module)
    provider = {name: source for source in sources for name in source.names}
    copied: dict[str, list[str]] = {}
    for name, origin in copies.items():
        if name not in provider:
            copied.setdefault(aliases.get(origin, origin), []).append(name)
    report, hashes = LoadReport(), {}

    def fill(name: str, value: Tensor, changes: Sequence[Change] = ()) -> None:
        target = tensors[name]
        if not target.requires_grad and name not in moving:
            content = hash_tensor(_as_read(value))  # of what was read, however it is changed and kept
            for change in changes:
                content = change.content(content)
            hashes[name] = content
        for change in changes:
            value = change(value)
        _put(module, name, target, value, device)
        for copy in copied.get(name, ()):
            fill(copy, value)
            report.copied.append(copy)

    for source in sources:
        report.dropped += source.dropped
        report.carried += source.carried
        unknown = sorted(source.names - tensors.keys())
        if unknown:
            raise UserError(
                f"{source.label}: {len(unknown)} tensors have no place in the network, such as {unknown[0]}"
            )
        wanted = {name for name in source.names if provider[name] is source and name not in aliases}
        twice = {alias: aliases[alias] for alias in source.names & aliases.keys() if aliases[alias] in wanted}
        contents: dict[str, str] = {}  # of tensors that the source has under two names
        for name, value in source.items() if wanted else ():
            if name in twice or name in twice.values():
                contents[name] = hash_tensor(value)
            if name not in wanted:
                continue
            target, old = tensors[name], tuple(value.shape)
            value, method = _adopted(module, name, value)
            if value.shape != target.shape:
                raise UserError(
                    f"{source.label}: {name} has shape {tuple(value.shape)}, the network {tuple(target.shape)}"
                )
            fill(name, value, source.changes.get(name, ()))
            if method is None:
                report.loaded.append(name)
            else:
                report.resized[name] = Resized(old, tuple(value.shape), method)
            report.sources[source.label] = report.sources.get(source.label, 0) + 1
            wanted.discard(name)
        if wanted:
            raise UserError(f"{source.label}: it announced {sorted(wanted)[0]} but did not deliver it")
        for alias, owner in twice.items():
            if contents.get(alias) != contents[owner]:
                raise UserError(f"{source.label}: {alias} and {owner} differ, but the network holds them as one tensor")
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        own: dict[str, Tensor] = {
            **{n: p for n, p in child.named_parameters(recurse=False) if prefix + n not in aliases},
            **{n: buffer for n, buffer in child.named_buffers(recurse=False) if prefix + n in moving},
        }
        new = [n for n in own if prefix + n not in provider and prefix + n not in copies]
        if not new:
            continue
        values = _draw(child, own, initialisers[path.split(".")[0]], seed_from(seed, path))
        for name in new:
            fill(prefix + name, values[name])
            report.new.append(prefix + name)
    report.copied.sort()
    return report, hashes


def _as_read(value: Tensor) -> Tensor:
    """What the content hash of a frozen tensor is taken of: the same in whatever type the network keeps it."""
    return value.float() if value.is_floating_point() else value


def _adopted(module: nn.Module, name: str, value: Tensor) -> tuple[Tensor, str | None]:
    """What the nearest module above a tensor makes of a value for it, and how; the value itself where none does.

    A module with a method `adopt(name, value)`, whose name is the tensor's as seen from it, may bring a value to its
    own shape: stretched to another resolution. It returns None for what it takes as it is.
    """
    path, inner = name, ""
    while path:
        path, _, leaf = path.rpartition(".")
        inner = f"{leaf}.{inner}" if inner else leaf
        adopt = getattr(module.get_submodule(path), "adopt", None)
        if adopt is not None and (found := adopt(inner, value)) is not None:
            return found
    return value, None


def _put(module: nn.Module, name: str, target: Tensor, value: Tensor, device: torch.device) -> None:
    """Gives a tensor its value, in the form in which its layer keeps it (`FourBitLinear.keep`)."""
    path, _, leaf = name.rpartition(".")
    layer = module.get_submodule(path)
    keep = getattr(getattr(layer, "base_layer", layer), "keep", None)
    if keep is None or not keep(leaf, value, device):
        assign(target, value)


def _draw(module: nn.Module, own: Mapping[str, Tensor], initialise: Initialiser, seed: int) -> dict[str, Tensor]:
    """New full tensors for `module`, drawn on the CPU whatever the module's device and sharding."""
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    for name, tensor in own.items():
        blank = torch.full(tensor.shape, torch.nan, dtype=torch.float32, device="cpu")
        if name in parameters:
            module._parameters[name] = nn.Parameter(blank, requires_grad=False)
        else:
            module._buffers[name] = blank
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone: a device goes on from where it stood
            initialise(module)
        # some architectures draw a layer's tensors from the layer above it, which is never asked to here
        forgotten = [name for name in own if getattr(module, name).isnan().any()]
        assert not forgotten, f"nothing draws {forgotten} of {type(module).__name__}"
        return {name: getattr(module, name).detach() for name in own}
    finally:
        module._parameters.update(parameters)
        module._buffers.update(buffers)
