"""CogVLM and CogAgent as SwissArmyTransformer saves them: the rules of their Hugging Face files under other names.

Shapes and contents are the same: queries, keys and values lie one after another; `dense_h_to_4h` is what a gate opens.
"""

from dataclasses import replace

from vlm.checkpoints.tables.rules import Rule

_HF_LAYER, _LAYER, _ROTARY, _MLP = "model.layers.{i}.", "transformer.layers.{i}.", "mixins.rotary.", "mixins.mlp."
_VIT = "mixins.eva.vit_model."
_VIT_LAYER, _HF_VIT_LAYER = _VIT + "transformer.layers.{i}.", "model.vision.transformer.layers.{i}."
_NAMES = {
    "model.embed_tokens.": "transformer.word_embeddings.",
    "model.norm.": "transformer.final_layernorm.",
    "lm_head.": "mixins.lm.lm_head.",
    _HF_LAYER + "self_attn.language_expert_query_key_value.": _LAYER + "attention.query_key_value.",
    _HF_LAYER + "self_attn.language_expert_dense.": _LAYER + "attention.dense.",
    _HF_LAYER + "self_attn.vision_expert_query_key_value.": _ROTARY + "vision_query_key_value_list.{i}.",
    _HF_LAYER + "self_attn.vision_expert_dense.": _ROTARY + "vision_dense_list.{i}.",
    _HF_LAYER + "self_attn.rotary_emb.": _ROTARY + "rotary_emb.",
    _HF_LAYER + "mlp.language_mlp.gate_proj.": _MLP + "gate_proj.{i}.",
    _HF_LAYER + "mlp.language_mlp.up_proj.": _LAYER + "mlp.dense_h_to_4h.",
    _HF_LAYER + "mlp.language_mlp.down_proj.": _LAYER + "mlp.dense_4h_to_h.",
    _HF_LAYER + "mlp.vision_mlp.gate_proj.": _MLP + "vision_gate_proj.{i}.",
    _HF_LAYER + "mlp.vision_mlp.up_proj.": _MLP + "vision_dense_h_to_4h_list.{i}.",
    _HF_LAYER + "mlp.vision_mlp.down_proj.": _MLP + "vision_dense_4h_to_h_list.{i}.",
    _HF_LAYER + "cross_attn.": _LAYER + "cross_attention.",
    _HF_LAYER: _LAYER,
    "model.vision.patch_embedding.cls_embedding": _VIT + "transformer.word_embeddings.weight",
    "model.vision.patch_embedding.position_embedding.": _VIT + "transformer.position_embeddings.",
    "model.vision.patch_embedding.proj.": _VIT + "mixins.patch_embedding.proj.",
    _HF_VIT_LAYER + "mlp.fc1.": _VIT_LAYER + "mlp.dense_h_to_4h.",
    _HF_VIT_LAYER + "mlp.fc2.": _VIT_LAYER + "mlp.dense_4h_to_h.",
    _HF_VIT_LAYER: _VIT_LAYER,
    "model.vision.": "mixins.eva.",
    "model.cross_vision.": "mixins.encoder.",
}
"""Beginnings of names; the first that fits counts."""


def sat_rules(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of Hugging Face's files for those of SwissArmyTransformer."""
    return tuple(replace(rule, theirs=tuple(map(_sat_name, rule.theirs))) for rule in rules)


def _sat_name(name: str) -> str:
    begins = next(begins for begins in _NAMES if name.startswith(begins))
    return _NAMES[begins] + name.removeprefix(begins)
