"""The networks whose speed is measured: published shapes, or tiny ones for a try on the CPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.connectors import GLU, MLP
from vlm.language import CausalLM, PartialLoRA, Surgery, VisualExpert
from vlm.prompts import LlamaTokenizer
from vlm.systems import CogVLM, LLaVA15, LLaVANext, XComposer2HD4K
from vlm.vision import TimmTower

ASSETS = Path(__file__).parents[2] / "vlm/demo/assets"
VICUNA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 16384,
}  # fmt: skip
TINY = VICUNA | {
    "vocab_size": 1200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
TOWER = {"embed_dim": 32, "depth": 3, "num_heads": 4}

Made = tuple[type, Mapping[str, Any], Sequence[Surgery]]
"""A system, its arguments, and what is done to its network."""


def _shared(*, is_small: bool, half: bool = False, **config: int) -> dict[str, Any]:
    sizes = TINY if is_small else VICUNA | ({"num_hidden_layers": 16} if half else {}) | config
    return {
        "connector": MLP(),
        "language": CausalLM(config=sizes),
        "tokenizer": LlamaTokenizer(str(ASSETS / "llama"), legacy=False, pad_token="<unk>"),
    }


def _clip(*, is_small: bool, layer: int = -2, **changes: int) -> TimmTower:
    options = TOWER | changes if is_small else {}
    return TimmTower("vit_large_patch14_clip_quickgelu_336", layer=layer, options=options)


def _llava_1_5(*, is_small: bool) -> Made:
    tower = _clip(is_small=is_small, img_size=56)
    return LLaVA15, {"vision": tower, **_shared(is_small=is_small), "template": "v1", "max_tokens": 2048}, ()


def _llava_next(*, is_small: bool) -> Made:
    tower = _clip(is_small=is_small, img_size=56)
    return (
        LLaVANext,
        {"vision": tower, **_shared(is_small=is_small, half=True), "template": "v1", "max_tokens": 4096},
        (),
    )


def _cogvlm(*, is_small: bool) -> Made:
    options = TOWER | {"img_size": 56, "mlp_ratio": 2.0} if is_small else {"img_size": 490}
    arguments = _shared(is_small=is_small, half=True) | {
        "vision": TimmTower("eva02_enormous_patch14_clip_224", layer=-2, norm_eps=1e-6, options=options),
        "connector": GLU(hidden_dim=64 if is_small else 11008),
        "template": "cogvlm_chat_old",
        "image": "squash",
        "max_tokens": 2048,
    }
    return CogVLM, arguments, (VisualExpert(),)


def _xcomposer2_4khd(*, is_small: bool) -> Made:
    arguments = _shared(is_small=is_small, half=True, vocab_size=92544, intermediate_size=14336, num_key_value_heads=8)
    arguments |= {
        "vision": _clip(is_small=is_small, layer=-1),
        "partial_lora": PartialLoRA(rank=4 if is_small else 256),
        "template": "xcomposer2_plain",
        "hd_num": 4 if is_small else 55,
        "max_tokens": 16384,
    }
    return XComposer2HD4K, arguments, ()


MAKERS = {
    "llava_1_5": _llava_1_5,
    "llava_next": _llava_next,
    "cogvlm": _cogvlm,
    "xcomposer2_4khd": _xcomposer2_4khd,
}
