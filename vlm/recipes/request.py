"""What `vlm fit --recipe` is asked for, and the command line of each node's process."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm.errors import UserError
from vlm.recipes.configs import config_files, default_run, from_here
from vlm.recipes.graph import Node, Procedure, Recipe, StageRef, TrainingStage
from vlm.recipes.inputs import fill_configs, fill_places
from vlm.recipes.node import ProcedureFolder
from vlm.recipes.run_folder import RunFolder


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        name: the recipe as the command line called it.
        stage: the only node to run, None for all.
        given: artefacts and data that need not be made, by `system/stage`.
        configs: files over those of every training stage.
        weights: what the stage starts from instead of what it follows.
        options: for every training stage.
        stage_options: for one node, by its name; they come last and win.
    """

    name: str
    recipe: Recipe
    run: Path
    demo: bool
    stage: str | None
    dry_run: bool
    given: Mapping[str, Path]
    configs: tuple[str, ...]
    weights: str | None
    options: tuple[str, ...]
    stage_options: Mapping[str, tuple[str, ...]]

    def folder(self, node: Node) -> RunFolder:
        kind = ProcedureFolder if isinstance(node, Procedure) else RunFolder
        return kind(self.run / node.name)

    def product(self, node: Node) -> Path:
        """The artefact or the data of a finished node of this recipe."""
        folder = self.folder(node)
        return folder.path / node.writes if isinstance(node, Procedure) else folder.artefact

    def skipped(self, node: Node) -> str | None:
        """Why a node need not run, None when it has to."""
        given = self.given.get(f"{self.recipe.system}/{node.name}")
        if given is not None:
            return f"not needed, given as {given}"
        folder = self.folder(node)
        if not folder.finished or self.is_trial:
            return None
        if isinstance(node, TrainingStage) and (shortened := folder.shortened):
            return f"finished, though shortened ({shortened}), skipped ({self.product(node)})"
        return f"finished, skipped ({self.product(node)})"

    @property
    def is_trial(self) -> bool:
        """Whether stages are only tried (`trainer.fast_dev_run`) and leave nothing behind."""
        words = [*self.options, *(word for words in self.stage_options.values() for word in words)]
        return any(word.split("=")[0].replace("-", "_") == "__trainer.fast_dev_run" for word in words)

    def arguments(self, node: Node) -> list[str]:
        """What follows `vlm` in the command of a node.

        Raises:
            UserError: something that the node starts from is not there and nothing here makes it; no demo.
        """
        return self._run_arguments(node) if isinstance(node, Procedure) else self._fit_arguments(node)

    def _fit_arguments(self, node: TrainingStage) -> list[str]:
        files = config_files(self.recipe, node, demo=self.demo)
        folder = self.run / node.name / "configs"
        arguments = ["fit"]
        for file in fill_configs(files, self._needs(node), folder, write=not self.dry_run):
            arguments += ["-c", from_here(file)]
        arguments += [word for file in self.configs for word in ("-c", file)]
        arguments += ["--trainer.default_root_dir", str(self.run / node.name), "--stage.name", node.name]
        if self.weights is not None:
            arguments += ["--weights", self.weights]
        elif node.follows:
            arguments += ["--stage.follows", json.dumps([self._follow(followed) for followed in node.follows])]
        if node.continues is not None and self.weights is None:
            arguments += ["--stage.continues", str(self._artefact(StageRef(self.recipe.system, node.continues)))]
        if any(isinstance(other, TrainingStage) and other.continues == node.name for other in self.recipe.nodes):
            arguments += ["--stage.keep_optimizer", "true"]
        return [*arguments, *self.options, *self.stage_options.get(node.name, ())]

    def _run_arguments(self, node: Procedure) -> list[str]:
        return ["run", "--node", str(self.run / node.name), "--writes", node.writes, *self.procedure(node)]

    def procedure(self, node: Procedure) -> list[str]:
        """The procedure of a node and its words.

        Raises:
            UserError: it has no demo, or something that it needs is not there.
        """
        words = node.demo if self.demo else node.arguments
        if words is None:
            raise UserError(f"--demo: {self.recipe.path}: stages.{node.name}.demo is missing")
        paths = {**self._needs(node), "writes": self.product(node)}
        return [node.run, *(fill_places(word, paths) for word in words), *self.stage_options.get(node.name, ())]

    def _needs(self, node: Node) -> dict[str, Path]:
        return {name: self._artefact(StageRef(self.recipe.system, name)) for name in node.needs}

    def _follow(self, followed: StageRef) -> dict[str, object]:
        """An entry of `stage.follows`."""
        patterns = {"leave_out": list(followed.leave_out), "fresh": list(followed.fresh)}
        given = {key: value for key, value in patterns.items() if value}
        return {"artefact": str(self._artefact(followed)), "parts": dict(followed.parts), **given}

    def _artefact(self, followed: StageRef) -> Path:
        """What a node made. It is there, or an earlier node of this command makes it."""
        if str(followed) in self.given:
            return self.given[str(followed)]
        if followed.system == self.recipe.system:
            node, run = self.recipe.node(followed.stage), self.run
            if self.folder(node).finished or self.stage is None:
                return self.product(node)
            product, recipe = self.product(node), self.name
        else:
            run = default_run(followed.system, self.demo)
            folder = RunFolder(run / followed.stage)
            if folder.finished:
                return folder.artefact
            product, recipe = folder.artefact, followed.system
        makes_it = ["vlm", "fit", "--recipe", recipe, *(["--demo"] if self.demo else [])]
        makes_it += ["--run", str(run), "--stage", followed.stage]
        raise UserError(
            f"{product}: {followed} is not finished; make it with `{shlex.join(makes_it)}` "
            f"or give one with --from {followed}=FOLDER"
        )
