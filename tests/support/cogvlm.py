"""CogVLM for the contract test."""

from typing import Any

from tests.conftest import GOLDEN
from vlm.connectors import GLU
from vlm.language import CausalLM
from vlm.prompts import LlamaTokenizer
from vlm.systems import CogVLM
from vlm.vision import TimmTower

EVA_E = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}
VICUNA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


def cogvlm(**changes: Any) -> CogVLM:
    """18 image tokens per picture, 16 of them patches."""
    model = str(GOLDEN / "_shared" / "llama_sp_tokenizer.model")
    arguments = {
        "vision": TimmTower("eva02_enormous_patch14_clip_224", layer=-2, options=EVA_E),
        "connector": GLU(hidden_dim=48),
        "language": CausalLM(config=VICUNA),
        "tokenizer": LlamaTokenizer(model, pad_token="<unk>"),
        "template": "cogvlm_chat_old",
        "image": "squash",
        "max_tokens": 512,
    }
    return CogVLM(**(arguments | changes))
