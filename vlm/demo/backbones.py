"""Makes the small parts that the demo recipes need and that are committed under `vlm/demo/assets`.

::

    python -m vlm.demo.backbones vlm/demo/assets          # about two and a half hours on two cores

    llama/tokenizer.model    SentencePiece BPE with the traits of LLaMA's: `<unk>` 0, `<s>` 1, `</s>` 2, bytes for
                             unknown characters, no normalisation, blanks kept, a blank put before the text
    llama/model.safetensors  a decoder of LLaMA's class, pretrained on text (`vlm.demo.language`), at last in the chat
                             templates of several systems, as the published ones were tuned in their own
    clip/model.safetensors   a tower of CLIP's class, pretrained on images (`vlm.demo.tower`)
    convnext/model.safetensors  a ConvNeXt, the same
    fuyu/tokenizer.json      the same tokenizer with Fuyu's marks and a token for each small number
    fuyu/artefact            a small Fuyu, pretrained on text in its template and on images (`vlm.demo.pictures`)
    eva/, blip_vit/model.safetensors  towers of the classes that BLIP-2 and BLIP have, the same
    eva02_e/model.safetensors  a tower of CogVLM's class (blocks normalised behind), the same on squashed images
    eva02_l/model.safetensors  a tower of CogAgent's second class, the same on 224 px with screens of elements and up to
                             nine scenes
    med/artefact             BLIP's text model, over `bert` and `blip_vit`, with image and text (`vlm.demo.med`)
    qformer/artefact         what of BLIP-2's Q-Former looks at images, over `bert` and `eva` (`vlm.demo.looking`)
    bert/, opt/, t5/         language models of their classes with their tokenizers, pretrained on text
                             (`vlm.demo.bert`, `vlm.demo.opt`, `vlm.demo.t5`)
    internlm2/               a decoder of InternLM2's class made of that of LLaMA's (`vlm.demo.internlm2`)
    llama_chat/              that of LLaMA's, tuned on in the templates of systems that freeze it (`vlm.demo.chat`)
    qwen_vl/artefact         tower and resampler of a small Qwen-VL behind a long first stage (`vlm.demo.pictures`)

Everything is learned from training compositions alone: none of validation or test (`scenes.split_of`) was ever drawn
or told. The weights are stored in float16.
"""

import argparse
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from vlm.building.instantiate import describe_module
from vlm.checkpoints.artefact import write_artefact
from vlm.checkpoints.files.atomic import atomic_file
from vlm.connectors import Resampler
from vlm.demo.bert import make_bert
from vlm.demo.chat import make_chat_llama
from vlm.demo.internlm2 import make_internlm2
from vlm.demo.language import CHAT_TEMPLATES, train_language
from vlm.demo.looking import new_qformer, train_queries
from vlm.demo.med import new_blip, train_med
from vlm.demo.opt import make_opt
from vlm.demo.pictures import train_on_pictures
from vlm.demo.t5 import make_t5
from vlm.demo.texts import CUT, training_texts
from vlm.demo.towers import TOWER_OPTIONS, TOWERS, make_pyramid, make_tower
from vlm.language import CausalLM
from vlm.language.attention import PACKED
from vlm.prompts import FuyuTokenizer, LlamaTokenizer
from vlm.prompts.fuyu import END, NEWLINE, SPEAKER
from vlm.stages import Stage, Trained
from vlm.systems import Fuyu, QwenVL
from vlm.vision import TimmTower
from vlm.vision.patches import Patches

