"""Where a network's tensors come from: base weights, artefacts, published folders."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlm.building.followed import open_followed, open_reference
from vlm.building.merging import merged, merges_of, with_changes
from vlm.checkpoints.artefact import FOLLOWED, Artefact, read_artefact
from vlm.checkpoints.files.identity import fingerprint_of
from vlm.checkpoints.files.locate import preview
from vlm.checkpoints.files.source import WeightSource
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.published.base_entries import check_base
from vlm.checkpoints.published.open import is_artefact, published_source
from vlm.checkpoints.resume.moments import WEIGHT
from vlm.checkpoints.resume.opened import read_trained
from vlm.checkpoints.tables.base import read_same_names
from vlm.errors import UserError
from vlm.moving import changing_names
from vlm.stages import InitFrom, matches

DRAWN = "drawn from seed"
"""How an artefact names the source of frozen tensors that were new."""


def weight_sources(module: Any) -> list[WeightSource]:
    """All sources of a module's tensors, in the order in which later ones win: base weights, then artefacts."""
    later = _later_sources(module)
    brought = frozenset[str]().union(*(source.names for source in later))
    bases = [
        base_source(part, description, getattr(module, part))
        for part, description in module.arguments.items()
        if getattr(description, "weights", None) and not _is_within(module, part, brought)
    ]
    return with_changes(bases + later)


def _is_within(module: Any, part: str, names: Collection[str]) -> bool:
    """Whether names have every tensor of a part, whose base weights then need not be there."""
    return all(f"{part}.{name}" in names for name in getattr(module, part).state_dict())


def _later_sources(module: Any) -> list[WeightSource]:
    """What comes after the base weights."""
    if module.weights is not None:
        return _chain(open_followed(module.weights), Selection())
    if module.stage is None:
        return []
    sources: list[WeightSource] = []
    resuming = is_resuming(module)
    changing = changing_names(module) if resuming else set()
    for follow in module.stage.sources:
        ours = {name for name in module.state_dict() if any(matches(part, name) for part in follow.parts)}
        if resuming and follow.parts and ours <= changing:
            continue  # the checkpoint holds all of it, newer
        sources += followed_sources(follow, covers=not resuming)
    if module.stage.continues is not None and not resuming:
        sources += _weights_behind_averages(read_artefact(module.stage.continues), module.trained_names())
    return sources


def _weights_behind_averages(artefact: Artefact, trained: Collection[str]) -> list[WeightSource]:
    """What training goes on with where an artefact holds moving averages; what it now leaves frozen stays averaged."""
    if not artefact.meta.get("averaged"):
        return []
    files = artefact.moments
    entries = {name: f"{name}/{WEIGHT}" for name in artefact.meta["trained"] if name in trained}
    label = f"weights that {artefact.meta['stage']} averaged ({artefact.folder})"
    return [WeightSource(label, frozenset(entries), lambda: ((n, files.get(entry)) for n, entry in entries.items()))]


def is_resuming(module: Any) -> bool:
    """Whether a checkpoint will bring everything that is trained."""
    trainer = module._trainer
    return trainer is not None and trainer.state.fn == "fit" and trainer.ckpt_path is not None


def base_source(part: str, description: Any, network: Any) -> WeightSource:
    """The published weights of one part, under our names, as its description reads them."""
    files = WeightFiles(description.weights)
    check_base(part, files.folder, network)
    read_base = getattr(description, "read_base", read_same_names)
    base = read_base(network, files)
    return WeightSource(
        f"base weights of {part} ({description.weights})",
        frozenset(f"{part}.{name}" for name in base.names),
        lambda: ((f"{part}.{name}", tensor) for name, tensor in base.items() if name in base.names),
        dropped=tuple(f"{part}.{name}" for name in base.dropped),
        covers=(part,),
        fresh=tuple(f"{part}.{pattern}" for pattern in base.fresh),
    )


