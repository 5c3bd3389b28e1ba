"""InternLM-XComposer: the published files, which hold the adapter of the language model beside its weights, unmerged.

Half of the tensors are in half precision and the others, the adapter among them, are not; each keeps its type.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from vlm.checkpoints.published.entries import Entries, read_json
from vlm.checkpoints.published.one_folder import OneFolderFamily
from vlm.checkpoints.published.tokenizer_entries import starts_with_bos
from vlm.checkpoints.tables.bert import bert_unused, qformer_rules
from vlm.checkpoints.tables.rules import rename
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError
from vlm.language import PeftAdapter
from vlm.language.adapters import ADAPTER
from vlm.language.llama_settings import llama_settings
from vlm.prompts.xcomposer import EOA, EOH

_LANGUAGE = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("max_position_embeddings", "rms_norm_eps"),
    }
)
_READ = _LANGUAGE | {"num_query_token", "internlm_lora", "vision", "perceive_sampler"}  # the last two are ours
_LANGUAGE_ONLY: dict[str, tuple[Any, ...]] = {
    "bias": (True,),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
}
_ONLY = _LANGUAGE_ONLY | {"kqvo_bias": (True,), "intern_converted_llm": (True,)}
_HARMLESS = frozenset({"device", "num_quant", "lora_cfg"})  # the second copy of `internlm_lora`, which counts
_TARGETS = {"q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "o": ("o_proj",), "ffn": ("up_proj", "down_proj")}
# what no config.json says: constants of the published code
_VISION = {"img_size": 224, "patch_size": 14, "embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 6144 / 1408}
_SAMPLER = {"dim": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072}
_LORA = "layers.{i}.{rest}.lora_"
_TABLE = Table(
    layout="InternLM-XComposer",
    rules=(
        rename("visual_encoder.{rest}", "vision.trunk.{rest}"),
        *qformer_rules(text=False),
        rename("Qformer.bert.embeddings.position_ids", "qformer.position_ids", optional=True),
        rename("internlm_proj.{p}", "connector.{p}"),
        rename("flag_image_start", "connector.start"),
        rename("flag_image_end", "connector.end"),
        rename("internlm_model.model.layers.{i}.self_attn.rotary_emb.inv_freq", None),
        *(
            rename(
                f"internlm_model.model.{_LORA}{half}.weight",
                f"language.model.{_LORA}{half}.{ADAPTER}.weight",
                optional=True,
            )
            for half in "AB"
        ),
        rename("internlm_model.{rest}", "language.{rest}"),
    ),
    unused=bert_unused(ours="qformer."),
    sparse=("qformer.layers.{i}.cross_attention.{rest}",),
)


class XComposerFamily(OneFolderFamily):
    system = "xcomposer"
    holds_adapter = True
    marks: ClassVar = {"official": "internlm_proj.weight"}
    files = (
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    )

    def is_own(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type", "InternLMXComposer") == "InternLMXComposer"

    def table(self, layout: str, config: Mapping[str, Any]) -> Table:
        return _TABLE

    def surgery_of(self, config: Mapping[str, Any]) -> list[dict[str, Any]]:
        lora = config.get("internlm_lora")
        if not lora:
            return []
        unknown = [name for name in lora["learn_param"] if name not in _TARGETS]
        if unknown:
            raise UserError(
                f"config.json: internlm_lora has {unknown[0]!r}, and only {', '.join(_TARGETS)} is known here"
            )
        settings = {
            "rank": lora["lora_r"],
            "alpha": float(lora["lora_alpha"]),
            "targets": [target for name in lora["learn_param"] for target in _TARGETS[name]],
            "dropout": lora["lora_dropout"],
            "parts": ["language"],
        }
        return [{"class_path": "vlm.language.PeftAdapter", "init_args": settings}]

    def describe_folder(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        Entries(_READ, _ONLY, _HARMLESS).check(config, folder / "config.json")
        sampler = _SAMPLER | (config.get("perceive_sampler") or {})
        tower = {
            "name": "eva_giant_patch14_clip_224",
            "layer": -2,
            "class_token": True,
            "weights": None,
            "options": _VISION | (config.get("vision") or {}),
        }
        # of the two releases one was taught more tokens, and is not told who it is
        is_vl = (folder / "added_tokens.json").is_file()
        return {
            "class_path": "vlm.systems.XComposer",
            "init_args": {
                "vision": {"class_path": "vlm.vision.TimmTower", "init_args": tower},
                "qformer": {
                    "class_path": "vlm.connectors.QFormer",
                    "init_args": sampler | {"num_queries": config["num_query_token"]},
                },
                "connector": {"class_path": "vlm.connectors.FlaggedLinear", "init_args": {}},
                "language": {
                    "class_path": "vlm.language.CausalLM",
                    "init_args": {"config": llama_settings(config, attention_bias=True)},
                },
                "tokenizer": describe_tokenizer(folder, marks=(EOH, EOA)),
                "template": "xcomposer_vl" if is_vl else "xcomposer",
                "image": "squash",
                "max_tokens": config["max_position_embeddings"],
            },
        }

    def config(self, module: Any, layout: str) -> dict[str, Any]:
        language, trunk, qformer = module.language.config, module.vision.trunk, module.arguments["qformer"]
        block = trunk.blocks[0]
        vision = {
            "img_size": module.tower.image_size,
            "patch_size": trunk.patch_embed.patch_size[0],
            "embed_dim": module.tower.dim,
            "depth": module.tower.num_blocks + 1,
            "num_heads": block.attn.num_heads,
            "mlp_ratio": block.mlp.fc1.out_features / module.tower.dim,
        }
        sampler = {name: getattr(qformer, name) for name in _SAMPLER}
        own = {} if vision == _VISION else {"vision": vision}
        own |= {} if sampler == _SAMPLER else {"perceive_sampler": sampler}
        return {
            "architectures": ["InternLMXComposerForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_InternLM_XComposer.InternLMXComposerConfig",
                "AutoModel": "modeling_InternLM_XComposer.InternLMXComposerForCausalLM",
                "AutoModelForCausalLM": "modeling_InternLM_XComposer.InternLMXComposerForCausalLM",
            },
            "bias": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": language.hidden_size,
            "intermediate_size": language.intermediate_size,
            "intern_converted_llm": True,
            "internlm_lora": _lora_of(module),
            "kqvo_bias": True,
            "max_position_embeddings": language.max_position_embeddings,
            "model_type": "InternLMXComposer",
            "num_attention_heads": language.num_attention_heads,
            "num_hidden_layers": language.num_hidden_layers,
            "num_query_token": qformer.num_queries,
            "rms_norm_eps": language.rms_norm_eps,
            "tie_word_embeddings": False,
            "vocab_size": language.vocab_size,
            **own,
        }


def check_internlm(config: Mapping[str, Any], file: Path) -> None:
    """Refuses a `config.json` of InternLM-7B's code that says what `llama_settings` does not do."""
    # `rotary` scales positions behind `max_position_embeddings`, and no sample is longer
    Entries(_LANGUAGE, _LANGUAGE_ONLY, frozenset({"rotary"})).check(config, file)


