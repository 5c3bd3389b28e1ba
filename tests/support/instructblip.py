"""InstructBLIP at the size of tests."""

import dataclasses
from pathlib import Path
from typing import Any

from tests.conftest import GOLDEN
from tests.support.samples import picture, questions, samples
from vlm.connectors import Linear, QFormer
from vlm.language import CausalLM
from vlm.prompts import LlamaTokenizer
from vlm.prompts.bert import BertTokenizer
from vlm.sample import ImagePart, Sample
from vlm.systems import InstructBLIP
from vlm.vision import TimmTower

VICUNA = LlamaTokenizer(str(GOLDEN / "_shared" / "llama_sp_tokenizer.model"), pad_token="[PAD]", bos_token="</s>")
TOWER = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 4}
READS = BertTokenizer(str(GOLDEN.parents[1] / "vlm/demo/assets/bert"), added_tokens=["[DEC]"])
READER = {"dim": 16, "num_layers": 2, "num_heads": 4, "mlp_dim": 32, "vocab_size": 701, "num_queries": 4, "text": True}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32001,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def instructblip(**changes: Any) -> InstructBLIP:
    """4 tokens per picture."""
    arguments = {
        "vision": TimmTower("vit_large_patch14_clip_quickgelu_224", layer=-2, class_token=True, options=TOWER),
        "qformer": QFormer(**READER, dropout=0.0),
        "qformer_tokenizer": READS,
        "connector": Linear(),
        "language": CausalLM(config=LLAMA),
        "tokenizer": VICUNA,
        "image": "squash",
    }
    return InstructBLIP(**(arguments | changes))


def pictured(folder: Path, count: int = 6) -> list[Sample]:
    """Those of the usual samples that show something, without what is asked later: that is a sequence of its own."""
    found = [sample for sample in samples(folder, 3 * count) if sample.images][:count]
    return [dataclasses.replace(one, id=str(at), messages=one.messages[:2]) for at, one in enumerate(found)]


READER_TENSORS = (
    "connector.{weight,bias}",
    "qformer.queries",
    "qformer.embeddings.{words,positions}.weight",
    "qformer.{feature_norm,embeddings.norm}.{weight,bias}",
    "qformer.layers.{0,1}.attention.{query,key,value,dense,norm}.{weight,bias}",
    "qformer.layers.0.cross_attention.{query,key,value,dense,norm}.{weight,bias}",
    "qformer.layers.{0,1}.{query_mlp,mlp}.{fc1,fc2,norm}.{weight,bias}",
)
UNREAD = ("qformer.layers.1.mlp.{fc1,fc2,norm}.{weight,bias}",)
"""Above the last self-attention nothing looks at the instruction."""


def frames(folder: Path) -> list[Sample]:
    """The usual questions, each about something."""
    found = []
    for number, sample in enumerate(questions(folder)):
        images = sample.images or (picture(folder, f"shown{number}", (40, 30), 5 + number),)
        (asked, told), parts = sample.messages, [ImagePart()] * (len(images) - len(sample.images))
        asked = dataclasses.replace(asked, content=(*parts, *asked.content))
        found.append(dataclasses.replace(sample, images=images, messages=(asked, told)))
    return found
