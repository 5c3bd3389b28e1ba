"""InstructBLIP: Hugging Face's folders, whole, and LAVIS' files of the tensors that were trained."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.published.entries import Entries
from vlm.checkpoints.published.family import Load, PublishedFolder
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
    text_sizes,
    tower_config,
    trained_beside,
)
from vlm.checkpoints.published.lavis_processor import with_rows, write_processor
from vlm.checkpoints.published.one_folder import OneFolderFamily, OpenedFolder
from vlm.checkpoints.published.tokenizer_entries import describe_t5_tokenizer, describe_tokenizer
from vlm.checkpoints.tables.bert import bert_unused, qformer_hub_rules, qformer_rules
from vlm.checkpoints.tables.eva import eva_rules, eva_unused
from vlm.checkpoints.tables.rules import rename
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError

TOKENIZER = "qformer_tokenizer"
"""Folder of the Q-Former's tokenizer beside the weights."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("instructblip",),
    "use_decoder_only_language_model": (True, False),
    "quantization_config": ({},),
}
_READ = frozenset({"vision_config", "qformer_config", "text_config", "num_query_tokens"})
_HARMLESS = frozenset({"image_token_index", "image_token_id", "is_composition", "tie_word_embeddings"})
_BERT_ONLY: dict[str, tuple[Any, ...]] = {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",)}
_BERT_DEFAULTS = {"vocab_size": 30522, "cross_attention_frequency": 2}
_TRAINED = "Qformer.bert.embeddings.word_embeddings.weight"
"""Tensor of LAVIS' files."""
_PROJECTIONS = {"llama": "llm_proj", "t5": "t5_proj"}
"""How LAVIS calls the connector before each language model."""


class InstructBLIPFamily(OneFolderFamily):
    system = "instructblip"
    marks: ClassVar = {"hf": "qformer.embeddings.word_embeddings.weight", "official": _TRAINED}
    hub_class = "InstructBlipForConditionalGeneration"
    looks_for = (
        "language_projection.weight and a config.json of instructblip; LAVIS' files are told by llm_proj or t5_proj"  # type: ignore[assignment]
    )
    files = (
        *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("spiece.model", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
        *(f"{TOKENIZER}/{name}" for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json")),
        *(f"{TOKENIZER}/{name}" for name in ("special_tokens_map.json", "added_tokens.json")),
    )

    def claims(self, folder: PublishedFolder) -> bool:
        return self.marks["hf"] in folder.keys and self.is_own(folder.config)

    def is_own(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "instructblip"

    def table(self, layout: str, config: Mapping[str, Any]) -> Table:
        sparse = ("qformer.layers.{i}.cross_attention.{rest}",)
        if layout == "official":
            rules = (*qformer_rules(text=True), rename(f"{config['projection']}.{{p}}", "connector.{p}"))
            return Table(layout="LAVIS", rules=rules, unused=bert_unused(ours="qformer."), sparse=sparse)
        return Table(
            layout="InstructBLIP hf",
            rules=(
                *eva_rules(),
                *qformer_hub_rules(),
                rename("language_projection.{p}", "connector.{p}"),
                rename("language_model.{rest}", "language.{rest}"),
            ),
            unused=(*eva_unused(), *bert_unused(ours="qformer.")),
            sparse=sparse,
        )

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
        if _TRAINED not in files.keys():  # noqa: SIM118
            return super().open(path, layout=layout, target=target, vision=vision, base=base)
        check_parts(path, layout=layout, target=target, vision=vision, base=base, language="Vicuna or FlanT5")
        config = {"projection": "t5_proj" if "t5_proj.weight" in files else "llm_proj"}
        table = self.table("official", config)
        shapes = table.check(files.shapes(), side="theirs")
        describe = partial(_describe_trained, shapes, is_t5=config["projection"] == "t5_proj")
        model = describe(vision=str(vision), language=str(base))
        return OpenedFolder(
            shapes, lambda: table.stream_to_ours(files.items()), "official", config, model, lambda _: None
        )

    def open_artefact(
        self, path: str | Path, *, target: str, load: Load, vision: str | Path | None = None
    ) -> OpenedFolder:
        opened = super().open_artefact(path, target=target, load=load, vision=vision)
        if target != "official":
            return with_rows(opened, opened.config["text_config"]["vocab_size"])
        return keep_trained(opened, self.table("official", opened.config))

    def translated(self, config: Mapping[str, Any], *, source: str, target: str) -> dict[str, Any]:
        if source == "official" and target == "hf":
            raise UserError("a file of trained tensors holds no tower and no language model; export a stage over it")
        if target == "official" and source != "official":
            return {"projection": _PROJECTIONS[config["text_config"]["model_type"]]}
        return dict(config)

    def describe_folder(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        file = folder / "config.json"
        Entries(_READ, _ONLY, _HARMLESS).check(config, file)
        bert, text = config["qformer_config"], config["text_config"]
        vision = describe_tower(config["vision_config"], file)
        known = frozenset({*BERT_READ, "encoder_hidden_size", "attention_probs_dropout_prob", "pad_token_id"})
        Entries(known, _BERT_ONLY).check(bert, f"{file}: qformer_config")
        reader = {ours: ({**_BERT_DEFAULTS, **bert})[theirs] for theirs, ours in BERT_READ.items() if theirs in bert}
        if (kind := text.get("model_type")) not in _PROJECTIONS:
            raise UserError(f"{file}: a language model of the kind {kind!r}; here it is llama (Vicuna) or t5")
        if kind == "t5":
            language, tokenizer = read_t5(text), describe_t5_tokenizer(folder)
        else:
            language = {"model_type": "llama", **read_language(text, file, kind="llama")}
            tokenizer = describe_tokenizer(folder, added={"pad_token": "[PAD]", "bos_token": "</s>"})
        return {
            "class_path": _class(is_t5=kind == "t5"),
            "init_args": {
                "vision": vision,
                "qformer": {
                    "class_path": "vlm.connectors.QFormer",
                    "init_args": {**reader, "num_queries": config.get("num_query_tokens", 32), "text": True},
                },
                "qformer_tokenizer": {
                    "class_path": "vlm.prompts.BertTokenizer",
                    "init_args": {"path": str(folder / TOKENIZER), "added_tokens": ["[DEC]"]},
                },
                "connector": {"class_path": "vlm.connectors.Linear", "init_args": {}},
                "language": {"class_path": _language(is_t5=kind == "t5"), "init_args": {"config": language}},
                "tokenizer": tokenizer,
                "template": "instructblip",
                "image": "squash",
            },
        }

    def config(self, module: Any, layout: str) -> dict[str, Any]:
        if layout == "official":
            return {"projection": _PROJECTIONS[module.language.config.model_type]}
        return {
            "architectures": [self.hub_class],
            "model_type": "instructblip",
            "num_query_tokens": module.arguments["qformer"].num_queries,
            "qformer_config": qformer_config(module, BERT_READ, model_type="instructblip_qformer"),
            "torch_dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
            "vision_config": tower_config(module, model_type="instructblip_vision_model"),
            **text_config(module),
        }

    def write_files(self, folder: Path, module: Any) -> None:
        super().write_files(folder, module)
        module.codec.reader.save(folder / TOKENIZER)
        write_processor(folder, module, processor="InstructBlipProcessor")


def _class(*, is_t5: bool) -> str:
    return "vlm.systems.InstructBLIPT5" if is_t5 else "vlm.systems.InstructBLIP"


def _language(*, is_t5: bool) -> str:
    return "vlm.language.Seq2SeqLM" if is_t5 else "vlm.language.CausalLM"


def _describe_trained(
    shapes: Mapping[str, tuple[int, ...]], *, is_t5: bool, vision: str, language: str
) -> dict[str, Any]:
    """The paper's network around a file of LAVIS', as large as its tensors say."""
    reader = {**qformer_sizes(shapes), **text_sizes(shapes), "text": True}
    tokenizer: dict[str, Any] = {
        "class_path": "vlm.prompts.LlamaTokenizer",
        "init_args": {"path": language, "pad_token": "[PAD]", "bos_token": "</s>"},
    }
    if is_t5:
        tokenizer = {"class_path": "vlm.prompts.T5Tokenizer", "init_args": {"path": language}}
    return {
        "class_path": _class(is_t5=is_t5),
        "init_args": {
            "vision": trained_beside(vision),
            "qformer": {"class_path": "vlm.connectors.QFormer", "init_args": reader},
            "qformer_tokenizer": {
                "class_path": "vlm.prompts.BertTokenizer",
                "init_args": {"path": "google-bert/bert-base-uncased", "added_tokens": ["[DEC]"]},
            },
            "connector": {"class_path": "vlm.connectors.Linear", "init_args": {}},
            "language": {
                "class_path": _language(is_t5=is_t5),
                "init_args": {"path": language, **({"config": LAVIS_T5} if is_t5 else {})},
            },
            "tokenizer": tokenizer,
            "template": "instructblip",
            "image": "squash",
        },
    }