TEXT_MODELS = {"bert": make_bert, "opt": make_opt, "t5": make_t5}
LANGUAGE: dict[str, Any] = {
    "vocab_size": 1200,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
LANGUAGE_STEPS = 5000
LANGUAGE_CYCLES = 2
CHAT_STEPS = 2000
CHAT_RATE = 5e-4
PERSIMMON: dict[str, Any] = {
    "model_type": "persimmon",
    "vocab_size": 1280,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
PERSIMMON_STEPS = 2500
PICTURE_STEPS = 5000
FUYU_PATCHES = Patches(16, max_width=128, max_height=128)
QWEN_TOWER = "vit_gigantic_patch14_clip_224"
QWEN_TOWER_OPTIONS: dict[str, Any] = {
    **TOWER_OPTIONS,
    "class_token": False,
    "global_pool": "avg",
    "mlp_ratio": 4.0,
}
QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>"),
)
RESAMPLER_STEPS = 2500
_LARGEST_NUMBER = 80  # more than half the side of the largest image of the demo


def train_tokenizer() -> bytes:
    """The content of `tokenizer.model`; the same for the same version of sentencepiece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=training_texts(),
        model_writer=model,
        model_type="bpe",
        vocab_size=LANGUAGE["vocab_size"],
        hard_vocab_limit=False,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        pretokenization_delimiter=CUT,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def fuyu_tokenizer(llama: LlamaTokenizer, folder: Path) -> None:
    """Writes `tokenizer.json`: every number up to `_LARGEST_NUMBER` is a token that text is never cut into.

    The tokens of an image are pieces of the vocabulary, as in the published file: `FuyuProcessor` counts on the blank
    that a text gets in front of them, and takes it away.
    """
    llama.save(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    for token in (*map(str, range(_LARGEST_NUMBER + 1)), SPEAKER, NEWLINE):
        vocab.setdefault(token, len(vocab))
    content["model"]["ignore_merges"] = True
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    whole = tokenizers.Regex("|".join(map(re.escape, (SPEAKER, NEWLINE))))
    backend.pre_tokenizer = pre_tokenizers.Split(whole, behavior="isolated")
    marks = (END, *(f"<0x0{number}>" for number in range(5)))
    backend.add_special_tokens([tokenizers.AddedToken(mark, normalized=False, special=True) for mark in marks])
    backend.save(str(file))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).unlink()


def make_fuyu(folder: Path, *, llama: Path) -> None:
    """Writes the tokenizer and, as an artefact that a stage can follow, the pretrained network."""
    torch.manual_seed(0)
    fuyu_tokenizer(LlamaTokenizer(str(llama), legacy=True), folder)
    tokenizer = FuyuTokenizer(str(folder))
    module = Fuyu(patches=FUYU_PATCHES, language=CausalLM(config=PERSIMMON), tokenizer=tokenizer)
    how = Trained(lr=1e-3, weight_decay=0.05)
    module.stage = Stage("pretrained", {"connector": how, "language": how})
    module.configure_model()
    module.language.set_attn_implementation("sdpa")
    for line in train_language(module.language, tokenizer, steps=PERSIMMON_STEPS, templates=("fuyu",)):
        print("fuyu", line, flush=True)
    module.language.set_attn_implementation(PACKED)
    for line in train_on_pictures(module, steps=PICTURE_STEPS, drawing_share=0.5):
        print("fuyu", line, flush=True)
    write_pretrained(folder / "artefact", module)


def make_qwen_vl(folder: Path, *, llama: Path, clip: Path) -> None:
    """Writes tower and resampler behind a long first stage, as an artefact that a stage can follow."""
    module = QwenVL(
        vision=TimmTower(QWEN_TOWER, layer=-1, weights=str(clip), options=QWEN_TOWER_OPTIONS, position_grid=7),
        connector=Resampler(num_queries=49, num_heads=8),
        language=CausalLM(str(llama), config={"model_type": "qwen2"}),
        tokenizer=LlamaTokenizer(str(llama), legacy=False, added_tokens=QWEN_TOKENS),
        template="qwen_vl",
        image="squash",
    )
    train = {"vision": Trained(lr=3e-4, weight_decay=0.05), "connector": Trained(lr=3e-3, weight_decay=0.05)}
    module.stage = Stage("pretrained", train)
    module.configure_model()
    for line in train_on_pictures(module, steps=RESAMPLER_STEPS):
        print("qwen_vl", line, flush=True)
    write_pretrained(folder / "artefact", module)


def write_pretrained(folder: Path, module: Any) -> None:
    """An artefact of what the stage of a module has trained, in float16."""
    trained = module.trained_names()
    tensors = ((name, tensor.detach().half()) for name, tensor in module.state_dict().items() if name in trained)
    model = describe_module(module)
    meta = {"system": module.system, "stage": module.stage.name, "global_step": 0, "model": model}
    write_artefact(folder, tensors=tensors, meta=meta)


def main(arguments: list[str]) -> int:
    """`python -m vlm.demo.backbones FOLDER`."""
    parser = argparse.ArgumentParser(prog="python -m vlm.demo.backbones")
    parser.add_argument("folder", type=Path)
    choices = (
        "tokenizer",
        "llama",
        *TEXT_MODELS,
        *TOWERS,
        "convnext",
        "fuyu",
        "qwen_vl",
        "internlm2",
        "llama_chat",
        "qformer",
        "med",
    )
    parser.add_argument("--only", choices=choices, help="default: all")
    options = parser.parse_args(arguments)
    llama, clip = options.folder / "llama", options.folder / "clip"
    if options.only in (None, "tokenizer"):
        with atomic_file(llama / "tokenizer.model") as file:
            file.write(train_tokenizer())
    if options.only in (None, "llama"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**LANGUAGE))
        tokenizer = LlamaTokenizer(str(llama), legacy=False)
        for cycle in range(LANGUAGE_CYCLES):
            first = cycle * LANGUAGE_STEPS
            for line in train_language(model, tokenizer, steps=LANGUAGE_STEPS, first=first):
                print("llama", line, flush=True)
        first = LANGUAGE_CYCLES * LANGUAGE_STEPS
        for line in train_language(
            model, tokenizer, steps=CHAT_STEPS, first=first, rate=CHAT_RATE, templates=CHAT_TEMPLATES
        ):
            print("llama", line, flush=True)
        model.half().save_pretrained(llama)
    for name, make in TEXT_MODELS.items():
        if options.only in (None, name):
            for line in make(options.folder / name):
                print(name, line, flush=True)
    for name in TOWERS:
        if options.only in (None, name):
            make_tower(options.folder / name, name)
    if options.only in (None, "convnext"):
        make_pyramid(options.folder / "convnext")
    if options.only in (None, "fuyu"):
        make_fuyu(options.folder / "fuyu", llama=llama)
    if options.only in (None, "qwen_vl"):
        make_qwen_vl(options.folder / "qwen_vl", llama=llama, clip=clip)
    if options.only in (None, "qformer"):
        torch.manual_seed(0)
        module = new_qformer(bert=options.folder / "bert", eva=options.folder / "eva", options=TOWERS["eva"].options)
        for line in train_queries(module):
            print("qformer", line, flush=True)
        write_pretrained(options.folder / "qformer/artefact", module)
    if options.only in (None, "med"):
        torch.manual_seed(0)
        parts = {"bert": options.folder / "bert", "vit": options.folder / "blip_vit"}
        blip = new_blip(**parts, options=TOWERS["blip_vit"].options)
        for line in train_med(blip):
            print("med", line, flush=True)
        write_pretrained(options.folder / "med/artefact", blip)
    if options.only in (None, "internlm2"):
        for line in make_internlm2(options.folder / "internlm2", llama=llama):
            print("internlm2", line, flush=True)
    if options.only in (None, "llama_chat"):
        for line in make_chat_llama(options.folder / "llama_chat", llama=llama):
            print("llama_chat", line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
