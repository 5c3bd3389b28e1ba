"""Adapters that become part of the weights they lie over while these are read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from vlm.building.instantiate import instantiate
from vlm.checkpoints.artefact import Artefact
from vlm.checkpoints.files.identity import CHANGED, fingerprint_of, hash_tensor
from vlm.checkpoints.files.source import Change, WeightSource
from vlm.errors import UserError
from vlm.language import PartialLoRA, PeftAdapter
from vlm.language.adapters import ADAPTER, merged_weight
from vlm.stages import is_adapter


@dataclass(frozen=True)
class Merge:
    """A change that adds an adapter to a weight.

    Attributes:
        a: float[rank, in].
        b: float[out, rank].
        scale: alpha / rank.
        magnitude: float[out] of DoRA.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        return merged_weight(tensor, self.a, self.b, self.scale, self.magnitude)

    def content(self, of: str) -> str:
        parts = {"weight": of, "a": hash_tensor(self.a), "b": hash_tensor(self.b), "scale": repr(self.scale)}
        if self.magnitude is not None:
            parts["magnitude"] = hash_tensor(self.magnitude)
        return CHANGED + fingerprint_of(parts)


def merges_of(artefact: Artefact, chain: Sequence[WeightSource]) -> dict[str, Merge]:
    """{weight: what an artefact's adapter adds to it}.

    Args:
        artefact: whose surgery says the scales.
        chain: it after those it follows, under its own names.

    Raises:
        UserError: it was trained without an adapter.
    """
    operations = instantiate(artefact.meta["surgery"])
    adapters = [operation for operation in operations if isinstance(operation, PeftAdapter)]
    if not adapters:
        partial = [operation for operation in operations if isinstance(operation, PartialLoRA)]
        why = f" ({partial[0].cannot_merge})" if partial else ""
        raise UserError(f"{artefact.folder}: was trained without an adapter, so there is nothing to merge{why}")
    tensors: dict[str, Tensor] = {}
    for source in chain:
        if any(is_adapter(name) for name in source.names):
            tensors |= {name: tensor for name, tensor in source.items() if is_adapter(name)}
    merges = {}
    for name in tensors:
        layer, found, _ = name.partition(".lora_A.")
        if found:
            adapter = next(adapter for adapter in adapters if adapter.adapts(layer))
            merges[f"{layer}.weight"] = Merge(
                tensors[name],
                tensors[f"{layer}.lora_B.{ADAPTER}.weight"],
                adapter.alpha / adapter.rank,
                tensors.get(f"{layer}.lora_magnitude_vector.{ADAPTER}.weight"),
            )
    return merges


def merged(
    chain: Sequence[WeightSource], artefact: Artefact, merges: Mapping[str, Merge], rename: Callable[[str], str | None]
) -> list[WeightSource]:
    """A chain of sources without its adapter, and what that adds to weights of sources before it.

    Args:
        chain: an artefact after those it follows, under our names.
        artefact: the last one.
        merges: what its adapter adds, by its names.
        rename: its names to ours; None for what is not wanted.
    """
    plain = [replace(s, names=frozenset(name for name in s.names if not is_adapter(name))) for s in chain]
    changes = {ours: (merge,) for name, merge in merges.items() if (ours := rename(name)) is not None}
    label = f"adapter of {artefact.meta['stage']} ({artefact.folder})"
    return [*plain, WeightSource(label, frozenset(), lambda: iter(()), changes=changes)]


def with_changes(sources: Sequence[WeightSource]) -> list[WeightSource]:
    """Sources that change their tensors themselves, in the place of those that follow and change them.

    Raises:
        UserError: what is to be changed comes from no source.
    """
    found: list[WeightSource] = []
    for number, source in enumerate(sources):
        by_owner: dict[int, dict[str, tuple[Change, ...]]] = {}
        for name, changes in source.changes.items():
            if any(name in later.names for later in sources[number + 1 :]):
                continue  # trained as a whole since
            owner = next((at for at in reversed(range(len(found))) if name in found[at].names), None)
            if owner is None:
                raise UserError(
                    f"{source.label}: {name} comes from no weights, so there is nothing to merge the adapter into; "
                    "name the part's base weights"
                )
            by_owner.setdefault(owner, {})[name] = (*found[owner].changes.get(name, ()), *changes)
        for owner, changed in by_owner.items():
            found[owner] = replace(found[owner], changes={**found[owner].changes, **changed})
        found.append(replace(source, changes={}))
    return found
