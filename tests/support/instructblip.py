"""InstructBLIP at the size of tests."""

import dataclasses
from pathlib import Path
from typing import Any

from tests.conftest import GOLDEN
from tests.support.blip2 import EVA, T5, t5_tokenizer
from tests.support.samples import picture, questions, samples
from vlm.connectors import Linear, QFormer
from vlm.language import CausalLM
from vlm.language.seq2seq import Seq2SeqLM
from vlm.prompts import LlamaTokenizer
from vlm.prompts.bert import BertTokenizer
from vlm.sample import ImagePart, Sample
from vlm.systems import InstructBLIP, InstructBLIPT5

VICUNA = LlamaTokenizer(str(GOLDEN / "_shared" / "llama_sp_tokenizer.model"), pad_token="[PAD]", bos_token="</s>")
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
        "vision": EVA,
        "qformer": QFormer(**READER, dropout=0.0),
        "qformer_tokenizer": READS,
        "connector": Linear(),
        "language": CausalLM(config=LLAMA),
        "tokenizer": VICUNA,
        "image": "squash",
    }
    return InstructBLIP(**(arguments | changes))


def instructblip_t5(**changes: Any) -> InstructBLIPT5:
    """4 tokens per picture in the encoder's row."""
    arguments = {
        "vision": EVA,
        "qformer": QFormer(**READER, dropout=0.0),
        "qformer_tokenizer": READS,
        "connector": Linear(),
        "language": Seq2SeqLM(config=T5),
        "tokenizer": t5_tokenizer(),
        "image": "squash",
        "max_output": 1200,
    }
    return InstructBLIPT5(**(arguments | changes))


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
