"""VILA-1.5's folders: language model, projector and tower each saved by itself, as one checkpoint in LLaVA's names.

::

    config.json               how the parts are put together
    llm/                      a causal language model of the Hugging Face tools, with its tokenizer
    mm_projector/             layers.*
    vision_tower/             a CLIP vision model

VILA v1.0 is in LLaVA-1.5's own layout and needs nothing of this.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.published.entries import read_json, refusal
from vlm.checkpoints.published.llava_config import LlavaConfig
from vlm.checkpoints.published.llava_entries import check_official, has_class_token, official_view
from vlm.checkpoints.tables.llava import OFFICIAL
from vlm.errors import UserError

FOLDERS = "folders"
"""Name of the layout; also the key of its `config.json` files among `LlavaConfig.originals`."""
PREFIXES = {"llm": ("", ""), "mm_projector": ("layers.", OFFICIAL.connector),
            "vision_tower": ("", OFFICIAL.vision.removesuffix("vision_model."))}  # fmt: skip
"""By folder, what stands before a tensor's name there and in LLaVA's layout."""


def has_part_folders(path: str | Path) -> bool:
    """Whether a path is a folder of VILA-1.5's form."""
    folder = Path(path).expanduser()
    return all((folder / name).is_dir() for name in ("llm", "mm_projector"))


class PartFolders(WeightFiles):
    """The tensors of the folders together under LLaVA's official names, with what `WeightFiles` offers.

    Attributes:
        folder: of the language model, where its config and the tokenizer are.

    Raises:
        UserError: a folder without weights, or a tower that is no CLIP.
    """

    def __init__(self, path: str | Path) -> None:
        self.root = Path(path).expanduser()
        self.source = str(path)
        self.folder = self.root / "llm"
        self._parts: dict[str, tuple[WeightFiles, str]] = {}
        for name in PREFIXES:
            if not (self.root / name).is_dir():
                continue  # without its tower a checkpoint says where it is
            files = WeightFiles(self.root / name)
            if name == "vision_tower" and "vision_model.embeddings.class_embedding" not in files:
                raise UserError(
                    f"{self.root / name}: is no CLIP tower (SigLIP and InternViT have other tensors); "
                    "VILA-1.5 with such a tower is not converted"
                )
            self._parts |= {official_name(name, key): (files, key) for key in files.keys()}  # noqa: SIM118

    def keys(self) -> list[str]:
        return list(self._parts)

    def files(self) -> list[Path]:
        return list(dict.fromkeys(file for files, _ in self._parts.values() for file in files.files()))

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def items(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.get(name)) for name in self._parts)

    def get(self, name: str) -> Tensor:
        if name not in self._parts:
            raise UserError(f"{self.source}: no tensor {name!r} among {len(self._parts)}")
        files, key = self._parts[name]
        return files.get(key)

    def _headers(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        headers: dict[int, dict[str, tuple[int, ...]]] = {}
        for name, (files, key) in self._parts.items():
            if id(files) not in headers:
                headers[id(files)] = dict(files._headers())
            yield name, headers[id(files)][key]

    def describe(self, config: LlavaConfig) -> LlavaConfig:
        """The description in `llm/config.json` with what the other files say."""
        configs = {name: read_json(self.root / name / "config.json") for name in ("", *PREFIXES)}
        root, file = configs[""] or {}, self.root / "config.json"
        check_official(root, file, kind="llama")
        projector = self.root / "mm_projector" / "config.json"
        stated = (configs["mm_projector"] or {}).get("mm_projector_type", config.connector)
        if stated != config.connector:
            raise refusal(projector, "mm_projector_type", stated, expected=(config.connector,))
        tower = self.root / "vision_tower"
        return replace(
            config,
            vision_layer=root.get("mm_vision_select_layer", -2),
            tower=str(tower) if tower.is_dir() else root.get("mm_vision_tower"),
            layout=FOLDERS,
            originals={FOLDERS: {name: content for name, content in configs.items() if content is not None}},
            class_token=has_class_token(root, file),
            image=official_view(root, file),
        )


def official_name(folder: str, name: str) -> str:
    """LLaVA's official name of a tensor in one of the folders."""
    own, official = PREFIXES[folder]
    if not name.startswith(own):
        raise UserError(f"{folder}: tensor {name!r} does not start with {own!r}; is it a folder of VILA-1.5?")
    return official + name.removeprefix(own)


def place_of(name: str) -> tuple[str, str]:
    """(folder, name there) of a tensor by its official name."""
    for folder in ("mm_projector", "vision_tower", "llm"):
        own, official = PREFIXES[folder]
        if name.startswith(official):
            return folder, own + name.removeprefix(official)
    raise AssertionError(name)


def write_configs(folder: Path, config: LlavaConfig) -> None:
    """The `config.json` files as they were read."""
    for name, content in config.originals[FOLDERS].items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(content, indent=2) + "\n")