@dataclass(frozen=True)
class Selection:
    """What is taken of an artefact, and under which names.

    Attributes:
        parts: {our prefix: its prefix}; empty: everything, under its own name.
        leave_out: patterns, in its names, of what is dropped on purpose.
        then: what is taken of that by an artefact, or a stage, that follows.
    """

    parts: Mapping[str, str] = field(default_factory=dict)
    leave_out: Sequence[str] = ()
    then: "Selection | None" = None

    def rename(self, name: str) -> str | None:
        """Our name of one of its tensors; None: it is not wanted, or left out."""
        renamed = None if self._is_left_out(name) else self._in_parts(name)
        return renamed if renamed is None or self.then is None else self.then.rename(renamed)

    def drops(self, name: str) -> bool:
        """Whether a tensor is left out on purpose that would be taken otherwise."""
        renamed = self._in_parts(name)
        if renamed is None or self._is_left_out(name):
            return renamed is not None
        return self.then is not None and self.then.drops(renamed)

    def _in_parts(self, name: str) -> str | None:
        if not self.parts:
            return name
        found = ((mine, theirs) for mine, theirs in self.parts.items() if matches(theirs, name))
        return next((mine + name[len(theirs) :] for mine, theirs in found), None)

    def _is_left_out(self, name: str) -> bool:
        return any(matches(pattern, name) for pattern in self.leave_out)


def followed_sources(follow: InitFrom, *, covers: bool) -> list[WeightSource]:
    """What a stage takes of an artefact and of those this one follows.

    Args:
        covers: the parts that are taken have to come whole, but for what `follow.fresh` lists.

    Raises:
        UserError: a part or a pattern fits nothing of the artefact.
    """
    followed = open_followed(follow.artefact)
    chain = _chain(followed, Selection(follow.parts, follow.leave_out))
    for mine, theirs in follow.parts.items():
        if not any(matches(mine, name) for source in chain for name in source.names):
            raise UserError(f"stage.follows: {follow.artefact} holds nothing of {theirs!r}; correct parts.{mine}")
    for pattern in follow.leave_out:
        if not any(matches(pattern, name) for source in chain for name in source.dropped):
            raise UserError(
                f"stage.follows: {follow.artefact} holds nothing that leave_out {pattern!r} fits; correct or remove it"
            )
    if follow.merge:
        chain = _merged(chain, followed, Selection(follow.parts, follow.leave_out))
    if not covers:
        return chain
    whole = _whole_parts(followed)
    prefixes = follow.parts or {part: part for part in {name.split(".")[0] for s in chain for name in s.names}}
    covered = tuple(mine for mine, theirs in prefixes.items() if theirs.split(".")[0] in whole)
    return [*chain[:-1], replace(chain[-1], covers=covered, fresh=tuple(follow.fresh))]


def _whole_parts(followed: Artefact | str) -> set[str]:
    """The parts of which an artefact and those it follows hold everything, or say where the rest comes from; of a
    published folder all."""
    if isinstance(followed, str):
        return {name.split(".")[0] for name in published_source(followed).names}
    meta = followed.meta
    drawn = {part for part, entry in meta["frozen"].items() if str(entry["source"]).startswith(DRAWN)}
    whole = {name.split(".")[0] for name in meta["tensors"]} - drawn
    for reference in meta["follows"]:
        earlier = _whole_parts(open_reference(followed, reference))
        earlier -= {pattern.split(".")[0] for pattern in reference.get("leave_out", ())}
        parts = reference["parts"] or {part: part for part in earlier}
        whole |= {mine for mine, theirs in parts.items() if theirs in earlier and "." not in mine}
    return whole


def artefact_chain(artefact: Artefact, selection: Selection) -> list[WeightSource]:
    """An artefact after those it follows: each holds only what its own stage trained."""
    chain: list[WeightSource] = []
    for reference in artefact.meta.get("follows", []):
        taken = Selection(reference["parts"], reference.get("leave_out", ()), selection)
        earlier = open_reference(artefact, reference)
        found = _chain(earlier, taken)
        chain += _merged(found, earlier, taken) if reference.get("merge") else found
    label = f"artefact {artefact.meta.get('stage', artefact.folder.name)} ({artefact.folder})"
    return [*chain, _selected(WeightSource(label, frozenset(artefact.meta["tensors"]), artefact.items), selection)]


