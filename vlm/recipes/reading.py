"""Reads and checks `recipe.yaml`; what it may hold is drawn in `vlm.recipes.graph`."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from vlm.errors import UserError
from vlm.procedures import PROCEDURES
from vlm.recipes.graph import Node, Procedure, Recipe, StageRef, TrainingStage, in_order
from vlm.recipes.inputs import places
from vlm.recipes.unique_keys import UniqueKeys

_STAGE_KEYS = frozenset({"configs", "needs", "follows", "continues"})
_PROCEDURE_KEYS = frozenset({"run", "needs", "writes", "arguments", "demo"})
_NAME = re.compile(r"\w[\w-]*")
_FILE_NAME = re.compile(r"\w[\w.-]*")
_WRITES = "writes"


def load_recipe(path: str | Path) -> Recipe:
    """Reads and checks a recipe.

    Raises:
        UserError: names the file and the key: unknown or missing keys, a file that is not there, a stage that is not
            in the recipe, a procedure that does not exist, a cycle.
    """
    reader = _Reader(Path(path))
    content = reader.content()
    system = reader.name(content["system"], "system")
    stages = content["stages"]
    if not isinstance(stages, dict) or not stages:
        raise reader.error("stages", "must be a mapping {name: stage} with at least one stage")
    names = [reader.name(name, "stages") for name in stages]
    nodes = {name: reader.node(name, stages[name], system=system, stages=stages) for name in names}
    try:
        return Recipe(Path(path), system, tuple(in_order(nodes, system)))
    except UserError as error:
        raise reader.error("stages", str(error)) from error


class _Reader:
    """Checks the parts of one recipe file; every error names the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, key: str, message: str) -> UserError:
        return UserError(f"{self.path}: {key}: {message}")

    def read(self) -> Any:
        try:
            return yaml.load(self.path.read_text(encoding="utf-8"), Loader=UniqueKeys)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: cannot be read ({error})") from error
        except yaml.YAMLError as error:
            raise UserError(f"{self.path}: is no valid YAML ({' '.join(str(error).split())})") from error

    def content(self) -> dict[str, Any]:
        """The recipe as a whole: of one with a `base`, that one with what is changed."""
        content = self.read()
        if not (isinstance(content, dict) and "base" in content):
            self.keys(content, "the recipe", required={"system", "stages"})
            return content
        self.keys(content, "the recipe", required={"base", "stages"})
        if not isinstance(content["base"], str) or not (self.path.parent / content["base"]).is_file():
            raise self.error("base", f"there is no file {content['base']!r} in {self.path.parent}")
        reader = _Reader(self.path.parent / content["base"])
        base = reader.content()
        stages = {name: self.moved(stage, reader.path.parent) for name, stage in base["stages"].items()}
        if not isinstance(content["stages"], dict):
            raise self.error("stages", "must be a mapping {name of a stage of the base: what is changed, or null}")
        for name, change in content["stages"].items():
            key = f"stages.{self.one_of(name, 'stages', list(stages))}"
            if change is None:  # left out
                del stages[name]
                continue
            self.keys(change, key, required=set(), optional=_STAGE_KEYS | {"add"})
            added = self.sequence(change.pop("add", []), f"{key}.add")
            stages[name] = {**stages[name], **change}
            stages[name]["configs"] = [*stages[name].get("configs", []), *added]
        return {"system": base["system"], "stages": stages}

    def moved(self, stage: Any, folder: Path) -> Any:
        """A stage of a recipe in another folder, its files named from here."""
        if not isinstance(stage, dict) or not isinstance(stage.get("configs"), list):
            return stage
        files = [os.path.relpath(folder / str(file), self.path.parent) for file in stage["configs"]]
        return {**stage, "configs": files}

    def keys(self, value: Any, key: str, *, required: set[str], optional: frozenset[str] = frozenset()) -> None:
        if not isinstance(value, dict):
            raise self.error(key, f"must be a mapping, found {value!r}")
        known = ", ".join(sorted(required | optional))
        if unknown := sorted(map(str, value.keys() - required - optional)):
            raise self.error(key, f"unknown key {unknown[0]!r}; it takes {known}")
        if missing := sorted(required - value.keys()):
            raise self.error(key, f"key {missing[0]!r} is missing; it takes {known}")

    def name(self, value: Any, key: str, pattern: re.Pattern[str] = _NAME) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            dot = ", . " if pattern is _FILE_NAME else ", "
            raise self.error(key, f"{value!r} is no name; use letters, digits{dot}_ and -")
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

    def node(self, name: str, value: Any, *, system: str, stages: dict[str, Any]) -> Node:
        others = [other for other in stages if other != name]
        if _is_procedure(value):
            return self.procedure(name, value, others)
        return self.stage(
            name,
            value,
            system=system,
            trained=[other for other in others if not _is_procedure(stages[other])],
            made=[other for other in others if _is_procedure(stages[other])],
        )

    def procedure(self, name: str, value: dict[str, Any], others: list[str]) -> Procedure:
        key = f"stages.{name}"
        self.keys(value, key, required={"run", "needs", "writes", "arguments"}, optional=_PROCEDURE_KEYS)
        if name == _WRITES:
            raise self.error(key, f"${{{_WRITES}}} is what a procedure writes; give the node another name")
        if value["run"] not in PROCEDURES:
            known = ", ".join(PROCEDURES)
            raise self.error(f"{key}.run", f"there is no procedure {value['run']!r}; choose one of {known}")
        needs = tuple(
            self.one_of(n, f"{key}.needs[{i}]", others)
            for i, n in enumerate(self.sequence(value["needs"], f"{key}.needs"))
        )
        words = {
            of: tuple(str(word) for word in self.sequence(value[of], f"{key}.{of}"))
            for of in ("arguments", "demo")
            if of in value
        }
        for of, given in words.items():
            for at, word in enumerate(given):
                self.check_places(word, f"{key}.{of}[{at}]", (_WRITES, *needs))
            if not any(f"${{{_WRITES}}}" in word for word in given):
                raise self.error(f"{key}.{of}", f"says nowhere where it writes; put ${{{_WRITES}}} there")
        return Procedure(
            name,
            run=value["run"],
            needs=needs,
            writes=self.name(value["writes"], f"{key}.writes", _FILE_NAME),
            arguments=words["arguments"],
            demo=words.get("demo"),
        )

    def check_places(self, text: str, key: str, names: tuple[str, ...]) -> None:
        """Every `${NAME}` in a text must be one of the names."""
        for name in places(text):
            if name not in names:
                known = ", ".join(names) or "nothing"
                raise self.error(key, f"${{{name}}} is not what it needs; list it in `needs` (now: {known})")

    def stage(self, name: str, value: Any, *, system: str, trained: list[str], made: list[str]) -> TrainingStage:
        key = f"stages.{name}"
        self.keys(value, key, required={"configs"}, optional=_STAGE_KEYS)
        configs = tuple(
            self.config(file, f"{key}.configs[{i}]")
            for i, file in enumerate(self.sequence(value["configs"], f"{key}.configs"))
        )
        if not configs:
            raise self.error(f"{key}.configs", "is empty; name at least one file")
        needs = tuple(
            self.one_of(n, f"{key}.needs[{i}]", made)
            for i, n in enumerate(self.sequence(value.get("needs", []), f"{key}.needs"))
        )
        continues = value.get("continues")
        return TrainingStage(
            name,
            configs=configs,
            overlays=tuple(file.parent / "demo" / file.name for file in configs),
            needs=needs,
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
        self.keys(value, key, required={"artefact"}, optional=frozenset({"parts", "leave_out", "fresh"}))
        artefact, parts = value["artefact"], value.get("parts", {})
        owner, _, stage = artefact.partition("/") if isinstance(artefact, str) else ("", "", "")
        if not _NAME.fullmatch(owner) or not _NAME.fullmatch(stage):
            raise self.error(f"{key}.artefact", f"must be <system>/<stage>, found {artefact!r}")
        if owner == system:
            self.one_of(stage, f"{key}.artefact", trained)
        if not isinstance(parts, dict) or not all(isinstance(part, str) for item in parts.items() for part in item):
            raise self.error(f"{key}.parts", f"must be a mapping {{our part: its part}}, found {parts!r}")
        return StageRef(
            owner,
            stage,
            parts,
            leave_out=self.patterns(value.get("leave_out", []), f"{key}.leave_out"),
            fresh=self.patterns(value.get("fresh", []), f"{key}.fresh"),
        )

    def patterns(self, value: Any, key: str) -> tuple[str, ...]:
        found = self.sequence(value, key)
        if not all(isinstance(pattern, str) for pattern in found):
            raise self.error(key, f"must be a list of patterns of tensor names, found {value!r}")
        return tuple(found)


def _is_procedure(value: Any) -> bool:
    return isinstance(value, dict) and "run" in value
