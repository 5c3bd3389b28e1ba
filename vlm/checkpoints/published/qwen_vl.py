"""Qwen-VL and Qwen-VL-Chat: the published files, whose language model is Qwen-7B in names of its own.

In them each head of the tower has its q, k and v together, the language model's q, k and v are one tensor, `w2` is the
gate and `w1` what it opens, and `intermediate_size` counts both.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from vlm.checkpoints.published.entries import Entries, read_json
from vlm.checkpoints.published.one_folder import OneFolderFamily
from vlm.checkpoints.published.tokenizer_entries import starts_with_bos
from vlm.checkpoints.tables.qwen import language_rules
from vlm.checkpoints.tables.rules import Axes, PerHead, Rule, rename
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError
from vlm.language.qwen import as_qwen2

_READ = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "seq_length"),
        *("layer_norm_epsilon", "rotary_emb_base"),
    }
)
_ONLY: dict[str, tuple[Any, ...]] = {
    "no_bias": (True,),
    "rotary_pct": (1.0,),
    "scale_attn_weights": (True,),
    "tie_word_embeddings": (False,),
    "attn_dropout_prob": (0.0,),
    "emb_dropout_prob": (0.0,),
    "resid_pdrop": (0.0,),
    "use_cache_quantization": (False,),
    "quantization_config": ({},),
}
_HARMLESS = frozenset(
    {
        # how it is computed, and not what
        *("bf16", "fp16", "fp32", "onnx_safe", "use_flash_attn", "softmax_in_fp32", "use_cache_kernel"),
        *("use_dynamic_ntk", "use_logn_attn"),  # 1 up to `seq_length`, and no sample is longer
        *("max_position_embeddings", "tokenizer_type"),
        "visual",  # of the tower, which checks it
    }
)
_VISUAL_READ = frozenset(
    {
        *("heads", "image_size", "layers", "mlp_ratio", "n_queries", "patch_size", "width"),
        *("resampler_heads", "position_grid"),  # ours
    }
)
_GRID = 16
"""Side of the table of positions: a constant of the published code, the grid at 224 px."""
_VISUAL = "transformer.visual."
_BLOCK = "transformer.visual.transformer.resblocks.{i}."
_POOL = "transformer.visual.attn_pool."
_TRUNK = "vision.trunk.blocks.{i}."


class QwenVLFamily(OneFolderFamily):
    system = "qwen_vl"
    marks: ClassVar = {"official": _POOL + "query"}
    files = (
        "qwen.tiktoken",
        "tokenizer_config.json",
        "tokenizer.json",
        "generation_config.json",
        "SimSun.ttf",
    )

    def is_own(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type", "qwen") == "qwen"

    def table(self, layout: str, config: Mapping[str, Any]) -> Table:
        return Table(layout="Qwen-VL", rules=(*_vision_rules(_visual(config)["heads"]), *language_rules("language.")))

    def describe_folder(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        visual = _visual(config)
        file = folder / "config.json"
        check_qwen(config, file)
        # the first token of an image, which the tokenizer has too
        known = Entries(_VISUAL_READ, {"output_dim": (config["hidden_size"],)}, frozenset({"image_start_id"}))
        known.check(config["visual"], f"{file}: visual")
        kinds = {"qwen.tiktoken": "QwenTokenizer", "tokenizer.json": "HubTokenizer"}
        found = next((kind for name, kind in kinds.items() if (folder / name).is_file()), None)
        if found is None:
            raise UserError(f"{folder}: has neither {' nor '.join(kinds)}; put the tokenizer's files beside")
        tokenizer: dict[str, Any] = {"path": str(folder)}
        if found == "HubTokenizer" and starts_with_bos(folder):
            tokenizer["add_bos"] = True
        tower = {
            "name": "vit_gigantic_patch14_clip_224",
            "layer": -1,
            "weights": None,
            "position_grid": visual.get("position_grid", _GRID),
            "norm_eps": 1e-6,
            "options": {
                "class_token": False,
                "global_pool": "avg",
                "img_size": visual["image_size"],
                "patch_size": visual["patch_size"],
                "embed_dim": visual["width"],
                "depth": visual["layers"],
                "num_heads": visual["heads"],
                "mlp_ratio": visual["mlp_ratio"],
            },
        }
        resampler = {"num_queries": visual["n_queries"], "num_heads": visual.get("resampler_heads")}
        return {
            "class_path": "vlm.systems.QwenVL",
            "init_args": {
                "vision": {"class_path": "vlm.vision.TimmTower", "init_args": tower},
                "connector": {"class_path": "vlm.connectors.Resampler", "init_args": resampler},
                "language": {"class_path": "vlm.language.CausalLM", "init_args": {"config": as_qwen2(config)}},
                "tokenizer": {"class_path": f"vlm.prompts.{found}", "init_args": tokenizer},
                "template": "qwen_vl_chat" if _is_chat(folder) else "qwen_vl",
                "image": "squash",
                "max_tokens": config.get("seq_length", 2048),
            },
        }

    def config(self, module: Any, layout: str) -> dict[str, Any]:
        language, trunk, facts = module.language.config, module.vision.trunk, module.tower
        block = trunk.blocks[0]
        # the published code has heads of 128 channels whatever its files say; ours asks
        num_heads = module.connector.attention.num_heads
        own = {} if num_heads == language.hidden_size // 128 else {"resampler_heads": num_heads}
        grid = math.isqrt(trunk.pos_embed.shape[1])
        own |= {} if grid == _GRID else {"position_grid": grid}  # the same of the positions
        return {
            "architectures": ["QWenLMHeadModel"],
            "auto_map": {
                "AutoConfig": "configuration_qwen.QWenConfig",
                "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
            },
            "hidden_size": language.hidden_size,
            "intermediate_size": 2 * language.intermediate_size,
            "kv_channels": language.hidden_size // language.num_attention_heads,
            "layer_norm_epsilon": language.rms_norm_eps,
            "model_type": "qwen",
            "no_bias": True,
            "num_attention_heads": language.num_attention_heads,
            "num_hidden_layers": language.num_hidden_layers,
            "rotary_emb_base": int(language.rope_parameters["rope_theta"]),
            "rotary_pct": 1.0,
            "scale_attn_weights": True,
            "seq_length": language.max_position_embeddings,
            "tie_word_embeddings": False,
            "tokenizer_type": "QWenTokenizer",
            "torch_dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
            "use_dynamic_ntk": True,
            "use_logn_attn": True,
            "visual": own
            | {
                "heads": block.attn.num_heads,
                "image_size": facts.image_size,
                "layers": facts.num_blocks,
                "mlp_ratio": block.mlp.fc1.out_features / facts.dim,
                "n_queries": module.codec.tower.num_tokens,
                "output_dim": language.hidden_size,
                "patch_size": trunk.patch_embed.patch_size[0],
                "width": facts.dim,
            },
            "vocab_size": language.vocab_size,
        }

    def write_files(self, folder: Path, module: Any) -> None:
        super().write_files(folder, module)
        chat_format = "chatml" if module.codec.template.name.startswith("qwen_vl_chat") else "raw"
        (folder / "generation_config.json").write_text(json.dumps({"chat_format": chat_format}, indent=2) + "\n")


def _vision_rules(num_heads: int) -> tuple[Rule, ...]:
    return (
        rename(_VISUAL + "conv1.weight", "vision.trunk.patch_embed.proj.weight"),
        Axes(theirs=(_VISUAL + "positional_embedding",), ours=("vision.trunk.pos_embed",), form="N D -> 1 N D"),
        rename(_VISUAL + "ln_pre.{p}", "vision.trunk.norm_pre.{p}"),
        rename(_BLOCK + "ln_1.{p}", _TRUNK + "norm1.{p}"),
        PerHead(theirs=(_BLOCK + "attn.in_proj.{p}",), ours=(_TRUNK + "attn.qkv.{p}",), num_heads=num_heads),
        rename(_BLOCK + "attn.out_proj.{p}", _TRUNK + "attn.proj.{p}"),
        rename(_BLOCK + "ln_2.{p}", _TRUNK + "norm2.{p}"),
        rename(_BLOCK + "mlp.c_fc.{p}", _TRUNK + "mlp.fc1.{p}"),
        rename(_BLOCK + "mlp.c_proj.{p}", _TRUNK + "mlp.fc2.{p}"),
        rename(_POOL + "query", "connector.query"),
        rename(_POOL + "pos_embed", "connector.positions"),
        rename(_POOL + "kv_proj.weight", "connector.kv_proj.weight"),
        rename(_POOL + "ln_q.{p}", "connector.norm_q.{p}"),
        rename(_POOL + "ln_kv.{p}", "connector.norm_kv.{p}"),
        rename(_POOL + "attn.in_proj_weight", "connector.attention.in_proj_weight"),
        rename(_POOL + "attn.in_proj_bias", "connector.attention.in_proj_bias"),
        rename(_POOL + "attn.out_proj.{p}", "connector.attention.out_proj.{p}"),
        rename(_VISUAL + "ln_post.{p}", "connector.norm_out.{p}"),
        Axes(theirs=(_VISUAL + "proj",), ours=("connector.proj.weight",), form="I O -> O I"),
    )


def _visual(config: Mapping[str, Any]) -> dict[str, Any]:
    visual = config.get("visual")
    if not isinstance(visual, dict):
        raise UserError("config.json: has no `visual` with the tower's sizes; is it the file of these weights?")
    return {"n_queries": 256, "patch_size": 14, "mlp_ratio": 4.9231, **visual}


def check_qwen(config: Mapping[str, Any], file: Path) -> None:
    """Refuses a `config.json` of Qwen-7B's code that says what `as_qwen2` does not do."""
    per_head = config["hidden_size"] // config["num_attention_heads"]
    Entries(_READ, _ONLY | {"kv_channels": (per_head,)}, _HARMLESS).check(config, file)


def _is_chat(folder: Path) -> bool:
    """Whether a folder's model is spoken to in ChatML, as its `generation_config.json` says."""
    return (read_json(folder / "generation_config.json") or {}).get("chat_format") == "chatml"
