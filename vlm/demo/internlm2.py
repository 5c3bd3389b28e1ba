"""Makes the demo's InternLM2 of the demo's LLaMA: keys and values of neighbouring heads joined, feed-forwards cut.

Heads are joined as in "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (Ainslie
et al., 2023): a group's keys and values are the mean of its heads', and the network learns on for a while.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vlm.demo.language import train_language
from vlm.prompts import LlamaTokenizer

MARKS = ("[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]")
"""End and begin of a turn, in the order of their published ids."""
GROUPS = 2
FEED_FORWARD = 192
STEPS = 250


def write_tokenizer(folder: Path, *, llama: Path, marks: Sequence[str] = MARKS) -> None:
    """Writes LLaMA's `tokenizer.model` with marks as its last pieces."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString((llama / "tokenizer.model").read_bytes())
    for mark in marks:
        proto.pieces.add(piece=mark, score=0.0, type=proto.SentencePiece.CONTROL)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def make_internlm2(folder: Path, *, llama: Path) -> Iterator[str]:
    """Writes the tokenizer, the configuration and the weights, under the names of transformers' Llama.

    Yields:
        A line of progress every hundred steps.
    """
    write_tokenizer(folder, llama=llama)
    tokenizer = LlamaTokenizer(str(folder), added_tokens=MARKS)
    torch.manual_seed(0)
    model = smaller(LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32), vocab_size=len(tokenizer))
    # chats, with a system text and without one, as the stages have them
    yield from train_language(model, tokenizer, steps=STEPS, batch=8, templates=("xcomposer2", "xcomposer2"))
    model.half().save_pretrained(folder)


def smaller(model: LlamaForCausalLM, *, vocab_size: int) -> LlamaForCausalLM:
    """A copy with grouped queries, the strongest neurons of each feed-forward layer, and rows for new tokens."""
    changed = {"num_key_value_heads": GROUPS, "intermediate_size": FEED_FORWARD, "vocab_size": vocab_size}
    small = LlamaForCausalLM(LlamaConfig(**{**model.config.to_diff_dict(), **changed}))
    state = model.state_dict()
    strongest = {
        index: _strength(layer.mlp).topk(FEED_FORWARD).indices.sort().values
        for index, layer in enumerate(model.model.layers)
    }
    for name, into in small.state_dict().items():
        tensor = state[name]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = tensor.unflatten(0, (GROUPS, -1, model.config.head_dim))
            tensor = heads.mean(1).flatten(0, 1)
        elif ".mlp." in name:
            kept = strongest[int(name.split(".")[2])]
            tensor = tensor[:, kept] if name.endswith("down_proj.weight") else tensor[kept]
        into[: len(tensor)].copy_(tensor)
    return small


def _strength(mlp) -> Tensor:
    """float[F]: how much each neuron can add at most."""
    return mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
