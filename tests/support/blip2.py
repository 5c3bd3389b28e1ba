"""BLIP-2 at the size of tests, before a decoder and before an encoder-decoder."""

import io
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

from vlm.codec import step_counts
from vlm.connectors import Linear, QFormer
from vlm.language import CausalLM
from vlm.language.seq2seq import Seq2SeqLM
from vlm.prompts import OPTTokenizer, T5Tokenizer
from vlm.sample import Sample
from vlm.systems import BLIP2, BLIP2T5
from vlm.vision import TimmTower

EVA = TimmTower(
    "eva_giant_patch14_clip_224",
    layer=-2,
    class_token=True,
    options={"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 1.5},
)
READER = {"dim": 16, "num_layers": 2, "num_heads": 4, "mlp_dim": 32, "num_queries": 4, "dropout": 0.0}
OPT = {
    "model_type": "opt",
    "vocab_size": 512,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1500,
    "init_std": 0.2,
    "dropout": 0.0,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 512,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.0,
}
_TEXTS = ("what color is the thing in the picture, and where is it? a photo of a red bus\n",) * 4


@cache
def opt_tokenizer() -> OPTTokenizer:
    folder = Path(tempfile.mkdtemp())
    trained = ByteLevelBPETokenizer()
    marks = ["<s>", "<pad>", "</s>", "<unk>"]
    trained.train_from_iterator(_TEXTS, vocab_size=400, min_frequency=1, special_tokens=marks, show_progress=False)
    trained.save_model(str(folder))
    return OPTTokenizer(str(folder))


@cache
def t5_tokenizer() -> T5Tokenizer:
    folder, model = Path(tempfile.mkdtemp()), io.BytesIO()
    characters = " ".join(map(chr, range(33, 127)))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*_TEXTS, characters]),
        model_writer=model,
        model_type="unigram",
        vocab_size=200,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
    return T5Tokenizer(str(folder))


def blip2(**changes: Any) -> BLIP2:
    """4 tokens per picture, in front of OPT's text."""
    arguments = {
        "vision": EVA,
        "qformer": QFormer(**READER),
        "connector": Linear(),
        "language": CausalLM(config=OPT),
        "tokenizer": opt_tokenizer(),
        "template": "blip2_opt",
        "image": "squash",
        "max_text": 1200,
        "max_tokens": 1500,
    }
    return BLIP2(**(arguments | changes))


def blip2_t5(**changes: Any) -> BLIP2T5:
    """4 tokens per picture in the encoder's row."""
    arguments = {
        "vision": EVA,
        "qformer": QFormer(**READER),
        "connector": Linear(),
        "language": Seq2SeqLM(config=T5),
        "tokenizer": t5_tokenizer(),
        "template": "blip2_t5",
        "image": "squash",
        "max_text": 1200,
        "max_tokens": 1500,
    }
    return BLIP2T5(**(arguments | changes))


def t5_reference(module: Any, sample: Sample) -> Tensor:
    item = module.codec.encode(sample)
    batch = module.codec.collate([item], counts=step_counts([item]))
    row = batch.text
    with torch.no_grad():
        embeds = module.language.get_input_embeddings()(row.ids)
        embeds[row.slots["image"]] = module.image_features(batch)
        decoder = batch.rows["decoder"]
        logits = module.language(inputs_embeds=embeds[None], decoder_input_ids=decoder.ids[None]).logits[0]
    return logits.log_softmax(-1).gather(1, decoder.targets[:, None]).squeeze(1)


def t5_base_weights(module: Any, folder: Path) -> tuple[str, Seq2SeqLM]:
    module.language.save_pretrained(folder)
    return "language", Seq2SeqLM(path=str(folder))


QFORMER = (
    "connector.{weight,bias}",
    "qformer.queries",
    "qformer.{feature_norm,embeddings.norm}.{weight,bias}",
    "qformer.layers.{0,1}.attention.{query,key,value,dense,norm}.{weight,bias}",
    "qformer.layers.0.cross_attention.{query,key,value,dense,norm}.{weight,bias}",
    "qformer.layers.{0,1}.query_mlp.{fc1,fc2,norm}.{weight,bias}",
)
EVA_TENSORS = (
    "vision.trunk.{cls_token,pos_embed}",
    "vision.trunk.patch_embed.proj.{weight,bias}",
    "vision.trunk.blocks.{0,1}.attn.{qkv.weight,q_bias,v_bias}",
    "vision.trunk.blocks.{0,1}.{norm1,norm2,attn.proj,mlp.fc1,mlp.fc2}.{weight,bias}",
)
T5_DECODER = (
    "language.decoder.block.{0,1}.layer.{0.SelfAttention,1.EncDecAttention}.{q,k,v,o}.weight",
    "language.decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "language.decoder.block.{0,1}.layer.2.DenseReluDense.{wi_0,wi_1,wo}.weight",
    "language.decoder.block.{0,1}.layer.{0,1,2}.layer_norm.weight",
    "language.decoder.final_layer_norm.weight",
)
