"""MiniGPT-4 at the size of tests."""

from typing import Any

from tests.conftest import GOLDEN
from vlm.connectors import JoinedLinear, Linear, QFormer
from vlm.language import CausalLM
from vlm.prompts import LlamaTokenizer
from vlm.systems import MiniGPT4
from vlm.vision import TimmTower

TOKENIZER = LlamaTokenizer(str(GOLDEN / "_shared" / "llama_sp_tokenizer.model"), legacy=True, pad_token="<unk>")
TOWER = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 4}
QUERIES = {"dim": 16, "num_layers": 2, "num_heads": 4, "mlp_dim": 32, "num_queries": 4, "dropout": 0.0}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def minigpt4(**changes: Any) -> MiniGPT4:
    """4 tokens per picture."""
    arguments = {
        "vision": TimmTower("eva_giant_patch14_clip_224", layer=-2, class_token=True, options=TOWER),
        "qformer": QFormer(**QUERIES),
        "connector": Linear(),
        "language": CausalLM(config=LLAMA),
        "tokenizer": TOKENIZER,
        "image": "squash",
    }
    return MiniGPT4(**(arguments | changes))


def minigpt4_llama_2(**changes: Any) -> MiniGPT4:
    """4 tokens per picture, each of four patches."""
    tower = TimmTower("eva_giant_patch14_clip_224", layer=-2, options=TOWER)
    published = {"vision": tower, "qformer": None, "connector": JoinedLinear(), "template": "minigpt4_llama_2"}
    return minigpt4(**(published | changes))