def describe_tokenizer(folder: Path, *, marks: Sequence[str]) -> dict[str, Any]:
    """`tokenizer.model` with the tokens that files add to it; of a folder that was written here, its `tokenizer.json`.

    Args:
        marks: of a turn; the model has them, and text that spells them is text.

    Raises:
        UserError: there is neither.
    """
    if (folder / "tokenizer.json").is_file():
        settings: dict[str, Any] = {"add_bos": starts_with_bos(folder), "added_tokens": [*marks]}
        return {"class_path": "vlm.prompts.HubTokenizer", "init_args": {"path": str(folder), **settings}}
    if not (folder / "tokenizer.model").is_file():
        raise UserError(f"{folder}: has no tokenizer.model; put the tokenizer's files beside")
    added = read_json(folder / "added_tokens.json") or {}
    settings = {"added_tokens": [*marks, *sorted(added, key=added.__getitem__)], "pad_token": "</s>"}
    return {"class_path": "vlm.prompts.LlamaTokenizer", "init_args": {"path": str(folder), **settings}}


def _lora_of(module: Any) -> dict[str, Any] | None:
    """The entry of an adapter.

    Raises:
        UserError: one that the published code cannot have.
    """
    adapters = [operation for operation in module.surgery if isinstance(operation, PeftAdapter)]
    if not adapters:
        return None
    names = [name for name, targets in _TARGETS.items() if {*targets} <= {*adapters[0].targets}]
    known = {target for name in names for target in _TARGETS[name]}
    if len(adapters) > 1 or adapters[0].dora or adapters[0].parts != ("language",) or known != {*adapters[0].targets}:
        raise UserError(
            f"{adapters[0]}: the published code has one adapter, of {', '.join(_TARGETS)} of the language model; use "
            "the artefact itself"
        )
    return {
        "freeze": False,
        "learn_param": names,
        "lora_alpha": int(adapters[0].alpha),
        "lora_dropout": adapters[0].dropout,
        "lora_r": adapters[0].rank,
    }
