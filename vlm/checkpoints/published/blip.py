"""BLIP's published folders: the official `.pth`, beside which nothing lies, and Hugging Face's classes.

Which network a folder holds is said by the names of its tensors, and goes into its settings as `architectures`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.published.blip_pairs import complete
from vlm.checkpoints.published.entries import Entries, read_json, refusal
from vlm.checkpoints.published.family import Load, PublishedFolder, as_dtype
from vlm.checkpoints.published.one_folder import OneFolderFamily, OpenedFolder
from vlm.checkpoints.report import LoadReport
from vlm.checkpoints.tables.blip import caption_table, nlvr_table, pair_table, vqa_table
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError
from vlm.vision.preprocess import CLIP_MEAN, CLIP_STD

_CAPTION, _VQA, _NLVR = "BlipForConditionalGeneration", "BlipForQuestionAnswering", "BLIP_NLVR"
_RETRIEVAL, _PRETRAIN = "BlipForImageTextRetrieval", "BLIP_Pretrain"
_HEAD_DIM = 64
"""Of every attention of a published BLIP; an official file says no more."""
_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_VISION |= {"image_size": 384, "patch_size": 16}
_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 8}
_TEXT |= {"vocab_size": 30524, "max_position_embeddings": 512, "encoder_hidden_size": 768}
_HF_EPS, _OFFICIAL_EPS, _BERT_EPS = 1e-5, 1e-6, 1e-12
_ONLY: dict[str, tuple[Any, ...]] = {"hidden_act": ("gelu",), "num_channels": (3,), "quantization_config": ({},)}
_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_VISION_HARMLESS = frozenset({"projection_dim", "attention_dropout", "dropout", "initializer_factor"})
_TEXT_HARMLESS = frozenset(
    {"projection_dim", "label_smoothing", "tie_word_embeddings", "type_vocab_size", "encoder_width", "fusion_layer"}
)
_OWN_HARMLESS = frozenset(
    {"logit_scale_init_value", "image_text_hidden_size", "projection_dim", "text_config_dict", "vision_config_dict"}
    | {"label_smoothing", "tie_word_embeddings", "queue_size"}
)


@dataclass(frozen=True)
class Kind:
    """One of the networks.

    Attributes:
        class_path: of ours.
        table: of a layout.
        texts: {part: the arguments of its description that say what it is for}.
        layouts: it is published in.
        described_by: class in `vlm.language` of the parts' descriptions.
        pairs: further arguments of one that compares images with texts; None: it does not.
    """

    class_path: str
    table: Callable[[str], Table]
    texts: Mapping[str, Mapping[str, Any]]
    layouts: tuple[str, ...] = ("official", "hf")
    described_by: str = "Med"
    pairs: Mapping[str, Any] | None = None


_WRITES, _READS = {"encoder": False}, {"decoder": False}
KINDS: Mapping[str, Kind] = {
    _CAPTION: Kind("vlm.systems.BLIPCaption", caption_table, {"language": _WRITES}),
    _VQA: Kind("vlm.systems.BLIPVQA", vqa_table, {"encoder": _READS, "language": _WRITES}),
    _NLVR: Kind("vlm.systems.BLIPNLVR", lambda _: nlvr_table(), {"language": {}}, ("official",), "PairMed"),
    _RETRIEVAL: Kind(
        "vlm.systems.BLIP",
        partial(pair_table, writes=False, same_image=True),
        {"language": _READS},
        pairs={"same_image": True, "max_tokens": 35},
    ),
    _PRETRAIN: Kind(
        "vlm.systems.BLIP",
        partial(pair_table, writes=True, same_image=False),
        {"language": {}},
        ("official",),
        pairs={"max_tokens": 30},
    ),
}
"""By the name in `architectures`: Hugging Face's class, or the official one where there is none."""


