"""MiniGPT-4: the published file holds the linear layer alone; what it stands between lies in other files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.published.family import Load, PublishedFolder
from vlm.checkpoints.published.lavis import EVA, keep_trained
from vlm.checkpoints.published.one_folder import OneFolderFamily, OpenedFolder
from vlm.checkpoints.tables.rules import rename
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError

TOWER_FILE, QFORMER_FILE = "eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth"
_MARK = "llama_proj.weight"
_JOINED = 4 * 1408
"""Numbers of four patches of EVA-CLIP-g: the Llama-2 variant."""


class MiniGPT4Family(OneFolderFamily):
    system = "minigpt4"
    marks: ClassVar = {"official": _MARK}
    looks_for = "llama_proj.weight"  # type: ignore[assignment]
    files = ()

    def claims(self, folder: PublishedFolder) -> bool:
        return folder.keys == {_MARK, "llama_proj.bias"}

    def is_own(self, config: Mapping[str, Any]) -> bool:
        return True  # the file comes without one

    def table(self, layout: str, config: Mapping[str, Any]) -> Table:
        return Table(layout="MiniGPT-4", rules=(rename("llama_proj.{p}", "connector.{p}"),))

    def open(
        self,
        path: str | Path,
        *,
        layout: str = "auto",
        target: str = "ours",
        vision: str | Path | None = None,
        base: str | Path | None = None,
    ) -> OpenedFolder:
        """The linear layer; `vision` is the folder of EVA and BLIP-2's Q-Former, `base` that of the language model."""
        files = WeightFiles(path)
        if layout not in ("auto", "official"):
            raise UserError(f"{path}: is in the official layout, not in {layout!r}")
        if vision is None or base is None:
            raise UserError(
                f"{path}: holds the linear layer alone; say with --vision which folder has {TOWER_FILE} and "
                f"{QFORMER_FILE}, and with --base where Vicuna v0 (or Llama-2) lies"
            )
        table = self.table("official", {})
        shapes = table.check(files.shapes(), side="theirs")
        model = _describe(shapes["connector.weight"], vision=Path(vision), language=str(base))
        return OpenedFolder(shapes, lambda: table.stream_to_ours(files.items()), "official", {}, model, lambda _: None)

    def open_artefact(
        self, path: str | Path, *, target: str, load: Load, vision: str | Path | None = None
    ) -> OpenedFolder:
        opened = super().open_artefact(path, target=target, load=load, vision=vision)
        kept = keep_trained(opened, self.table("official", {}))  # the linear layer
        return replace(kept, layout=target, config={})

    def describe_folder(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        raise UserError(f"{folder}: holds the linear layer alone; convert it with --vision and --base")

    def config(self, module: Any, layout: str) -> dict[str, Any]:
        return {}


def _describe(shape: tuple[int, ...], *, vision: Path, language: str) -> dict[str, Any]:
    """The network around a linear layer of this shape."""
    joined = shape[1] == _JOINED
    tower = {
        "name": EVA,
        "layer": -2,
        "class_token": not joined,
        "weights": str(vision / TOWER_FILE),
    }
    qformer = {"weights": str(vision / QFORMER_FILE), "dropout": 0.0}
    connector = "JoinedLinear" if joined else "Linear"
    return {
        "class_path": "vlm.systems.MiniGPT4",
        "init_args": {
            "vision": {"class_path": "vlm.vision.TimmTower", "init_args": tower},
            "qformer": None if joined else {"class_path": "vlm.connectors.QFormer", "init_args": qformer},
            "connector": {"class_path": f"vlm.connectors.{connector}", "init_args": {}},
            "language": {"class_path": "vlm.language.CausalLM", "init_args": {"path": language}},
            "tokenizer": {
                "class_path": "vlm.prompts.LlamaTokenizer",
                "init_args": {"path": language, "legacy": True, "pad_token": "<unk>"},
            },
            "template": "minigpt4_llama_2" if joined else "minigpt4",
            "image": "squash",
        },
    }
