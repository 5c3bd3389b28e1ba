"""The first stage of BLIP-2 at the size of tests."""

import dataclasses
from pathlib import Path
from typing import Any

from tests.support.blip2 import READER
from tests.support.blip_tasks import VOCABULARY
from tests.support.samples import pairs
from vlm.connectors import QFormer
from vlm.prompts import BertTokenizer
from vlm.sample import Message, Sample, TextPart
from vlm.systems import BLIP2QFormer
from vlm.vision import TimmTower

CLIP = TimmTower(  # the smaller of the two towers
    "vit_large_patch14_clip_quickgelu_224",
    layer=-2,
    class_token=True,
    options={"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 4},
)
TEXT = {"dim": 64, "vocab_size": 104, "max_positions": 512, "text": True}


def blip2_qformer(**changes: Any) -> BLIP2QFormer:
    """4 queries look at an image; captions are read, matched and written."""
    arguments = {
        "vision": CLIP,
        "qformer": QFormer(**READER | TEXT, head=True),
        "tokenizer": BertTokenizer(str(VOCABULARY)),
        "dim": 16,
        "label_smoothing": 0.0,  # a score is a log-probability
        "max_words": 300,
        "max_tokens": 300,
    }
    return BLIP2QFormer(**(arguments | changes))


def begun(folder: Path) -> list[Sample]:
    """Images whose caption is begun at very different lengths, or not at all."""
    texts = ("a red ball " * 40, "", "a red", "a card with " * 9)
    made = zip(pairs(folder, len(texts)), texts, strict=True)
    return [
        dataclasses.replace(one, messages=(one.messages[0], Message("assistant", (TextPart(text),), begun=True)))
        for one, text in made
    ]


BLIP2_QFORMER = (
    "qformer.queries",
    "qformer.{feature_norm,embeddings.norm}.{weight,bias}",
    "qformer.embeddings.{words,positions}.weight",
    "qformer.layers.{0,1}.attention.{query,key,value,dense,norm}.{weight,bias}",
    "qformer.layers.0.cross_attention.{query,key,value,dense,norm}.{weight,bias}",
    "qformer.layers.{0,1}.{mlp,query_mlp}.{fc1,fc2,norm}.{weight,bias}",
    "qformer.head.{bias,dense.weight,dense.bias,norm.weight,norm.bias}",
    "projections.{image,text}.{weight,bias}",
    "heads.{temperature,match.weight,match.bias}",
)
