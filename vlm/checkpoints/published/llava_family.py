"""LLaVA and its kin: folders of the official code, of Hugging Face's tools, and VILA-1.5's with one for each part."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm.checkpoints.published.family import Family, Load, PublishedFolder
from vlm.checkpoints.published.llava_chat import (
    added_tokens,
    marks_images,
    mini_gemini_template,
    next_template,
    read_chat_settings,
    write_view,
)
from vlm.checkpoints.published.llava_export import check_exportable, fill_exported
from vlm.checkpoints.published.llava_reading import (
    Kind,
    OpenedLlava,
    open_checkpoint,
    open_llava_artefact,
    open_llava_module,
    table_of,
)
from vlm.checkpoints.published.llava_writing import fill_layout, fill_llava_artefact
from vlm.checkpoints.published.preprocessor import says_view
from vlm.checkpoints.published.tokenizer_entries import describe_tokenizer
from vlm.checkpoints.published.vila import has_part_folders
from vlm.checkpoints.report import LoadReport
from vlm.checkpoints.resume.opened import read_trained
from vlm.checkpoints.tables.llava import HF, HF_MEMORY, OFFICIAL, check_connector, detect_connector, llava_table
from vlm.checkpoints.tables.mini_gemini import MARK
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError

FOLLOWED = "what it follows"
"""How an artefact names the source of frozen parts that those it follows brought."""


class LLaVAFamily(Family):
    """LLaVA's first release, and what the later ones share with it.

    Attributes:
        kind: what its checkpoints have.
        template: that it is talked to with, where it is always the same one.
        marked_template: the same where images stand between tokens of their own; None: they never do.
        image: how an image becomes a square view, where the files do not say it.
    """

    system = "llava"
    layouts: ClassVar[tuple[str, ...]] = ("official", "hf")
    looks_for = "a projector of one layer (model.mm_projector.weight)"
    hub_class: ClassVar[str | None] = "LlavaForConditionalGeneration"
    kind = Kind("llava", connectors=("linear",))
    template: ClassVar[str] = "v0"
    marked_template: ClassVar[str | None] = "v0_first_marked"
    image: ClassVar[str] = "crop"

    def claims(self, folder: PublishedFolder) -> bool:
        newline = bool(folder.keys & {layout.newline for layout in (OFFICIAL, HF, HF_MEMORY)})
        prefixes = tuple(layout.connector for layout in (OFFICIAL, HF, HF_MEMORY))
        return (
            any(key.startswith(prefixes) for key in folder.keys)
            and self.kind.has_connector(detect_connector(folder.keys))
            and newline == self.kind.newline
            and (MARK in folder.keys) == self.kind.mining
            and not has_part_folders(folder.path)
        )

    def open(
        self,
        path: str | Path,
        *,
        layout: str = "auto",
        target: str = "ours",
        vision: str | Path | None = None,
        base: str | Path | None = None,
    ) -> OpenedLlava:
        if target == "hf":
            check_connector(HF, "linear" if self.kind.connectors == ("linear",) else "mlp2x_gelu")
        return open_checkpoint(path, self.kind, layout=layout, vision=vision, base=base, target=target)

    def open_artefact(
        self, path: str | Path, *, target: str, load: Load, vision: str | Path | None = None
    ) -> OpenedLlava:
        meta = read_trained(path).meta
        inherits = any(entry["source"] == FOLLOWED for entry in meta["frozen"].values())
        if meta["surgery"] or inherits:  # an adapter, which `load` merges (all else was refused); or a part of others
            return open_llava_module(load(path), path, self.kind, target=target, vision=vision)
        return open_llava_artefact(path, self.kind, target=target, vision=vision)

    def open_complete(self, path: str) -> OpenedLlava:
        try:
            opened = self.open(path)
            if any(name.startswith("vision.") for name in opened.shapes):
                return opened
            if opened.config.tower is None:
                raise UserError("holds no vision tower, and its config.json names none (mm_vision_tower)")
            return self.open(path, vision=opened.config.tower)
        except UserError as error:
            raise error if path in str(error) else UserError(f"{path}: {error}") from error

    def describe(self, opened: OpenedLlava) -> dict[str, Any]:
        parts = opened.config.model_parts(has_tower=True)
        tokenizer = self._tokenizer(opened)
        stated = read_chat_settings(opened.folder)
        tokenizer["init_args"] |= stated.pop("tokenizer", {})
        arguments = {**parts, **self._arguments(opened), "tokenizer": tokenizer, **stated}
        return {"class_path": self.class_path, "init_args": arguments}

    def carried(self, opened: OpenedLlava) -> Callable[[str], bool]:
        return table_of(opened, opened.config.layout).is_carried

    def fill(self, folder: Path, opened: OpenedLlava, *, target: str, template: str | None = None) -> LoadReport:
        if target != "ours":
            report = fill_layout(folder, opened, target=target)
            if target == "hf" and opened.config.image is not None and not says_view(folder):
                write_view(folder, opened.config.image)
            return report
        arguments = self._arguments(opened) | ({} if template is None else {"template": template})
        parts = opened.config.model_parts(has_tower=any(name.startswith("vision.") for name in opened.shapes))
        if any((opened.folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
            parts["tokenizer"] = self._tokenizer(opened)
            parts["tokenizer"]["init_args"]["path"] = "."  # copied along
        elif marks_images(opened):
            parts["tokenizer"]["init_args"] |= added_tokens(opened.folder)
        return fill_llava_artefact(folder, opened, {"class_path": self.class_path, "init_args": {**parts, **arguments}})

    def export(self, folder: Path, path: str, *, dtype: torch.dtype | None, load: Load) -> LoadReport:
        return fill_exported(folder, load(path), dtype=dtype)

    def memory_table(self, module: Any) -> tuple[Table, Mapping[str, Tensor]]:
        check_exportable(module)
        language = module.language.config
        table = llava_table(
            HF_MEMORY,
            connector="mlp2x_gelu",
            num_blocks=module.tower.num_blocks,
            vocab_rows=language.vocab_size,
            tied=language.tie_word_embeddings,
            newline=getattr(module, "tiles", None) is not None,
            num_experts=getattr(language, "num_local_experts", 0),
        )
        norm = torch.empty(module.tower.dim)  # above the features that are taken
        made = {f"vision.trunk.norm.{kind}": norm for kind in ("weight", "bias")}
        return table, {name: tensor for name, tensor in made.items() if name not in dict(module.named_parameters())}

    def chat_template(self, opened: OpenedLlava) -> str:
        """Name of the template that a folder is talked to with."""
        return self.template

    def _arguments(self, opened: OpenedLlava) -> dict[str, Any]:
        """How a folder is talked to."""
        marked = marks_images(opened)
        if marked and self.marked_template is None:
            raise UserError(f"{opened.folder}: mm_use_im_start_end is set; no {self.system} of ours marks its images")
        template = self.marked_template if marked else self.chat_template(opened)
        return {"template": template, "image": opened.config.image or self.image}

    def _tokenizer(self, opened: OpenedLlava) -> dict[str, Any]:
        return describe_tokenizer(
            opened.folder,
            # Gemma's SentencePiece model puts no blank in front and has symbols of its own
            rewritten=opened.config.language.get("model_type") in ("gemma", "gemma2"),
            added=added_tokens(opened.folder) if marks_images(opened) else None,
        )


class LLaVA15Family(LLaVAFamily):
    system = "llava_1_5"
    looks_for = "a projector of several layers (mm_projector.0.weight or multi_modal_projector.linear_1.weight)"
    kind = Kind("llava_1_5")
    template = "v1"
    marked_template = None
    image = "pad"


class LLaVANextFamily(LLaVA15Family):
    system = "llava_next"
    looks_for = "image_newline"
    hub_class = "LlavaNextForConditionalGeneration"
    kind = Kind("llava_next", newline=True)

    def chat_template(self, opened: OpenedLlava) -> str:
        return next_template(opened)


class MiniGeminiFamily(LLaVA15Family):
    system = "mini_gemini"
    layouts = ("official",)
    looks_for = MARK
    hub_class = None
    kind = Kind("mini_gemini", mining=True)

    def chat_template(self, opened: OpenedLlava) -> str:
        return mini_gemini_template(opened)


class VILAFamily(LLaVA15Family):
    """VILA v1.0's folders are LLaVA-1.5's, compute what those do, and nothing in them tells them apart: they are VILA's
    where they are said to be."""

    system = "vila"
    looks_for = "the folders llm/ and mm_projector/, or a downsampling projector (mm_projector.4.weight)"
    kind = Kind("vila", connectors=("linear", "mlp", "mlp_downsample"))

    def claims(self, folder: PublishedFolder) -> bool:
        is_downsampled = OFFICIAL.connector + "1.weight" in folder.keys
        return has_part_folders(folder.path) or (is_downsampled and super().claims(folder))
