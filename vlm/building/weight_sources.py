"""Where a network's tensors come from: base weights, artefacts, published folders."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm.checkpoints.artefact import Artefact, read_artefact
from vlm.checkpoints.files.locate import preview
from vlm.checkpoints.files.weights import WeightFiles, WeightSource, fingerprint_of
from vlm.checkpoints.published.open import is_artefact, published_source
from vlm.checkpoints.published.qwen_vl import qwen_table
from vlm.checkpoints.tables.clip import clip_table
from vlm.checkpoints.tables.mini_gemini import convnext_names
from vlm.checkpoints.tables.mixtral import mixtral_table
from vlm.errors import UserError
from vlm.stages import matches


def weight_sources(module: Any) -> list[WeightSource]:
    """All sources of a module's tensors, in the order in which later ones win: base weights, then artefacts."""
    if module.weights is not None and not is_artefact(module.weights):
        return [published_source(module.weights)]
    sources = [
        base_source(part, description, getattr(module, part))
        for part, description in module.arguments.items()
        if getattr(description, "weights", None)
    ]
    if module.weights is not None:
        return sources + artefact_chain(read_artefact(module.weights), renaming({}))
    if module.stage is None:
        return sources
    resuming = is_resuming(module)
    trained = module.trained_names() if resuming else set()
    for follow in module.stage.sources:
        ours = {name for name in module.state_dict() if any(matches(part, name) for part in follow.parts)}
        if resuming and follow.parts and ours <= trained:
            continue  # the checkpoint holds all of it, newer
        chain = artefact_chain(read_artefact(follow.artefact), renaming(follow.parts))
        for mine, theirs in follow.parts.items():
            if not any(matches(mine, name) for source in chain for name in source.names):
                raise UserError(f"stage.follows: {follow.artefact} holds nothing of {theirs!r}; correct parts.{mine}")
        sources += chain
    return sources


def is_resuming(module: Any) -> bool:
    """Whether a checkpoint will bring everything that is trained."""
    trainer = module._trainer
    return trainer is not None and trainer.state.fn == "fit" and trainer.ckpt_path is not None


def base_source(part: str, description: Any, network: Any) -> WeightSource:
    """The published weights of one part, under our names."""
    files = WeightFiles(description.weights)
    names = _tower_names(files, network.facts) if hasattr(network, "facts") else _same_names(files, network)
    if getattr(getattr(network, "trunk", None), "cls_token", True) is None:
        names = _without_class_token(names)
    return WeightSource(
        f"base weights of {part} ({description.weights})",
        frozenset(f"{part}.{name}" for name in names.names),
        lambda: ((f"{part}.{name}", tensor) for name, tensor in names.items() if name in names.names),
    )


class _Names(NamedTuple):
    names: frozenset[str]
    items: Callable[[], Iterator[tuple[str, Tensor]]]


def _same_names(files: WeightFiles, network: Any) -> _Names:
    # rotary tables that old versions of transformers saved are recomputed, not read
    known = network.state_dict()
    table = None
    if "model.layers.0.block_sparse_moe.gate.weight" in files:
        table = mixtral_table(num_experts=network.config.num_local_experts)
    elif "transformer.h.0.attn.c_attn.weight" in files:
        table = qwen_table()
    if table is not None:
        made = frozenset(table.check(files.shapes(), side="theirs"))
        return _Names(made, lambda: table.stream_to_ours(files.items()))
    names = {name for name in files.keys() if name in known or not name.endswith("rotary_emb.inv_freq")}  # noqa: SIM118
    # Qwen2's class over a Llama (`CausalLM.config`): the same with biases of zero
    llama = getattr(network, "config", None) is not None and network.config.model_type == "qwen2"
    biases = [name for name in known if llama and name.endswith("_proj.bias") and name not in names]
    zeros = {name: torch.zeros(known[name].shape) for name in biases}
    return _Names(frozenset({*names, *zeros}), lambda: itertools.chain(files.items(), zeros.items()))


