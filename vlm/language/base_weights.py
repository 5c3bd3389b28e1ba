"""The layouts in which language models are published."""

import itertools
from typing import Any

import torch

from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.tables.base import BaseWeights, read_with_table
from vlm.checkpoints.tables.internlm2 import internlm2_table
from vlm.checkpoints.tables.mixtral import mixtral_table
from vlm.checkpoints.tables.qwen import qwen_table


def read_decoder(model: Any, files: WeightFiles) -> BaseWeights:
    """A decoder in the layout of its transformers class, in Mixtral's of one linear layer per expert, in Qwen-7B's or
    in InternLM2's.

    Rotary tables that old versions of transformers saved are dropped: they are computed. Over the weights of a Llama,
    Qwen2's class (`CausalLM.config`) has biases of zero.
    """
    if "model.layers.0.block_sparse_moe.gate.weight" in files:
        return read_with_table(mixtral_table(num_experts=model.config.num_local_experts), files)
    if "transformer.h.0.attn.c_attn.weight" in files:
        return read_with_table(qwen_table(), files)
    if "model.layers.0.attention.wqkv.weight" in files:
        config = model.config
        table = internlm2_table(heads=config.num_attention_heads, groups=config.num_key_value_heads)
        return read_with_table(table, files)
    known, keys = model.state_dict(), files.keys()
    dropped = [key for key in keys if key.endswith("rotary_emb.inv_freq") and key not in known]
    is_qwen2 = model.config.model_type == "qwen2"
    biases = [name for name in known if is_qwen2 and name.endswith("_proj.bias") and name not in files]
    zeros = {name: torch.zeros(known[name].shape) for name in biases}
    return BaseWeights(
        names=frozenset({*keys, *zeros} - set(dropped)),
        items=lambda: itertools.chain(files.items(), zeros.items()),
        dropped=tuple(dropped),
    )
