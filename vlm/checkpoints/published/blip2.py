"""BLIP-2: Hugging Face's folders, whole, and LAVIS' files of the tensors that were trained."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.published import blip2_stage_1 as stage_1
from vlm.checkpoints.published.entries import BOOKKEEPING, Entries, read_json
from vlm.checkpoints.published.family import Load, PublishedFolder, as_dtype
from vlm.checkpoints.published.language_entries import read_language, read_t5
from vlm.checkpoints.published.lavis import (
    BERT_READ,
    LAVIS_T5,
    check_parts,
    describe_tower,
    keep_trained,
    qformer_config,
    qformer_sizes,
    text_config,
    tower_config,
    trained_beside,
)
from vlm.checkpoints.published.lavis_processor import with_rows, write_image_processor, write_processor
from vlm.checkpoints.published.one_folder import OneFolderFamily, OpenedFolder
from vlm.checkpoints.published.tokenizer_entries import describe_t5_tokenizer, describe_tokenizer
from vlm.checkpoints.report import LoadReport
from vlm.checkpoints.resume.opened import read_trained
from vlm.checkpoints.tables.bert import bert_unused, qformer_hub_rules, qformer_rules
from vlm.checkpoints.tables.blip2 import qformer_table
from vlm.checkpoints.tables.eva import eva_rules, eva_unused
from vlm.checkpoints.tables.rules import Rule, rename
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError

_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("blip-2",),
    "use_decoder_only_language_model": (True, False),
    "quantization_config": ({},),
}
_READ = frozenset({"vision_config", "qformer_config", "text_config", "num_query_tokens"})
_HARMLESS = frozenset(
    # of the first stage, which the class for it has; the factor of new weights; where the class puts features
    {"image_text_hidden_size", "initializer_factor", "initializer_range"}
    | {"image_token_index", "image_token_id", "is_composition", "tie_word_embeddings"}
)
_BERT_READ = {theirs: ours for theirs, ours in BERT_READ.items() if ours != "vocab_size"}
_BERT_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "use_qformer_text_input": (False,),
}
_BERT_HARMLESS = frozenset({"vocab_size", "pad_token_id", "encoder_hidden_size", "attention_probs_dropout_prob"})
_PROJECTIONS = ("opt_proj", "t5_proj", "llm_proj")
"""Of LAVIS' files."""