def _tower_names(files: WeightFiles, facts: Any) -> _Names:
    """A vision tower in Hugging Face CLIP's layout or in timm's; what lies above its last built block is left out."""
    keys = list(files.keys())
    prefix = next((p for p in ("vision_model.", "") if f"{p}embeddings.class_embedding" in keys), None)
    if prefix is not None:
        table = clip_table(theirs=prefix, num_blocks=facts.num_blocks)
        ours = {name for name in table.check(files.shapes(), side="theirs") if not table.is_carried(name)}

        def converted() -> Iterator[tuple[str, Tensor]]:
            stream = table.stream_to_ours(files.items())
            return ((name.removeprefix("vision."), tensor) for name, tensor in stream)

        return _Names(frozenset(name.removeprefix("vision.") for name in ours), converted)
    if stages := convnext_names(keys):
        return _Names(
            frozenset(f"trunk.{name}" for name in stages.values()),
            lambda: ((f"trunk.{stages[key]}", tensor) for key, tensor in files.items() if key in stages),
        )
    above = re.compile(
        rf"blocks\.({'|'.join(map(str, range(facts.num_blocks, facts.depth)))})\.|norm\.|fc_norm\.|head\."
    )
    names = {f"trunk.{key}" for key in keys if not above.match(key)}
    return _Names(frozenset(names), lambda: ((f"trunk.{key}", tensor) for key, tensor in files.items()))


def _without_class_token(names: _Names) -> _Names:
    """A tower's weights for one that has no class token: neither it nor its position, the first one."""

    def items() -> Iterator[tuple[str, Tensor]]:
        has_token = "trunk.cls_token" in names.names
        for name, tensor in names.items():
            if name == "trunk.pos_embed" and has_token:
                yield name, tensor[:, 1:]
            elif name != "trunk.cls_token":
                yield name, tensor

    return _Names(names.names - {"trunk.cls_token"}, items)


Rename = Callable[[str], str | None]
"""Name in an artefact -> our name, None for a tensor that is not wanted."""


def renaming(parts: Mapping[str, str], then: Rename | None = None) -> Rename:
    """{our prefix: its prefix} as a function; without entries every tensor keeps its name."""

    def rename(name: str) -> str | None:
        renamed: str | None = name
        if parts:
            found = ((mine, theirs) for mine, theirs in parts.items() if matches(theirs, name))
            renamed = next((mine + name[len(theirs) :] for mine, theirs in found), None)
        return then(renamed) if then is not None and renamed is not None else renamed

    return rename


def artefact_chain(artefact: Artefact, rename: Rename) -> list[WeightSource]:
    """An artefact after those it follows: each holds only what its own stage trained."""
    chain: list[WeightSource] = []
    for reference in artefact.meta.get("follows", []):
        earlier = read_artefact(artefact.folder / reference["path"])
        if earlier.fingerprint != reference["fingerprint"]:
            raise UserError(
                f"{artefact.folder}: it follows {earlier.folder}, whose content has changed since; "
                "restore it or train this stage again"
            )
        chain += artefact_chain(earlier, renaming(reference["parts"], then=rename))
    names = {name: renamed for name in artefact.meta["tensors"] if (renamed := rename(name)) is not None}
    source = WeightSource(
        f"artefact {artefact.meta.get('stage', artefact.folder.name)} ({artefact.folder})",
        frozenset(names.values()),
        lambda: ((names[name], tensor) for name, tensor in artefact.items() if name in names),
    )
    return [*chain, source]


def frozen_parts(module: Any) -> dict[str, dict[str, str]]:
    """{part: where its frozen tensors came from and what they were}, as an artefact refers to them."""
    parts: dict[str, dict[str, str]] = {}
    for part in sorted({name.split(".")[0] for name in module.frozen_hashes}):
        hashes = {name: value for name, value in module.frozen_hashes.items() if name.startswith(f"{part}.")}
        source = getattr(module.arguments.get(part), "weights", None) or f"drawn from seed {module.seed}"
        parts[part] = {"source": source, "fingerprint": fingerprint_of(hashes)}
    return parts


def check_finished(module: Any) -> None:
    """Refuses a finished system with tensors that it was not trained with: other frozen ones, or new random ones.

    Args:
        module: built, with nothing to train: only frozen tensors are hashed.

    Raises:
        UserError: the base weights have changed since, or the folder does not hold everything.
    """
    verified = check_frozen(module, read_artefact(module.weights)) if is_artefact(module.weights) else frozenset()
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
