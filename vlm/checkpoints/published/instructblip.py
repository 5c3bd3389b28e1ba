"""InstructBLIP: Hugging Face's folders, whole, and LAVIS' files of the tensors that were trained."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.published.entries import Entries
from vlm.checkpoints.published.family import Load, PublishedFolder, Stream
from vlm.checkpoints.published.language_entries import read_language, read_t5
from vlm.checkpoints.published.one_folder import OneFolderFamily, OpenedFolder
from vlm.checkpoints.published.tokenizer_entries import describe_t5_tokenizer, describe_tokenizer
from vlm.checkpoints.tables.bert import bert_unused, qformer_hub_rules, qformer_rules
from vlm.checkpoints.tables.eva import eva_rules, eva_unused
from vlm.checkpoints.tables.rules import rename
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError

TOKENIZER = "qformer_tokenizer"
"""Folder of the Q-Former's tokenizer beside the weights."""
EVA = "eva_giant_patch14_clip_224"
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("instructblip",),
    "use_decoder_only_language_model": (True, False),
    "quantization_config": ({},),
}
_READ = frozenset({"vision_config", "qformer_config", "text_config", "num_query_tokens"})
_HARMLESS = frozenset({"image_token_index", "image_token_id", "is_composition", "tie_word_embeddings"})
_VISION_READ = frozenset(
    {"hidden_size", "image_size", "intermediate_size", "layer_norm_eps", "num_attention_heads", "num_hidden_layers"}
    | {"patch_size"}
)
_VISION_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "qkv_bias": (True,),
    "num_channels": (3,),
    **dict.fromkeys(("attention_dropout", "dropout", "drop_path_rate"), (0.0,)),
}
_VISION_HARMLESS = frozenset({"projection_dim"})
_BERT_READ = {
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "hidden_dropout_prob": "dropout",
    "layer_norm_eps": "norm_eps",
    "cross_attention_frequency": "cross_attention_every",
}
_BERT_ONLY: dict[str, tuple[Any, ...]] = {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",)}
_BERT_DEFAULTS = {"vocab_size": 30522, "cross_attention_frequency": 2}
_TRAINED = "Qformer.bert.embeddings.word_embeddings.weight"
"""Tensor of LAVIS' files."""
_PROJECTIONS = {"llama": "llm_proj", "t5": "t5_proj"}
"""How LAVIS calls the connector before each language model."""
LAVIS_T5 = {"dense_act_fn": "gelu"}
"""What LAVIS changes of FlanT5: its own file says `gelu_new`."""


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
        if layout not in ("auto", "official"):
            raise UserError(f"{path}: is in the official layout, not in {layout!r}")
        if target == "hf":
            raise UserError(f"{path}: holds no tower and no language model; convert it to ours, then that to hf")
        if vision is None or base is None:
            raise UserError(
                f"{path}: holds the tensors that were trained alone; say with --vision where eva_vit_g.pth lies and "
                "with --base where Vicuna or FlanT5 lies"
            )
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
            return opened
        table = self.table("official", opened.config)  # what was trained, and nothing beside it
        kept = {name: shape for name, shape in opened.shapes.items() if table.has_place(name)}
        stream = partial(_only, opened.stream, frozenset(kept))
        return replace(opened, shapes=kept, stream=stream, write_files=lambda _: None)

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
        known = frozenset({*_BERT_READ, "encoder_hidden_size", "attention_probs_dropout_prob", "pad_token_id"})
        Entries(known, _BERT_ONLY).check(bert, f"{file}: qformer_config")
        reader = {ours: ({**_BERT_DEFAULTS, **bert})[theirs] for theirs, ours in _BERT_READ.items() if theirs in bert}
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
        qformer, trunk, facts = module.arguments["qformer"], module.vision.trunk, module.tower
        block, language = trunk.blocks[0], module.language.config
        kind = language.model_type
        if layout == "official":
            return {"projection": _PROJECTIONS[kind]}
        text = {**language.to_dict(), "model_type": kind}
        if kind == "t5":
            text["tie_word_embeddings"] = language.scale_decoder_outputs
        return {
            "architectures": [self.hub_class],
            "model_type": "instructblip",
            "num_query_tokens": qformer.num_queries,
            "qformer_config": {
                "model_type": "instructblip_qformer",
                "encoder_hidden_size": facts.dim,
                "attention_probs_dropout_prob": qformer.dropout,
                "hidden_act": "gelu",
                **{theirs: getattr(qformer, ours) for theirs, ours in _BERT_READ.items()},
            },
            "text_config": text,
            "torch_dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
            "use_decoder_only_language_model": kind != "t5",
            "vision_config": {
                "model_type": "instructblip_vision_model",
                "hidden_act": "gelu",
                "hidden_size": facts.dim,
                "image_size": facts.image_size,
                "intermediate_size": block.mlp.fc1.out_features,
                "layer_norm_eps": block.norm1.eps,
                "num_attention_heads": block.attn.num_heads,
                "num_hidden_layers": facts.num_blocks,
                "patch_size": trunk.patch_embed.patch_size[0],
                "qkv_bias": True,
            },
        }

    def write_files(self, folder: Path, module: Any) -> None:
        super().write_files(folder, module)
        module.codec.reader.save(folder / TOKENIZER)
        side = module.tower.image_size
        content = {
            "image_processor_type": "BlipImageProcessor",
            "processor_class": "InstructBlipProcessor",
            "size": {"height": side, "width": side},
            "image_mean": list(module.codec.transform.mean),
            "image_std": list(module.codec.transform.std),
            "resample": 3,
            **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _only(stream: Stream, names: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in stream() if name in names)


def _class(*, is_t5: bool) -> str:
    return "vlm.systems.InstructBLIPT5" if is_t5 else "vlm.systems.InstructBLIP"


def _language(*, is_t5: bool) -> str:
    return "vlm.language.Seq2SeqLM" if is_t5 else "vlm.language.CausalLM"


def _describe_trained(
    shapes: Mapping[str, tuple[int, ...]], *, is_t5: bool, vision: str, language: str
) -> dict[str, Any]:
    """The paper's network around a file of LAVIS', as large as its tensors say."""
    words = shapes["qformer.embeddings.words.weight"]
    reader = {
        "dim": words[1],
        "num_layers": len([name for name in shapes if name.endswith(".query_mlp.fc1.bias")]),
        "num_heads": words[1] // 64,
        "mlp_dim": shapes["qformer.layers.0.query_mlp.fc1.bias"][0],
        "vocab_size": words[0],
        "max_positions": shapes["qformer.embeddings.positions.weight"][0],
        "num_queries": shapes["qformer.queries"][1],
        "text": True,
    }
    tokenizer: dict[str, Any] = {
        "class_path": "vlm.prompts.LlamaTokenizer",
        "init_args": {"path": language, "pad_token": "[PAD]", "bos_token": "</s>"},
    }
    if is_t5:
        tokenizer = {"class_path": "vlm.prompts.T5Tokenizer", "init_args": {"path": language}}
    return {
        "class_path": _class(is_t5=is_t5),
        "init_args": {
            "vision": {
                "class_path": "vlm.vision.TimmTower",
                "init_args": {"name": EVA, "layer": -2, "class_token": True, "weights": vision},
            },
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


def describe_tower(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """EVA-CLIP-g as the `vision_config` of BLIP-2's descendants has it."""
    Entries(_VISION_READ, _VISION_ONLY, _VISION_HARMLESS).check(config, f"{file}: vision_config")
    size: dict[str, Any] = {
        "hidden_size": 1408,
        "image_size": 224,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
    }
    size |= {"num_hidden_layers": 39, "patch_size": 14, "layer_norm_eps": 1e-6, **config}
    return {
        "class_path": "vlm.vision.TimmTower",
        "init_args": {
            "name": EVA,
            "layer": -2,
            "class_token": True,
            "norm_eps": size["layer_norm_eps"],
            "options": {
                "img_size": size["image_size"],
                "patch_size": size["patch_size"],
                "embed_dim": size["hidden_size"],
                "depth": size["num_hidden_layers"] + 1,  # the last block is not there, and not computed
                "num_heads": size["num_attention_heads"],
                "mlp_ratio": size["intermediate_size"] / size["hidden_size"],
            },
        },
    }