def _chain(followed: Artefact | str, selection: Selection) -> list[WeightSource]:
    if isinstance(followed, Artefact):
        return artefact_chain(followed, selection)
    return [_selected(published_source(followed), selection)]


def _selected(source: WeightSource, selection: Selection) -> WeightSource:
    """What is taken of a source, under our names."""
    names = {name: renamed for name in source.names if (renamed := selection.rename(name)) is not None}
    return replace(
        source,
        names=frozenset(names.values()),
        items=lambda: ((names[name], tensor) for name, tensor in source.items() if name in names),
        dropped=tuple(sorted(name for name in source.names if selection.drops(name))),
    )


def _merged(chain: Sequence[WeightSource], followed: Artefact | str, selection: Selection) -> list[WeightSource]:
    if isinstance(followed, str):
        raise UserError(f"{followed}: is a published folder without an adapter, so there is nothing to merge")
    return merged(chain, followed, merges_of(followed, artefact_chain(followed, Selection())), selection.rename)


def check_new(module: Any, sources: Sequence[WeightSource], *, added: Collection[str]) -> None:
    """Refuses tensors that started fresh although a source should have brought them.

    Args:
        module: with its load report.
        added: names of what surgery added, which always may.

    Raises:
        UserError: a part of a source is not whole, or a pattern of `stage.follows` fits nothing that is new.
    """
    new = module.load_report.new
    for source in sources:
        covered = [name for name in new if any(matches(pattern, name) for pattern in source.covers)]
        listed = {name for name in covered if any(matches(pattern, name) for pattern in source.fresh)}
        if missing := [name for name in covered if name not in listed and name not in added]:
            raise UserError(
                f"{source.label}: {preview(missing)}: in the network but not in the checkpoint; what should start new "
                "has to be listed, under `fresh` of an artefact in stage.follows"
            )
    follows = module.stage.follows if module.stage is not None else ()
    for pattern in (pattern for follow in follows for pattern in follow.fresh):
        if not any(matches(pattern, name) for name in new):
            raise UserError(f"stage.follows: fresh {pattern!r} fits nothing that starts new; correct or remove it")


def frozen_parts(module: Any) -> dict[str, dict[str, str]]:
    """{part: where its frozen tensors came from and what they were}, as an artefact refers to them."""
    parts: dict[str, dict[str, str]] = {}
    new = set(module.load_report.new)
    for part in sorted({name.split(".")[0] for name in module.frozen_hashes}):
        hashes = {name: value for name, value in module.frozen_hashes.items() if name.startswith(f"{part}.")}
        source = getattr(module.arguments.get(part), "weights", None)
        if source is None:
            source = FOLLOWED if new.isdisjoint(hashes) else f"{DRAWN} {module.seed}"
        parts[part] = {"source": source, "fingerprint": fingerprint_of(hashes)}
    return parts


def check_finished(module: Any) -> None:
    """Refuses a finished system with tensors that it was not trained with: other frozen ones, or new random ones.

    Args:
        module: built, with nothing to train: only frozen tensors are hashed.

    Raises:
        UserError: the base weights have changed since, or the folder does not hold everything.
    """
    verified = check_frozen(module, read_trained(module.weights)) if is_artefact(module.weights) else frozenset()
    if lost := [name for name in module.load_report.new if name.split(".")[0] not in verified]:
        raise UserError(
            f"{module.weights}: holds nothing for {preview(lost)}, which would be random; fetch or make it again, or "
            "name the part's base weights"
        )


def check_frozen(module: Any, artefact: Artefact) -> frozenset[str]:
    """The parts whose frozen tensors are those that an artefact was trained with.

    Raises:
        UserError: they have changed since.
    """
    trained = set(artefact.meta["trained"])
    known = {part: stored for part, stored in artefact.meta["frozen"].items() if stored["fingerprint"] is not None}
    for part, stored in known.items():
        hashes = {n: h for n, h in module.frozen_hashes.items() if n.startswith(f"{part}.") and n not in trained}
        if fingerprint_of(hashes) != stored["fingerprint"]:
            raise UserError(
                f"{artefact.folder}: {part} was frozen at {stored['source']}, and what is there now differs; "
                "put the weights it was trained with back"
            )
    return frozenset(known)