class BLIP2Family(OneFolderFamily):
    system = "blip2"
    marks: ClassVar = {"hf": "language_projection.weight", "official": "opt_proj.weight", **stage_1.MARKS}
    hub_class = "Blip2ForConditionalGeneration"
    looks_for = "language_projection.weight and a config.json of blip-2; LAVIS' files are told by opt_proj or t5_proj"  # type: ignore[assignment]
    files = (
        *("vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json", "generation_config.json", "preprocessor_config.json"),
        "processor_config.json",
    )

    def claims(self, folder: PublishedFolder) -> bool:
        return any(self.marks[name] in folder.keys for name in ("hf", "hf_retrieval")) and self.is_own(folder.config)

    def is_own(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "blip-2"

    def table(self, layout: str, config: Mapping[str, Any]) -> Table:
        if layout in stage_1.MARKS:
            return qformer_table("official" if layout == "official_stage_1" else "hf")
        sparse = ("qformer.layers.{i}.cross_attention.{rest}",)
        if layout == "official":
            projection = rename(f"{config.get('projection', 'opt_proj')}.{{p}}", "connector.{p}")
            return Table(layout="LAVIS", rules=(*qformer_rules(text=False), projection), unused=(), sparse=sparse)
        rules: tuple[Rule, ...] = (
            *eva_rules(),
            *qformer_hub_rules(text=False),
            rename("language_projection.{p}", "connector.{p}"),
            rename("language_model.{rest}", "language.{rest}"),
        )
        unused = (*eva_unused(), *bert_unused(ours="qformer."))
        return Table(layout="BLIP-2 hf", rules=rules, unused=unused, sparse=sparse)

    def open(
        self,
        path: str | Path,
        *,
        layout: str = "auto",
        target: str = "ours",
        vision: str | Path | None = None,
        base: str | Path | None = None,
    ) -> OpenedFolder:
        """As every family; LAVIS' file holds what was trained: `vision` and `base` say where EVA and the rest lie."""
        files = WeightFiles(path)
        keys = set(files.keys())
        projection = next((name for name in _PROJECTIONS if f"{name}.weight" in keys), None)
        if stage_1.MARKS["official_stage_1"] in keys:
            return stage_1.open_official(path, files, self.table("official_stage_1", {}), vision=vision, base=base)
        if projection is None:
            opened = super().open(path, layout=layout, target=target, vision=vision, base=base)
            return stage_1.complete(opened) if opened.layout == "hf_retrieval" else opened
        check_parts(path, layout=layout, target=target, vision=vision, base=base, language="the language model")
        config = {"projection": projection}
        table = self.table("official", config)
        shapes = table.check(files.shapes(), side="theirs")
        model = _describe_trained(shapes, projection, vision=str(vision), language=str(base))
        return OpenedFolder(
            shapes, lambda: table.stream_to_ours(files.items()), "official", config, model, lambda _: None
        )

    def open_artefact(
        self, path: str | Path, *, target: str, load: Load, vision: str | Path | None = None
    ) -> OpenedFolder:
        opened = super().open_artefact(path, target=target, load=load, vision=vision)
        if target not in ("official", "official_stage_1"):
            return with_rows(opened, opened.config["text_config"]["vocab_size"]) if target == "hf" else opened
        return keep_trained(opened, self.table(target, opened.config))

    def translated(self, config: Mapping[str, Any], *, source: str, target: str) -> dict[str, Any]:
        if source == "official" and target == "hf":
            raise UserError("a file of trained tensors holds no tower and no language model; export a stage over it")
        if target == "official" and source != "official":
            return {"projection": _projection(config["text_config"]["model_type"])}
        return dict(config)

    def carried(self, opened: OpenedFolder) -> Callable[[str], bool]:
        is_carried = super().carried(opened)
        # what lies beside Hugging Face's files for retrieval is computed with here
        return lambda name: is_carried(name) and not name.startswith(("heads.", "qformer.head."))

    def read_config(self, files: WeightFiles, path: str | Path) -> dict[str, Any]:
        config = super().read_config(files, path)
        return config | {"architectures": [stage_1.CLASS if self.marks["hf_retrieval"] in files else self.hub_class]}

    def describe_folder(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        file = folder / "config.json"
        if config["architectures"] == [stage_1.CLASS]:
            return stage_1.describe_folder(config, folder)
        Entries(_READ, _ONLY, _HARMLESS).check(config, file)
        bert, text = config["qformer_config"], config["text_config"]
        Entries(frozenset(_BERT_READ), _BERT_ONLY, _BERT_HARMLESS).check(bert, f"{file}: qformer_config")
        reader = {"cross_attention_every": 2} | {ours: bert[name] for name, ours in _BERT_READ.items() if name in bert}
        kind = text.get("model_type", "opt")
        if kind not in ("opt", "t5", "llama"):
            raise UserError(f"{file}: a language model of the kind {kind!r}; here it is opt, t5 or llama")
        return {
            "class_path": "vlm.systems.BLIP2T5" if kind == "t5" else "vlm.systems.BLIP2",
            "init_args": {
                "vision": describe_tower(config["vision_config"], file),
                "qformer": {
                    "class_path": "vlm.connectors.QFormer",
                    "init_args": {**reader, "num_queries": config.get("num_query_tokens", 32)},
                },
                "connector": {"class_path": "vlm.connectors.Linear", "init_args": {}},
                "language": _language(kind, text, file),
                "tokenizer": _tokenizer(kind, folder),
                "template": {"opt": "blip2_opt", "t5": "blip2_t5", "llama": "blip2_vicuna"}[kind],
                "image": "squash",
            },
        }

    def config(self, module: Any, layout: str) -> dict[str, Any]:
        if (layout in stage_1.MARKS) != stage_1.is_first(module):
            wanted = " or ".join(name for name in self.marks if (name in stage_1.MARKS) == stage_1.is_first(module))
            raise UserError(f"{type(module).__name__} has no place in the layout {layout}; use --to {wanted}")
        if stage_1.is_first(module):
            return stage_1.config(module)
        if module.arguments["qformer"].text:
            raise UserError("a Q-Former that reads the question has no place in BLIP-2's published folders")
        if layout == "official":
            return {"projection": _projection(module.language.config.model_type)}
        return {
            "architectures": [self.hub_class],
            "model_type": "blip-2",
            "num_query_tokens": module.arguments["qformer"].num_queries,
            "qformer_config": qformer_config(module, _BERT_READ, model_type="blip_2_qformer"),
            "torch_dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
            "vision_config": tower_config(module, model_type="blip_2_vision_model"),
            **text_config(module),
        }

    def write_files(self, folder: Path, module: Any) -> None:
        super().write_files(folder, module)
        write = write_image_processor if stage_1.is_first(module) else write_processor
        write(folder, module, processor="Blip2Processor")

    def export(self, folder: Path, path: str, *, dtype: torch.dtype | None, load: Load) -> LoadReport:
        first = read_trained(path, system=self.system).meta["model"]["class_path"].endswith(".BLIP2QFormer")
        layout = "hf_retrieval" if first else "hf"
        opened = self.open_artefact(path, target=layout, load=load)
        return self.fill(folder, replace(opened, stream=as_dtype(opened.stream, dtype)), target=layout)


def _projection(kind: str) -> str:
    """How LAVIS calls the connector before a kind of language model."""
    return {"opt": "opt_proj", "t5": "t5_proj"}.get(kind, "llm_proj")


def _language(kind: str, text: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The language model, with every entry that its class of transformers has."""
    if kind == "llama":
        entries = {"model_type": "llama", **read_language(text, file, kind="llama")}
        return {"class_path": "vlm.language.CausalLM", "init_args": {"config": entries}}
    if kind == "t5":
        return {"class_path": "vlm.language.Seq2SeqLM", "init_args": {"config": read_t5(text)}}
    from transformers import CONFIG_MAPPING

    known = frozenset(CONFIG_MAPPING[kind]().to_dict()) - {"model_type", *BOOKKEEPING}
    entries = {name: value for name, value in text.items() if name in known}
    return {"class_path": "vlm.language.CausalLM", "init_args": {"config": {"model_type": kind, **entries}}}


def _tokenizer(kind: str, folder: Path) -> dict[str, Any]:
    if kind == "t5":
        return describe_t5_tokenizer(folder)
    if kind == "llama":
        return describe_tokenizer(folder, added={"pad_token": "[PAD]", "bos_token": "</s>"})
    if (folder / "vocab.json").is_file():
        return {"class_path": "vlm.prompts.OPTTokenizer", "init_args": {"path": str(folder)}}
    if read_json(folder / "tokenizer.json") is None:
        raise UserError(
            f"{folder}: has neither vocab.json and merges.txt nor tokenizer.json; put the tokenizer's files beside"
        )
    arguments = {"path": str(folder), "pad_token": "<pad>", "eos_token": "\u010a", "add_bos": True}
    return {"class_path": "vlm.prompts.HubTokenizer", "init_args": arguments}


def _describe_trained(
    shapes: Mapping[str, tuple[int, ...]], projection: str, *, vision: str, language: str
) -> dict[str, Any]:
    """The paper's network around a file of LAVIS', as large as its tensors say."""
    is_t5 = projection == "t5_proj"
    tokenizer = {
        "opt_proj": {"class_path": "vlm.prompts.OPTTokenizer", "init_args": {"path": language}},
        "t5_proj": {"class_path": "vlm.prompts.T5Tokenizer", "init_args": {"path": language}},
        "llm_proj": {
            "class_path": "vlm.prompts.LlamaTokenizer",
            "init_args": {"path": language, "pad_token": "[PAD]", "bos_token": "</s>"},
        },
    }[projection]
    return {
        "class_path": "vlm.systems.BLIP2T5" if is_t5 else "vlm.systems.BLIP2",
        "init_args": {
            "vision": trained_beside(vision),
            "qformer": {"class_path": "vlm.connectors.QFormer", "init_args": qformer_sizes(shapes)},
            "connector": {"class_path": "vlm.connectors.Linear", "init_args": {}},
            "language": {
                "class_path": "vlm.language.Seq2SeqLM" if is_t5 else "vlm.language.CausalLM",
                "init_args": {"path": language, **({"config": LAVIS_T5} if is_t5 else {})},
            },
            "tokenizer": tokenizer,
            "template": {"opt_proj": "blip2_opt", "t5_proj": "blip2_t5", "llm_proj": "blip2_vicuna"}[projection],
            "image": "squash",
        },
    }
