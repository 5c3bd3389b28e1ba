"""InternLM-XComposer for the contract test."""

from typing import Any

from tests.conftest import GOLDEN
from vlm.connectors import FlaggedLinear, QFormer
from vlm.language import CausalLM
from vlm.prompts import LlamaTokenizer
from vlm.systems import XComposer
from vlm.vision import TimmTower

LORA: dict[str, Any] = {"targets": ["q_proj", "v_proj", "up_proj", "down_proj"], "parts": ["language"]}
"""Which layers the published adapter is on."""
EVA = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}
INTERNLM = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "attention_bias": True,
}


def xcomposer(**changes: Any) -> XComposer:
    """6 image tokens per picture, two of them flags."""
    model = str(GOLDEN / "_shared" / "llama_sp_tokenizer.model")
    arguments = {
        "vision": TimmTower("eva_giant_patch14_clip_224", layer=-2, class_token=True, options=EVA),
        "qformer": QFormer(dim=16, num_layers=2, num_heads=4, mlp_dim=32, num_queries=4, dropout=0.0),
        "connector": FlaggedLinear(),
        "language": CausalLM(config=INTERNLM),
        "tokenizer": LlamaTokenizer(model, pad_token="<unk>"),
        "template": "xcomposer_vl",
        "image": "squash",
        "max_tokens": 512,
    }
    return XComposer(**(arguments | changes))
