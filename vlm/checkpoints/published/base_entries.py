"""What the `config.json` beside base weights says, held against the part that they are read into."""

from pathlib import Path
from typing import Any

from timm.layers import QuickGELU
from torch import nn

from vlm.checkpoints.published.entries import read_json, refusal
from vlm.checkpoints.published.lavis import describe_tower
from vlm.checkpoints.published.llava_entries import check_clip
from vlm.checkpoints.published.qwen_vl import check_qwen
from vlm.checkpoints.published.xcomposer import check_internlm
from vlm.checkpoints.published.xcomposer2 import check_internlm2

_ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


def check_base(part: str, folder: Path, network: Any) -> None:
    """Refuses base weights whose own settings say that they were trained in another network.

    Language models of the Hugging Face tools are built from their settings and need no check.

    Args:
        part: its name in the system, for messages.
        folder: of the base weights.
        network: built, without values.

    Raises:
        UserError: an entry of a CLIP tower, of BLIP-2's tower, of a Qwen-7B, an InternLM-7B or an InternLM2 that the
            part does not compute.
    """
    file = folder / "config.json"
    content = read_json(file) or {}
    if content.get("model_type") == "qwen":
        check_qwen(content, file)
    if content.get("model_type") == "internlm":
        check_internlm(content, file)
    if content.get("model_type") == "internlm2":
        check_internlm2(content, file)
    of_queries = content.get("model_type") in ("blip-2", "instructblip")
    is_clip = content.get("model_type") in ("clip", "clip_vision_model")
    if not (of_queries or is_clip) or not hasattr(network, "facts"):
        return
    heads = network.trunk.blocks[0].attn.num_heads
    if of_queries:
        stated = describe_tower(content.get("vision_config") or {}, file)["init_args"]["options"]["num_heads"]
        if stated != heads:
            raise refusal(file, f"vision_config.num_attention_heads (read into {part})", stated, expected=(heads,))
        return
    stated = content.get("vision_config") or content
    check_clip(stated, file)
    act = network.trunk.blocks[0].mlp.act
    ours = next((name for name, kind in _ACTIVATIONS.items() if isinstance(act, kind)), type(act).__name__)
    if stated.get("hidden_act", "quick_gelu") != ours:
        raise refusal(file, f"hidden_act (read into {part}.name)", stated.get("hidden_act"), expected=(ours,))
    if stated.get("num_attention_heads", heads) != heads:
        raise refusal(file, f"num_attention_heads (read into {part})", stated["num_attention_heads"], expected=(heads,))
