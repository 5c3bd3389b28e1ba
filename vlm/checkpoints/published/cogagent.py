"""CogAgent: the published files, CogVLM's with a fine tower, tables of places and a cross-attention in every layer.

The tower's last block, its norm and its head lie in the files and are never computed with: they are carried.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from vlm.checkpoints.published.cogvlm import LANGUAGE_ONLY, LANGUAGE_READ, SAT_FINE, CogVLMFamily
from vlm.checkpoints.published.entries import Entries
from vlm.checkpoints.tables.cog_sat import sat_rules
from vlm.checkpoints.tables.cogagent import cross_rules, cross_unused
from vlm.checkpoints.tables.cogvlm import VISION_UNUSED, language_rules, vision_rules
from vlm.checkpoints.tables.table import Table
from vlm.errors import UserError

_CROSS = frozenset({"cross_hidden_size", "cross_compute_hidden_size", "cross_image_size"})
_READ = LANGUAGE_READ | _CROSS | {"cross_vision"}  # the last one is ours
# what no config.json says: constants of the published code
_TOWER = {"patch_size": 14, "depth": 24, "head_dim": 64, "mlp_ratio": 2.6667, "ref_grid": 16}


class CogAgentFamily(CogVLMFamily):
    system = "cogagent"
    marks: ClassVar = {"official": "model.cross_vision.pos_embed", "sat": SAT_FINE}
    templates: ClassVar = {"chat": "cogvlm_chat", "chat_old": "cogvlm_chat_old", "base": "cogvlm_base"}
    versions: ClassVar = {"chat": "chat", "chat_old": "chat_old", "base": "base"}
    is_fine: ClassVar = True

    def is_own(self, config: Mapping[str, Any]) -> bool:
        return "vision_config" in config and "cross_hidden_size" in config

    def table(self, layout: str, config: Mapping[str, Any]) -> Table:
        rules = (*cross_rules(), *vision_rules(), *language_rules())
        return Table(
            layout="CogAgent",
            rules=sat_rules(rules) if layout == "sat" else rules,
            unused=(*VISION_UNUSED, *cross_unused(num_blocks=_tower(config)["depth"] - 1)),
        )

    def surgery_of(self, config: Mapping[str, Any]) -> list[dict[str, Any]]:
        settings = {
            "context": config["cross_hidden_size"],
            "width": config["cross_compute_hidden_size"],
            "heads": config["num_attention_heads"],
        }
        return [*super().surgery_of(config), {"class_path": "vlm.language.CrossAttention", "init_args": settings}]

    def describe_folder(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        file = folder / "config.json"
        Entries(_READ, LANGUAGE_ONLY).check(config, file)
        if missing := sorted(_CROSS - config.keys()):
            raise UserError(f"{file}: has no {missing[0]}, which CogAgent's network is made by")
        fine = {
            "vision_high": {"class_path": "vlm.vision.TimmTower", "init_args": describe_fine_tower(config)},
            "cross_width": config["cross_compute_hidden_size"],
            "cross_heads": config["num_attention_heads"],
        }
        return {"class_path": self.class_path, "init_args": self.describe_arguments(config, folder) | fine}

    def config(self, module: Any, layout: str) -> dict[str, Any]:
        made = super().config(module, layout)
        if module.arguments["cross_heads"] != made["num_attention_heads"]:
            raise UserError(
                f"{self.system}: in the published layout the cross-attention has as many heads as the attention, here "
                f"{module.arguments['cross_heads']} and {made['num_attention_heads']}; use the artefact itself"
            )
        trunk, facts = module.vision_high.trunk, module.high
        block = trunk.blocks[0]
        tower = {
            "patch_size": trunk.patch_embed.patch_size[0],
            "depth": facts.depth,
            "head_dim": facts.dim // block.attn.num_heads,
            "mlp_ratio": block.mlp.fc2.in_features / facts.dim,
            "ref_grid": trunk.rope.ref_feat_shape[0],
        }
        if int(facts.dim * _TOWER["mlp_ratio"]) == block.mlp.fc2.in_features:
            tower["mlp_ratio"] = _TOWER["mlp_ratio"]
        return made | {
            "architectures": ["CogAgentForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_cogagent.CogAgentConfig",
                "AutoModelForCausalLM": "modeling_cogagent.CogAgentForCausalLM",
            },
            "cross_compute_hidden_size": module.arguments["cross_width"],
            "cross_hidden_size": facts.dim,
            "cross_image_size": facts.image_size,
            **({} if tower == _TOWER else {"cross_vision": tower}),
        }


def describe_fine_tower(config: Mapping[str, Any]) -> dict[str, Any]:
    """`init_args` of the tower of the fine view."""
    dim, tower = config["cross_hidden_size"], _tower(config)
    return {
        "name": "eva02_large_patch14_clip_336",
        "layer": -2,
        "weights": None,
        "options": {
            "img_size": config["cross_image_size"],
            "patch_size": tower["patch_size"],
            "embed_dim": dim,
            "depth": tower["depth"],
            "num_heads": dim // tower["head_dim"],
            "mlp_ratio": tower["mlp_ratio"],
            "ref_feat_shape": [tower["ref_grid"]] * 2,
        },
    }


def _tower(config: Mapping[str, Any]) -> dict[str, Any]:
    return _TOWER | (config.get("cross_vision") or {})
