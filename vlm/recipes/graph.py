"""Published recipes as graphs, `configs/<system>/recipe.yaml`.

::

    system: llava_1_5
    stages:
      1_align:
        configs: [model.yaml, 1_align.yaml]      # beside this file; the demo lays demo/<same name> over each
      web_captions:                              # a procedure: makes data instead of weights
        run: filter-captions                     # of `vlm run`
        needs: [1_align]                         # stages and procedures that come first
        writes: captions.json                    # file or folder, in the node's run folder
        arguments: [data/web.json, "${writes}", --weights, "${1_align}"]
        demo: [runs/demo_data/web.json, "${writes}", --weights, "${1_align}"]
      2_finetune:
        configs: [model.yaml, 2_finetune.yaml]   # in which `${web_captions}` is what the procedure wrote
        needs: [web_captions]
        follows:                                 # <system>/<stage>; {our part: its part}, without parts everything
          - {artefact: llava_1_5/1_align, parts: {connector: connector}}   # also leave_out, fresh: patterns
      3_longer:
        configs: [model.yaml, 3_longer.yaml]
        continues: 2_finetune                    # same schedule and optimizer, another phase

A variant says what differs: files that are laid over a stage's own, other keys of it, or that it is left out::

    base: ../recipe.yaml
    stages:
      1_align: {add: [changes/no_text.yaml]}
      3_longer: null

`vlm.recipes.reading` reads them, `vlm.recipes.run` starts the nodes. None of these modules imports torch.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlm.errors import UserError


@dataclass(frozen=True)
class StageRef:
    """A finished stage that another one starts from.

    Attributes:
        system: whose recipe makes it.
        stage: its name there.
        parts: {our prefix: its prefix}; empty: every tensor it holds, under its own name.
        leave_out: patterns, in its names, of what is dropped on purpose.
        fresh: patterns, in our names, of what may start new in these parts.
    """

    system: str
    stage: str
    parts: Mapping[str, str] = field(default_factory=dict)
    leave_out: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.system}/{self.stage}"


@dataclass(frozen=True)
class TrainingStage:
    """A node that trains.

    Attributes:
        name: key in the recipe and name of its run folder.
        configs: YAML files, later ones win.
        overlays: the demo's, one for each of `configs`; they need not exist for a run at paper size.
        needs: procedures of this recipe whose data it reads.
        follows: what it starts from.
        continues: earlier stage of this recipe whose schedule, step counter and optimizer go on here.
    """

    name: str
    configs: tuple[Path, ...]
    overlays: tuple[Path, ...]
    needs: tuple[str, ...] = ()
    follows: tuple[StageRef, ...] = ()
    continues: str | None = None


@dataclass(frozen=True)
class Procedure:
    """A node that makes data out of finished nodes.

    Attributes:
        name: key in the recipe and name of its run folder.
        run: which procedure of `vlm run`.
        needs: nodes of this recipe that come first.
        writes: name of the file or folder it makes, in its run folder.
        arguments: words of its command line, with `${writes}` and `${NODE}` for what it writes and needs.
        demo: those of the demo; None where there is none.
    """

    name: str
    run: str
    needs: tuple[str, ...]
    writes: str
    arguments: tuple[str, ...]
    demo: tuple[str, ...] | None = None


Node = TrainingStage | Procedure


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        path: its file.
        system: name of the system, and of its folder under `configs`.
        nodes: in an order in which every node comes after those it depends on; the file's own order where that is one.
    """

    path: Path
    system: str
    nodes: tuple[Node, ...]

    def node(self, name: str) -> Node:
        """Raises `UserError` for a name that is not in the recipe."""
        for node in self.nodes:
            if node.name == name:
                return node
        names = ", ".join(node.name for node in self.nodes)
        raise UserError(f"{self.path}: there is no stage {name!r}; its stages are {names}")

    def without(self, name: str) -> "Recipe":
        """The recipe with a stage left out: what followed it starts where that stage would have started.

        Raises:
            UserError: there is no such stage, it is the only one, or another one cannot do without it.
        """
        left_out = self.node(name)
        rest = tuple(node for node in self.nodes if node is not left_out)
        for node in rest:
            if name in _cannot_do_without(node):
                raise UserError(f"{self.path}: {node.name} cannot do without {name}; skip {node.name} as well")
        if not rest or isinstance(left_out, Procedure):
            raise UserError(f"{self.path}: {name} cannot be left out: {'it makes data' if rest else 'nothing is left'}")
        here = f"{self.system}/{name}"
        nodes = (node if isinstance(node, Procedure) else _not_following(node, here, left_out.follows) for node in rest)
        return Recipe(self.path, self.system, tuple(nodes))


def _cannot_do_without(node: Node) -> set[str]:
    continued = {node.continues} if isinstance(node, TrainingStage) and node.continues else set()
    return {*node.needs, *continued}


def _not_following(node: TrainingStage, name: str, instead: tuple[StageRef, ...]) -> TrainingStage:
    if all(str(followed) != name for followed in node.follows):
        return node
    others = tuple(followed for followed in node.follows if str(followed) != name)
    return dataclasses.replace(node, follows=(*(item for item in instead if item not in others), *others))


def in_order(nodes: Mapping[str, Node], system: str) -> Iterator[Node]:
    """The nodes, each after those it depends on: always the first of the file whose turn it can be.

    Raises:
        UserError: some wait for one another.
    """
    waiting = {name: _dependencies(node, system) for name, node in nodes.items()}
    while waiting:
        ready = next((name for name, needs in waiting.items() if not needs & waiting.keys()), None)
        if ready is None:
            raise UserError(f"{' and '.join(waiting)} wait for one another; break the cycle")
        del waiting[ready]
        yield nodes[ready]


def _dependencies(node: Node, system: str) -> set[str]:
    follows = node.follows if isinstance(node, TrainingStage) else ()
    return _cannot_do_without(node) | {followed.stage for followed in follows if followed.system == system}