class BLIPFamily(OneFolderFamily):
    system = "blip"
    marks: ClassVar = {"official": "visual_encoder.cls_token", "hf": "vision_model.embeddings.class_embedding"}
    hub_class = _CAPTION
    looks_for = "visual_encoder or vision_model beside text_encoder or text_decoder"
    files = (
        "vocab.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "preprocessor_config.json",
        "processor_config.json",
        "generation_config.json",
    )

    def is_own(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type", "blip") == "blip"

    def claims(self, folder: PublishedFolder) -> bool:
        return super().claims(folder) and _kind_of(folder.keys) is not None

    def table(self, layout: str, config: Mapping[str, Any]) -> Table:
        kind = _kind(config)
        if layout not in kind.layouts:
            raise UserError(f"{self.system}: no class of Hugging Face's holds {_name(config)}; use --to official")
        return kind.table(layout)

    def read_config(self, files: WeightFiles, path: str | Path) -> dict[str, Any]:
        keys = files.keys()
        name = _kind_of(keys)
        if name is None:
            raise UserError(f"{path}: has neither text_encoder nor text_decoder; is it {self.system}? Check --system")
        found = read_json(files.folder / "config.json")
        if found is None and KINDS[name].pairs is not None:
            found = _derived(files.shapes()) | _compared(files.shapes())
        return (_derived(files.shapes()) if found is None else found) | {"architectures": [name]}

    def describe_folder(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        file, kind = folder / "config.json", _kind(config)
        vision, text = (_entries(config, part, file) for part in ("vision_config", "text_config"))
        Entries(frozenset({"vision_config", "text_config"}), {}, _OWN_HARMLESS).check(config, file)
        _check_pixels(folder, vision["image_size"])
        if len(dropouts := {text.get(key, 0.0) for key in _DROPOUT}) > 1:
            raise UserError(f"{file}: {' and '.join(_DROPOUT)} differ, and are one number here; make them the same")
        if (width := text["encoder_hidden_size"]) != vision["hidden_size"]:
            raise refusal(file, "encoder_hidden_size", width, expected=(vision["hidden_size"],))
        described = {
            "dim": text["hidden_size"],
            "num_layers": text["num_hidden_layers"],
            "num_heads": text["num_attention_heads"],
            "mlp_dim": text["intermediate_size"],
            "vocab_size": text["vocab_size"],
            "max_positions": text["max_position_embeddings"],
            "dropout": dropouts.pop(),
            "norm_eps": text.get("layer_norm_eps", _BERT_EPS),
        }
        tower = {
            "name": "vit_base_patch16_224",
            "class_token": True,
            "final_norm": True,
            "norm_eps": vision.get("layer_norm_eps", _HF_EPS),
            "options": {
                "img_size": vision["image_size"],
                "patch_size": vision["patch_size"],
                "embed_dim": vision["hidden_size"],
                "depth": vision["num_hidden_layers"],
                "num_heads": vision["num_attention_heads"],
                "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
            },
        }
        if not (folder / "vocab.txt").is_file():
            raise UserError(f"{folder}: has no vocab.txt; put that of bert-base-uncased beside the weights")
        texts = {
            part: {"class_path": f"vlm.language.{kind.described_by}", "init_args": {**described, **role}}
            for part, role in kind.texts.items()
        }
        return {
            "class_path": kind.class_path,
            "init_args": {
                "vision": {"class_path": "vlm.vision.TimmTower", "init_args": tower},
                **texts,
                "tokenizer": {"class_path": "vlm.prompts.BertTokenizer", "init_args": {"path": str(folder)}},
                "max_tokens": text["max_position_embeddings"],
                **({} if kind.pairs is None else {**kind.pairs, **_pair_sizes(config)}),
            },
        }

    def open(self, path: str | Path, **options: Any) -> OpenedFolder:  # type: ignore[override]
        opened: OpenedFolder = super().open(path, **options)
        return opened if _kind(opened.config).pairs is None else complete(opened)

    def carried(self, opened: OpenedFolder) -> Callable[[str], bool]:
        return lambda name: name.endswith("position_ids")

    def config(self, module: Any, layout: str) -> dict[str, Any]:
        facts, text = module.tower, module.arguments["language"]
        names = [name for name, kind in KINDS.items() if kind.class_path.endswith(f".{type(module).__name__}")]
        compares = KINDS[names[0]].pairs is not None
        name = _PRETRAIN if compares and text.decoder else names[0]
        trunk = module.vision.trunk
        return {
            "architectures": [name],
            "model_type": "blip",
            "vision_config": {
                "model_type": "blip_vision_model",
                "hidden_size": facts.dim,
                "intermediate_size": trunk.blocks[0].mlp.fc1.out_features,
                "num_hidden_layers": facts.depth,
                "num_attention_heads": trunk.blocks[0].attn.num_heads,
                "image_size": facts.image_size,
                "patch_size": trunk.patch_embed.patch_size[0],
                "layer_norm_eps": trunk.norm.eps,
                "hidden_act": "gelu",
            },
            "text_config": {
                "model_type": "blip_text_model",
                "hidden_size": text.dim,
                "encoder_hidden_size": facts.dim,
                "intermediate_size": text.mlp_dim,
                "num_hidden_layers": text.num_layers,
                "num_attention_heads": text.num_heads,
                "vocab_size": text.vocab_size,
                "max_position_embeddings": text.max_positions,
                "layer_norm_eps": text.norm_eps,
                "hidden_act": "gelu",
                **dict.fromkeys(_DROPOUT, text.dropout),
                "bos_token_id": module.codec.tokenizer.token_id("[DEC]"),
                "sep_token_id": module.codec.end_id,
                "eos_token_id": module.codec.end_id,
                "pad_token_id": module.codec.tokenizer.pad_id,
            },
            **(
                {"image_text_hidden_size": module.arguments["dim"], "queue_size": module.arguments["queue"]}
                if compares
                else {}
            ),
            "torch_dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
        }

    def write_files(self, folder: Path, module: Any) -> None:
        super().write_files(folder, module)
        side = module.tower.image_size
        content = {
            "image_processor_type": "BlipImageProcessor",
            "processor_class": "BlipProcessor",
            "do_resize": True,
            "size": {"height": side, "width": side},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
            "do_convert_rgb": True,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def export(self, folder: Path, path: str, *, dtype: torch.dtype | None, load: Load) -> LoadReport:
        opened: OpenedFolder = self.open_artefact(path, target="hf", load=load)
        self.table("hf", opened.config)  # before anything is written
        written = OpenedFolder(
            opened.shapes, as_dtype(opened.stream, dtype), "hf", opened.config, opened.model, opened.write_files
        )
        return self.fill(folder, written, target="hf")


def _kind_of(keys: Iterable[str]) -> str | None:
    """The network whose tensors have these names."""
    parts = {key.partition(".")[0] for key in keys}
    if "cls_head" in parts:
        return _NLVR
    if "itm_head" in parts:
        return _PRETRAIN if "text_decoder" in parts else _RETRIEVAL
    if "text_decoder" in parts:
        return _VQA if "text_encoder" in parts else _CAPTION
    return None


def _name(config: Mapping[str, Any]) -> str:
    return str(config["architectures"][0])


def _kind(config: Mapping[str, Any]) -> Kind:
    return KINDS[_name(config)]


def _derived(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The `config.json` that an official file would have; its code has these numbers of heads and this epsilon."""
    side = int((shapes["visual_encoder.pos_embed"][1] - 1) ** 0.5)
    patch = shapes["visual_encoder.patch_embed.proj.weight"][-1]
    words = next(name for name in shapes if name.endswith("embeddings.word_embeddings.weight"))
    text = words.removesuffix("embeddings.word_embeddings.weight")

    def depth(prefix: str) -> int:
        return 1 + max(int(name[len(prefix) :].split(".")[0]) for name in shapes if name.startswith(prefix))

    vocabulary, hidden = shapes[words]
    width = shapes["visual_encoder.pos_embed"][2]
    return {
        "model_type": "blip",
        "vision_config": {
            "hidden_size": width,
            "intermediate_size": shapes["visual_encoder.blocks.0.mlp.fc1.weight"][0],
            "num_hidden_layers": depth("visual_encoder.blocks."),
            "num_attention_heads": width // _HEAD_DIM,
            "image_size": side * patch,
            "patch_size": patch,
            "layer_norm_eps": _OFFICIAL_EPS,
        },
        "text_config": {
            "hidden_size": hidden,
            "intermediate_size": shapes[f"{text}encoder.layer.0.intermediate.dense.weight"][0],
            "num_hidden_layers": depth(f"{text}encoder.layer."),
            "num_attention_heads": hidden // _HEAD_DIM,
            "vocab_size": vocabulary,
            "max_position_embeddings": shapes[f"{text}embeddings.position_embeddings.weight"][0],
            "encoder_hidden_size": width,
            **dict.fromkeys(_DROPOUT, 0.1),
        },
    }


def _compared(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What else the `config.json` of an official file would say where images are compared with texts."""
    size = {"image_text_hidden_size": shapes["vision_proj.weight"][0]}
    return size | ({"queue_size": shapes["image_queue"][1]} if "image_queue" in shapes else {})


def _pair_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"dim": config.get("image_text_hidden_size", 256), "queue": config.get("queue_size", 57600)}


def _entries(config: Mapping[str, Any], part: str, file: Path) -> dict[str, Any]:
    """The settings of a part, with what a file leaves out when it is the default of transformers' class."""
    defaults, harmless = (_VISION, _VISION_HARMLESS) if part == "vision_config" else (_TEXT, _TEXT_HARMLESS)
    stated = config.get(part) or {}
    Entries(frozenset({*defaults, *_DROPOUT, "layer_norm_eps"}), _ONLY, harmless).check(stated, file)
    return defaults | {key: value for key, value in stated.items() if value is not None}


def _check_pixels(folder: Path, side: int) -> None:
    """Refuses images that are made otherwise than ours: squashed to a square, in CLIP's mean and deviation."""
    file = folder / "preprocessor_config.json"
    only: dict[str, tuple[Any, ...]] = {
        "image_mean": (CLIP_MEAN,),
        "image_std": (CLIP_STD,),
        "resample": (3,),
        "rescale_factor": (1 / 255,),
        "size": ({"height": side, "width": side}, side),
        **dict.fromkeys(("do_rescale", "do_normalize", "do_resize"), (True,)),
        **dict.fromkeys(("do_pad", "do_center_crop"), (False,)),
    }
    harmless = frozenset({"do_convert_rgb", "image_processor_type", "processor_class", "size_divisor", "backend"})
    harmless |= {"data_format", "feature_extractor_type"}
    Entries(frozenset(), only, harmless).check(read_json(file) or {}, file)
