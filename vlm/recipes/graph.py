"""Published recipes as graphs: `configs/<system>/recipe.yaml`.

::

    system: llava_1_5
    stages:
      1_align:
        configs: [model.yaml, 1_align.yaml]      # beside this file; the demo lays demo/<same name> over each
      2_finetune:
        configs: [model.yaml, 2_finetune.yaml]
        follows:                                 # <system>/<stage>; {our part: its part}, without parts everything
          - {artefact: llava_1_5/1_align, parts: {connector: connector}}
      3_longer:
        configs: [model.yaml, 3_longer.yaml]
        continues: 2_finetune                    # same schedule and optimizer, another phase
      web_captions:                              # a procedure: makes data instead of weights
        run: capfilt
        needs: [2_finetune]
        writes: filtered_web

`vlm.recipes.run` starts the stages. Neither module imports torch.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlm.errors import UserError

_STAGE_KEYS = {"configs", "follows", "continues"}
_PROCEDURE_KEYS = {"run", "needs", "writes"}
_NAME = re.compile(r"\w[\w-]*")


@dataclass(frozen=True)
class StageRef:
    """A finished stage that another one starts from.

    Attributes:
        system: whose recipe makes it.
        stage: its name there.
        parts: {our prefix: its prefix}; empty: every tensor it holds, under its own name.
    """

    system: str
    stage: str
    parts: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.system}/{self.stage}"


@dataclass(frozen=True)
class TrainingStage:
    """A node that trains.

    Attributes:
        name: key in the recipe and name of its run folder.
        configs: YAML files, later ones win.
        overlays: the demo's, one for each of `configs`; they need not exist for a run at paper size.
        follows: what it starts from.
        continues: earlier stage of this recipe whose schedule, step counter and optimizer go on here.
    """

    name: str
    configs: tuple[Path, ...]
    overlays: tuple[Path, ...]
    follows: tuple[StageRef, ...] = ()
    continues: str | None = None


@dataclass(frozen=True)
class Procedure:
    """A node that makes data out of finished stages.

    Attributes:
        name: key in the recipe.
        run: which procedure.
        needs: nodes of this recipe that come first.
        writes: name of the data it makes.
    """

    name: str
    run: str
    needs: tuple[str, ...]
    writes: str


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
    nodes: tuple[TrainingStage | Procedure, ...]

    def node(self, name: str) -> TrainingStage | Procedure:
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
            needs = node.needs if isinstance(node, Procedure) else (node.continues,)
            if name in needs:
                raise UserError(f"{self.path}: {node.name} cannot do without {name}; skip {node.name} as well")
        if not rest or isinstance(left_out, Procedure):
            raise UserError(f"{self.path}: {name} cannot be left out: {'it makes data' if rest else 'nothing is left'}")
        here = f"{self.system}/{name}"
        nodes = (node if isinstance(node, Procedure) else _not_following(node, here, left_out.follows) for node in rest)
        return Recipe(self.path, self.system, tuple(nodes))


def _not_following(node: TrainingStage, name: str, instead: tuple[StageRef, ...]) -> TrainingStage:
    if all(str(followed) != name for followed in node.follows):
        return node
    others = tuple(followed for followed in node.follows if str(followed) != name)
    return dataclasses.replace(node, follows=(*(item for item in instead if item not in others), *others))


def load_recipe(path: str | Path) -> Recipe:
    """Reads and checks a recipe.

    Raises:
        UserError: names the file and the key: unknown or missing keys, a file that is not there, a stage that is not
            in the recipe, a cycle.
    """
    reader = _Reader(Path(path))
    content = reader.read()
    reader.keys(content, "the recipe", required={"system", "stages"})
    system = reader.name(content["system"], "system")
    stages = content["stages"]
    if not isinstance(stages, dict) or not stages:
        raise reader.error("stages", "must be a mapping {name: stage} with at least one stage")
    names = [reader.name(name, "stages") for name in stages]
    nodes = {name: reader.node(name, stages[name], system=system, stages=stages) for name in names}
    return Recipe(Path(path), system, tuple(_in_order(nodes, reader, system)))


class _Reader:
    """Checks the parts of one recipe file; every error names the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, key: str, message: str) -> UserError:
        return UserError(f"{self.path}: {key}: {message}")

    def read(self) -> Any:
        try:
            return yaml.load(self.path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: cannot be read ({error})") from error
        except yaml.YAMLError as error:
            raise UserError(f"{self.path}: is no valid YAML ({' '.join(str(error).split())})") from error

    def keys(self, value: Any, key: str, *, required: set[str], optional: frozenset[str] = frozenset()) -> None:
        if not isinstance(value, dict):
            raise self.error(key, f"must be a mapping, found {value!r}")
        known = ", ".join(sorted(required | optional))
        if unknown := sorted(map(str, value.keys() - required - optional)):
            raise self.error(key, f"unknown key {unknown[0]!r}; it takes {known}")
        if missing := sorted(required - value.keys()):
            raise self.error(key, f"key {missing[0]!r} is missing; it takes {known}")

    def name(self, value: Any, key: str) -> str:
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise self.error(key, f"{value!r} is no name; use letters, digits, _ and -")
        return value

    def sequence(self, value: Any, key: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.error(key, f"must be a list, found {value!r}")
        return value

    def one_of(self, value: Any, key: str, names: list[str]) -> str:
        if value not in names:
            raise self.error(
                key, f"there is no other stage {value!r} here; the others are {', '.join(names) or 'none'}"
            )
        return value

    def node(self, name: str, value: Any, *, system: str, stages: dict[str, Any]) -> TrainingStage | Procedure:
        key = f"stages.{name}"
        others = [other for other in stages if other != name]
        trained = [other for other in others if not _is_procedure(stages[other])]
        if _is_procedure(value):
            self.keys(value, key, required=_PROCEDURE_KEYS)
            needs = self.sequence(value["needs"], f"{key}.needs")
            return Procedure(
                name,
                run=self.name(value["run"], f"{key}.run"),
                needs=tuple(self.one_of(n, f"{key}.needs[{i}]", others) for i, n in enumerate(needs)),
                writes=self.name(value["writes"], f"{key}.writes"),
            )
        self.keys(value, key, required={"configs"}, optional=frozenset(_STAGE_KEYS - {"configs"}))
        configs = tuple(
            self.config(file, f"{key}.configs[{i}]")
            for i, file in enumerate(self.sequence(value["configs"], f"{key}.configs"))
        )
        if not configs:
            raise self.error(f"{key}.configs", "is empty; name at least one file")
        continues = value.get("continues")
        return TrainingStage(
            name,
            configs=configs,
            overlays=tuple(file.parent / "demo" / file.name for file in configs),
            follows=tuple(
                self.followed(item, f"{key}.follows[{i}]", system=system, trained=trained)
                for i, item in enumerate(self.sequence(value.get("follows", []), f"{key}.follows"))
            ),
            continues=None if continues is None else self.one_of(continues, f"{key}.continues", trained),
        )

    def config(self, value: Any, key: str) -> Path:
        if not isinstance(value, str) or not (self.path.parent / value).is_file():
            raise self.error(key, f"there is no file {value!r} in {self.path.parent}")
        return self.path.parent / value

    def followed(self, value: Any, key: str, *, system: str, trained: list[str]) -> StageRef:
        self.keys(value, key, required={"artefact"}, optional=frozenset({"parts"}))
        artefact, parts = value["artefact"], value.get("parts", {})
        owner, _, stage = artefact.partition("/") if isinstance(artefact, str) else ("", "", "")
        if not _NAME.fullmatch(owner) or not _NAME.fullmatch(stage):
            raise self.error(f"{key}.artefact", f"must be <system>/<stage>, found {artefact!r}")
        if owner == system:
            self.one_of(stage, f"{key}.artefact", trained)
        if not isinstance(parts, dict) or not all(isinstance(part, str) for item in parts.items() for part in item):
            raise self.error(f"{key}.parts", f"must be a mapping {{our part: its part}}, found {parts!r}")
        return StageRef(owner, stage, parts)


def _is_procedure(value: Any) -> bool:
    return isinstance(value, dict) and "run" in value


def _in_order(
    nodes: dict[str, TrainingStage | Procedure], reader: _Reader, system: str
) -> Iterator[TrainingStage | Procedure]:
    """The nodes, each after those it depends on: always the first of the file whose turn it can be."""
    waiting = {name: _dependencies(node, system) for name, node in nodes.items()}
    while waiting:
        ready = next((name for name, needs in waiting.items() if not needs & waiting.keys()), None)
        if ready is None:
            raise reader.error("stages", f"{' and '.join(waiting)} wait for one another; break the cycle")
        del waiting[ready]
        yield nodes[ready]


def _dependencies(node: TrainingStage | Procedure, system: str) -> set[str]:
    if isinstance(node, Procedure):
        return set(node.needs)
    followed = {followed.stage for followed in node.follows if followed.system == system}
    return followed | ({node.continues} if node.continues else set())


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys; a stage written twice would vanish without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)
