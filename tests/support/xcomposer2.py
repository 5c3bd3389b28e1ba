"""InternLM-XComposer2 for the contract test."""

from typing import Any

from tests.conftest import GOLDEN
from vlm.connectors import MLP
from vlm.language import CausalLM, PartialLoRA
from vlm.prompts import LlamaTokenizer
from vlm.systems import XComposer2
from vlm.vision import TimmTower

CLIP = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 4}
INTERNLM2 = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-5,
}


def xcomposer2(**changes: Any) -> XComposer2:
    """16 image tokens per picture."""
    model = str(GOLDEN / "_shared" / "llama_sp_tokenizer.model")
    arguments = {
        "vision": TimmTower("vit_large_patch14_clip_quickgelu_336", layer=-1, options=CLIP),
        "connector": MLP(depth=2),
        "language": CausalLM(config=INTERNLM2),
        "partial_lora": PartialLoRA(rank=2),
        "tokenizer": LlamaTokenizer(model, pad_token="<unk>"),
        "template": "xcomposer2_plain",
        "image": "squash",
        "max_tokens": 512,
    }
    return XComposer2(**(arguments | changes))


PARTIAL = (
    "language.model.layers.{0,1}.self_attn.{q,o}_proj.Plora_A.weight",  # that of q is of k and v too
    "language.model.layers.{0,1}.self_attn.{q,k,v,o}_proj.Plora_B.weight",
    "language.model.layers.{0,1}.mlp.{gate,up,down}_proj.Plora_{A,B}.weight",
)
UNREACHED = (  # above the last attention no label looks at an image token, and these act on image tokens alone
    "language.model.layers.1.self_attn.{o_proj.Plora_A,q_proj.Plora_B,o_proj.Plora_B}.weight",
    "language.model.layers.1.mlp.{gate,up,down}_proj.Plora_{A,B}.weight",
)
