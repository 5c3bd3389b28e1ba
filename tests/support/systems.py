"""Small systems for the tests. A new system joins the contract test by one entry in `SYSTEMS`."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import GOLDEN
from tests.support.blip import blip
from tests.support.blip_tasks import answered, asked_about, blip_caption, blip_nlvr, blip_vqa, judged, judged_about
from tests.support.cogagent import cogagent
from tests.support.cogvlm import cogvlm
from tests.support.blip2_qformer import BLIP2_QFORMER, blip2_qformer, begun
from tests.support.instructblip import (
    READER_TENSORS,
    UNREAD,
    frames,
    instructblip,
    instructblip_t5,
    pictured,
)
from tests.support.minigpt4 import minigpt4, minigpt4_llama_2
from tests.support.samples import pairs, questions, samples
from tests.support.xcomposer import xcomposer
from tests.support.xcomposer2 import PARTIAL, UNREACHED, xcomposer2
from tests.support.xcomposer2_4khd import xcomposer2_4khd
from vlm.codec import step_counts
from vlm.connectors import MLP, Downsample, Linear, Resampler
from tests.support.blip2 import EVA_TENSORS, QFORMER, T5_DECODER, blip2, blip2_t5, t5_base_weights, t5_reference
from vlm.data import BatchSpec
from vlm.language import CausalLM, CrossAttention, PartialLoRA, Surgery, VisualExpert
from vlm.language.causal_lm import batched_attention
from vlm.language.layer_inputs import LayerInputs
from vlm.module import VisionLanguageModule
from vlm.prompts import FuyuTokenizer, LlamaTokenizer
from vlm.sample import Sample
from vlm.stages import AdamW, Stage, Trained
from vlm.systems import VILA, Fuyu, LLaVA, LLaVA15, LLaVANext, MiniGemini, QwenVL
from vlm.vision import ConvNeXtPyramid, TimmTower
from vlm.vision.patches import Patches

ROOT = Path(__file__).parents[2]
TOKENIZER = LlamaTokenizer(str(GOLDEN / "_shared" / "llama_sp_tokenizer.model"), legacy=True, pad_token="<unk>")
TOWER = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 4}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llava_1_5(**changes: Any) -> LLaVA15:
    """16 image tokens per picture."""
    return LLaVA15(**(_llava_arguments() | changes))


def llava(**changes: Any) -> LLaVA:
    """16 image tokens per picture, where the message has it."""
    tower = TimmTower("vit_large_patch14_clip_quickgelu_224", layer=-2, options=TOWER)
    published = {"vision": tower, "connector": Linear(), "template": "v0_first", "image": "crop"}
    return LLaVA(**(_llava_arguments() | published | changes))


def llava_next(**changes: Any) -> LLaVANext:
    """16 tokens for the whole picture and as many as its shape asks for behind them."""
    return LLaVANext(**(_llava_arguments() | changes))


PYRAMID = {"depths": [1, 1, 2, 1], "dims": [8, 12, 16, 20], "ls_init_value": 0.5}


def mini_gemini(**changes: Any) -> MiniGemini:
    """16 image tokens per picture, each with a window of 2 x 2 places."""
    pyramid = ConvNeXtPyramid("convnext_large_mlp", 32, options=PYRAMID)
    return MiniGemini(**(_llava_arguments() | {"vision_high": pyramid} | changes))


def mini_gemini_hd(**changes: Any) -> MiniGemini:
    """80 image tokens per picture: the whole of it and 2 x 2 parts."""
    pyramid = ConvNeXtPyramid("convnext_large_mlp", 64, options=PYRAMID)
    return mini_gemini(**({"vision_high": pyramid, "grid": 2, "whole": True} | changes))


def vila(**changes: Any) -> VILA:
    """16 image tokens per picture, through the paper's linear connector."""
    return VILA(**(_llava_arguments() | {"connector": Linear()} | changes))


def vila_downsample(**changes: Any) -> VILA:
    """4 image tokens per picture."""
    return vila(**({"connector": Downsample()} | changes))


QWEN = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 4}


def qwen_vl(**changes: Any) -> QwenVL:
    """9 image tokens per picture; the table of positions is stretched from 3 x 3 to 4 x 4 patches."""
    options = TOWER | {"class_token": False, "global_pool": "avg"}
    tower = TimmTower("vit_gigantic_patch14_clip_224", position_grid=3, norm_eps=1e-6, options=options)
    published = {
        "vision": tower,
        "connector": Resampler(num_queries=9, num_heads=2),
        "language": CausalLM(config=QWEN),
        "image": "squash",
    }
    return QwenVL(**(_llava_arguments() | published | changes))


PERSIMMON = {
    "model_type": "persimmon",
    "vocab_size": 1280,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}


def fuyu(**changes: Any) -> Fuyu:
    """A token for each 10 x 10 pixels of a picture of up to 60 x 40, and one for each row of them."""
    arguments = {
        "patches": Patches(10, max_width=60, max_height=40),
        "language": CausalLM(config=PERSIMMON),
        "tokenizer": FuyuTokenizer(str(ROOT / "vlm/demo/assets/fuyu")),
        "max_tokens": 512,
    }
    return Fuyu(**(arguments | changes))


def _llava_arguments() -> dict[str, Any]:
    return {
        "vision": TimmTower("vit_large_patch14_clip_quickgelu_336", layer=-2, options=TOWER),
        "connector": MLP(),
        "language": CausalLM(config=LLAMA),
        "tokenizer": TOKENIZER,
        "template": "v1",
        "max_tokens": 512,
    }


def names(*patterns: str) -> frozenset[str]:
    """Names of tensors, spelled out with `{a,b}` for alternatives."""
    found: list[str] = []
    for pattern in patterns:
        if choice := re.search(r"\{([^{}]*)\}", pattern):
            head, tail = pattern[: choice.start()], pattern[choice.end() :]
            found += names(*(head + option + tail for option in choice[1].split(",")))
        else:
            found.append(pattern)
    assert len(set(found)) == len(found)
    return frozenset(found)


@dataclass(frozen=True)
class TinyStage:
    """A published stage.

    Attributes:
        train: what `StageTransition` is told.
        trained: every tensor that has to change, spelled out from the paper and not from the code.
        parts: what it takes from the stage before it, {our prefix: its prefix}.
        unreached: trained ones that cannot change, because no loss depends on them.
    """

    train: Mapping[str, Trained]
    trained: frozenset[str]
    parts: Mapping[str, str] = field(default_factory=dict)
    unreached: frozenset[str] = frozenset()


EIGHT = BatchSpec(8)


@dataclass(frozen=True)
class System:
    """What the contract test has to know about a system.

    Attributes:
        make: the system at tiny size, not built yet; keywords replace arguments of its constructor.
        stages: its published stages, in order.
        base_weights: writes the weights of one part to a folder; gives the name of that part and the argument that
            reads them.
        uses: the methods by which it can be asked something; it refuses all others.
        reference: float32[labels], log-probabilities of a sample's label tokens by a plain forward of the stock
            language model, without packs; for those that `score`.
        surgery: what is done to the network before its stages.
        ties: {alias: owner}, as the architecture says.
        marks: tokens of the vocabulary among those that a picture of some width and height takes.
        splices: the features of its pictures take places in the text.
        text_parts: parts that samples without a picture reach.
        pool: makes some samples that it can be trained on: (folder, how many).
        needs_image: it takes no sample without a picture.
        asked: makes prompts of very different length for it.
        num_answers: how many different answers random weights give at least.
        batch: how a step of 8 samples is published. With `negatives`, its losses compare samples with each other.
        moving: every tensor that changes without a gradient, spelled out.
    """

    make: Callable[..., VisionLanguageModule]
    stages: Mapping[str, TinyStage]
    base_weights: Callable[[Any, Path], tuple[str, Any]]
    uses: Sequence[str] = ("score", "generate")
    reference: Callable[[Any, Sample], Tensor] | None = None
    surgery: Sequence[Surgery] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    marks: Callable[[Any, int, int], int] = lambda module, width, height: 0
    splices: bool = True
    text_parts: Sequence[str] = ("language",)
    pool: Callable[[Path, int], list[Sample]] = samples
    needs_image: bool = False
    asked: Callable[[Path], list[Sample]] = questions
    num_answers: int = 3
    batch: BatchSpec = EIGHT
    moving: frozenset[str] = frozenset()

    @property
    def mixes(self) -> bool:
        """Whether a step may have samples with and without pictures, in packs of any size."""
        return not self.needs_image and self.batch.negatives is None

    @property
    def last(self) -> TinyStage:
        return list(self.stages.values())[-1]


def spliced_reference(module: Any, sample: Sample) -> Tensor:
    item = module.codec.encode(sample)
    batch = module.codec.collate([item], counts=item.counts)
    inputs: LayerInputs = module.layer_inputs(batch)
    with torch.no_grad(), batched_attention(module.language):
        logits = module.language(
            inputs_embeds=module.embed_row(batch)[None],
            attention_mask=torch.ones(1, len(batch.text.ids)),  # without one, shared positions are taken for packing
            position_ids=inputs.positions[None],
            use_cache=False,
            layer_inputs=inputs,
        ).logits[0]
    values = logits[batch.text.label_positions].float().log_softmax(-1)
    return values.gather(1, batch.text.targets[:, None]).squeeze(1)


def causal_base_weights(module: Any, folder: Path) -> tuple[str, CausalLM]:
    module.language.save_pretrained(folder)
    return "language", CausalLM(path=str(folder))


def qformer_reference(module: Any, sample: Sample) -> Tensor:
    """A caption by itself, each token behind the queries and those before it, in one pass with a mask."""
    item = module.codec.encode(sample)
    batch = module.codec.collate([item], counts=step_counts([item]))
    network, ids = module.qformer, batch.text.ids[None].clone()
    ids[:, 0] = module.codec.tokenizer.token_id("[DEC]")
    with torch.no_grad():
        features = module.vision(batch.views["image"].pixels)
        num_queries, length = network.queries.shape[1], ids.shape[1]
        x = network.embeddings(ids, queries=network.queries)
        mask = torch.ones(num_queries + length, num_queries + length, dtype=torch.bool).tril()
        mask[:num_queries] = torch.arange(num_queries + length) < num_queries  # queries see queries
        mask[num_queries:, :num_queries] = True
        for layer in network.layers:
            x, _ = layer(x, num_queries=num_queries, mask=mask, context=network.feature_norm(features))
        logits = network.logits(x[0, num_queries:])
    row = batch.text
    return logits[row.label_positions].log_softmax(-1).gather(1, row.targets[:, None]).squeeze(1)


def blip_reference(module: Any, sample: Sample) -> Tensor:
    """Each text by itself, layer after layer, behind what it looks at."""
    item = module.codec.encode(sample)
    batch = module.codec.collate([item], counts=step_counts([item]))
    with torch.no_grad():
        features = module.vision(batch.views["image"].pixels)
        if "answers" in batch.rows:
            ids = item.text[0].ids[None]
            features = module.encoder.read(ids, torch.ones_like(ids, dtype=torch.bool), features)
        found = []
        for text in item.rows.get("answers", item.text):
            ids = text.ids.clone()
            ids[0] = module.codec.tokenizer.token_id("[DEC]")
            values = module.language.logits(module.language.write(ids[None], features)[0]).log_softmax(-1)
            trained = text.targets >= 0
            found.append(values[trained].gather(1, text.targets[trained, None]).squeeze(1))
    return torch.cat(found)


def tower_base_weights(module: Any, folder: Path) -> tuple[str, TimmTower]:
    folder.mkdir(exist_ok=True)
    save_file(module.vision.trunk.state_dict(), folder / "model.safetensors")
    return "vision", dataclasses.replace(module.arguments["vision"], weights=str(folder))


CONNECTOR = names("connector.{0,2}.{weight,bias}")
DECODER = names(
    "language.model.{embed_tokens,norm}.weight",
    "language.model.layers.{0,1}.{input,post_attention}_layernorm.weight",
    "language.model.layers.{0,1}.self_attn.{q,k,v,o}_proj.weight",
    "language.model.layers.{0,1}.mlp.{gate,up,down}_proj.weight",
    "language.lm_head.weight",
)
TWO_BLOCKS = names(
    "vision.trunk.{cls_token,pos_embed,patch_embed.proj.weight,norm_pre.weight,norm_pre.bias}",
    "vision.trunk.blocks.{0,1}.{norm1,norm2,attn.qkv,attn.proj,mlp.fc1,mlp.fc2}.{weight,bias}",
)
CLIP_TENSORS = TWO_BLOCKS | names(
    "vision.trunk.blocks.2.{norm1,norm2,attn.qkv,attn.proj,mlp.fc1,mlp.fc2}.{weight,bias}"
)
EXPERT = names(
    "language.model.layers.{0,1}.self_attn.{q,k,v,o}_proj.expert.weight",
    "language.model.layers.{0,1}.mlp.{gate,up,down}_proj.expert.weight",
)
CROSS_ATTENTION = names(
    "language.model.layers.{0,1}.cross_attn.{query,key_value,dense}.weight",
    "language.model.layers.{0,1}.post_cross_attention_layernorm.weight",
)
BLIP_TOWER = names(
    "vision.trunk.{cls_token,pos_embed,patch_embed.proj.weight,patch_embed.proj.bias,norm.weight,norm.bias}",
    "vision.trunk.blocks.{0,1}.{norm1,norm2,attn.qkv,attn.proj,mlp.fc1,mlp.fc2}.{weight,bias}",
)
BLIP_WRITES = names(
    "language.embeddings.{words.weight,positions.weight,norm.weight,norm.bias}",
    "language.layers.{0,1}.{decoder_attention,cross_attention}.{query,key,value,dense,norm}.{weight,bias}",
    "language.layers.{0,1}.mlp.{fc1,fc2,norm}.{weight,bias}",
    "language.head.{bias,dense.weight,dense.bias,norm.weight,norm.bias}",
)
BLIP_READS = names(
    "encoder.embeddings.{words.weight,positions.weight,norm.weight,norm.bias}",
    "encoder.layers.{0,1}.{attention,cross_attention}.{query,key,value,dense,norm}.{weight,bias}",
    "encoder.layers.{0,1}.mlp.{fc1,fc2,norm}.{weight,bias}",
)
BLIP_JUDGES = frozenset(name.replace("encoder.", "language.") for name in BLIP_READS) | names(
    "language.layers.{0,1}.cross_attention.second.{query,key,value,dense}.{weight,bias}",
    "language.layers.1.cross_attention.merge.{weight,bias}",
    "head.{0,2}.{weight,bias}",
)
PAIRS = names("projections.{image,text}.{weight,bias}")
PAIR_HEADS = names("heads.temperature", "heads.match.{weight,bias}")
PAIR_READS = names("language.layers.{0,1}.attention.{query,key,value,dense,norm}.{weight,bias}")
PAIR_COPIES = BLIP_TOWER | PAIRS | PAIR_READS | {n for n in BLIP_WRITES if "decoder_" not in n and ".head." not in n}
RATE = Trained(lr=1e-2)
SEPARATORS = names("separators.{row_end,between}")
XCOMPOSER2_BRIDGE = {"vision": Trained(lr=1e-2, layer_decay=0.9), "connector": RATE}
BRIDGE = {"qformer": RATE, "connector": RATE}
LINEAR = names("connector.{weight,bias}")
LLAVA_STAGES = {  # without new tokens (tests/systems/test_llava.py has those); 2_science_qa trains what 2_chat does
    "1_align": TinyStage({"connector": RATE}, LINEAR),
    "2_chat": TinyStage({"connector": RATE, "language": RATE}, LINEAR | DECODER, {"connector": "connector"}),
}
VILA_STAGES = {
    "0_align": TinyStage({"connector": RATE}, LINEAR),
    "1_pretrain": TinyStage({"connector": RATE, "language": RATE}, LINEAR | DECODER, {"connector": "connector"}),
    "2_sft": TinyStage(
        {"connector": RATE, "language": RATE}, LINEAR | DECODER, {"connector": "connector", "language": "language"}
    ),
}
MINING = names("mining.{query,key,value}.{0,1}.{weight,bias}")
MINI_GEMINI_STAGES = {
    "1_align": TinyStage({"mining": RATE, "connector": RATE}, MINING | CONNECTOR),
    "2_finetune": TinyStage(
        {"mining": RATE, "connector": RATE, "language": RATE},
        MINING | CONNECTOR | DECODER,
        {"mining": "mining", "connector": "connector"},
    ),
}
THREE_BLOCKS = names(
    "vision.trunk.{pos_embed,patch_embed.proj.weight,norm_pre.weight,norm_pre.bias}",
    "vision.trunk.blocks.{0,1,2}.{norm1,norm2,attn.qkv,attn.proj,mlp.fc1,mlp.fc2}.{weight,bias}",
)
RESAMPLER = names(
    "connector.{query,kv_proj.weight,proj.weight,attention.in_proj_weight,attention.in_proj_bias}",
    "connector.{norm_q,norm_kv,norm_out,attention.out_proj}.{weight,bias}",
)
QWEN_DECODER = DECODER | names("language.model.layers.{0,1}.self_attn.{q,k,v}_proj.bias")
QWEN_VL_STAGES = {
    "1_pretrain": TinyStage({"vision": RATE, "connector": RATE}, THREE_BLOCKS | RESAMPLER),
    "2_multitask": TinyStage(
        {"vision": Trained(lr=1e-2, layer_decay=0.95), "connector": RATE, "language": RATE},
        THREE_BLOCKS | RESAMPLER | QWEN_DECODER,
        {"vision": "vision", "connector": "connector"},
    ),
    "3_sft": TinyStage(
        {"connector": RATE, "language": RATE},
        RESAMPLER | QWEN_DECODER,
        {"vision": "vision", "connector": "connector", "language": "language"},
    ),
}

XCOMPOSER_DECODER = DECODER | names("language.model.layers.{0,1}.self_attn.{q,k,v,o}_proj.bias")
XCOMPOSER_STAGES = {  # the others train an adapter over the language model (tests/systems/test_xcomposer.py)
    "1_pretrain": TinyStage(BRIDGE | {"language": RATE}, names(*QFORMER) | XCOMPOSER_DECODER),
}

EXPERT_PATHS = {"connector": RATE, "language.model.layers.*.expert.weight": RATE}
GLU_TENSORS = names(
    "connector.{start,end}", "connector.{linear,norm,gate_proj,up_proj,down_proj}.weight", "connector.norm.bias"
)
UNSEEN_EXPERT = names(  # above the last attention no label looks at an image token
    "language.model.layers.1.self_attn.{q,o}_proj.expert.weight",
    "language.model.layers.1.mlp.{gate,up,down}_proj.expert.weight",
)
EVA_E_TENSORS = names(
    "vision.trunk.{cls_token,pos_embed,patch_embed.proj.weight,patch_embed.proj.bias}",
    "vision.trunk.blocks.{0,1}.{norm1,norm2,attn.proj,mlp.fc1,mlp.fc2}.{weight,bias}",
    "vision.trunk.blocks.{0,1}.attn.{q_bias,v_bias,qkv.weight}",
)
COGVLM_STAGES = {
    "1_pretrain": TinyStage(EXPERT_PATHS, GLU_TENSORS | EXPERT, unreached=UNSEEN_EXPERT),
    "3_sft": TinyStage(
        EXPERT_PATHS | {"vision": Trained(lr=1e-3)},
        GLU_TENSORS | EXPERT | EVA_E_TENSORS,
        {"connector": "connector", "language": "language"},
        unreached=UNSEEN_EXPERT,
    ),
}

FINE_TOWER = names(
    "vision_high.trunk.{cls_token,pos_embed,patch_embed.proj.weight,patch_embed.proj.bias}",
    "vision_high.trunk.blocks.{0,1}.{norm1,norm2,attn.norm,attn.proj,mlp.norm}.{weight,bias}",
    "vision_high.trunk.blocks.{0,1}.mlp.{fc1_g,fc1_x,fc2}.{weight,bias}",
    "vision_high.trunk.blocks.{0,1}.attn.{q_proj.weight,q_proj.bias,k_proj.weight,v_proj.weight,v_proj.bias}",
)
CROSS_PATHS = {"vision_high": RATE, "places.high": RATE, "language.model.layers.*cross_att*": RATE}
CROSS_TENSORS = FINE_TOWER | CROSS_ATTENTION | names("places.high")
COGAGENT_STAGES = {
    "1a_cross": TinyStage(CROSS_PATHS, CROSS_TENSORS),
    "1b_expert": TinyStage(
        CROSS_PATHS | EXPERT_PATHS,
        CROSS_TENSORS | GLU_TENSORS | EXPERT,
        {part: part for part in ("vision_high", "places", "language")},
        unreached=UNSEEN_EXPERT,
    ),
    "2_multitask": TinyStage(  # 3_agent trains the same
        dict.fromkeys(("vision", "vision_high", "places", "connector", "language"), RATE),
        EVA_E_TENSORS | CROSS_TENSORS | names("places.low") | GLU_TENSORS | DECODER | EXPERT,
        {part: part for part in ("vision_high", "places", "connector", "language")},
        unreached=UNSEEN_EXPERT,
    ),
}

PERSIMMON_DECODER = names(
    "language.model.embed_tokens.weight",
    "language.model.final_layernorm.{weight,bias}",
    "language.model.layers.{0,1}.{input,post_attention}_layernorm.{weight,bias}",
    "language.model.layers.{0,1}.self_attn.{query_key_value,dense,q_layernorm,k_layernorm}.{weight,bias}",
    "language.model.layers.{0,1}.mlp.{dense_h_to_4h,dense_4h_to_h}.{weight,bias}",
    "language.lm_head.weight",
)

SYSTEMS: dict[str, System] = {
    "blip2": System(
        blip2,
        {
            "2_generative": TinyStage(BRIDGE, names(*QFORMER)),
            "3_caption": TinyStage(
                BRIDGE | {"vision": Trained(lr=1e-2, layer_decay=0.95)},
                names(*QFORMER, *EVA_TENSORS),
                {part: part for part in BRIDGE},
            ),
        },
        causal_base_weights,
        reference=spliced_reference,
        ties={"language.lm_head.weight": "language.model.decoder.embed_tokens.weight"},
    ),
    "blip2_qformer": System(
        blip2_qformer,
        {"1_qformer": TinyStage(dict.fromkeys(("qformer", "projections", "heads"), RATE), names(*BLIP2_QFORMER))},
        tower_base_weights,
        uses=("score", "generate", "embed", "match"),
        reference=qformer_reference,
        splices=False,
        pool=pairs,
        asked=begun,
        needs_image=True,
        batch=BatchSpec(8, negatives="pack", packs=4),
    ),
    "blip2_t5": System(
        blip2_t5,
        {
            "2_generative": TinyStage(BRIDGE, names(*QFORMER)),
            "decoder": TinyStage(
                BRIDGE | {"language.decoder": RATE}, names(*QFORMER, *T5_DECODER), {part: part for part in BRIDGE}
            ),
        },
        t5_base_weights,
        reference=t5_reference,
        ties={f"language.{part}.embed_tokens.weight": "language.shared.weight" for part in ("encoder", "decoder")},
    ),
    "cogagent": System(
        cogagent,
        COGAGENT_STAGES,
        causal_base_weights,
        reference=spliced_reference,
        surgery=(VisualExpert(), CrossAttention(context=32, width=16, heads=2)),
    ),
    "cogvlm": System(
        cogvlm, COGVLM_STAGES, causal_base_weights, reference=spliced_reference, surgery=(VisualExpert(),)
    ),
    "fuyu": System(
        fuyu,
        {"finetune": TinyStage({"connector": RATE, "language": RATE}, LINEAR | PERSIMMON_DECODER)},
        causal_base_weights,
        reference=spliced_reference,
        marks=lambda module, width, height: module.patches.grid(width, height)[1],  # a newline behind each row
    ),
    "instructblip": System(
        instructblip,
        {
            "1_instruct": TinyStage(BRIDGE, names(*READER_TENSORS), unreached=names(*UNREAD)),
            "2_science_qa": TinyStage(
                BRIDGE, names(*READER_TENSORS), {part: part for part in BRIDGE}, unreached=names(*UNREAD)
            ),
        },
        causal_base_weights,
        reference=spliced_reference,
        pool=pictured,
        needs_image=True,
        asked=frames,
    ),
    "instructblip_t5": System(
        instructblip_t5,
        {"1_instruct": TinyStage(BRIDGE, names(*READER_TENSORS), unreached=names(*UNREAD))},
        t5_base_weights,
        reference=t5_reference,
        pool=pictured,
        needs_image=True,
        asked=frames,
        ties={f"language.{part}.embed_tokens.weight": "language.shared.weight" for part in ("encoder", "decoder")},
        num_answers=1,  # greedily, its random weights say the end at once
    ),
    "llava": System(llava, LLAVA_STAGES, causal_base_weights, reference=spliced_reference),
    "llava_1_5": System(
        llava_1_5,
        {
            "1_align": TinyStage({"connector": RATE}, CONNECTOR),
            "2_finetune": TinyStage(
                {"connector": RATE, "language": RATE}, CONNECTOR | DECODER, {"connector": "connector"}
            ),
        },
        causal_base_weights,
        reference=spliced_reference,
    ),
    "llava_next": System(
        llava_next,
        {
            "1_align": TinyStage({"connector": RATE}, CONNECTOR),
            "2_finetune": TinyStage(
                {"vision": RATE, "connector": RATE, "newline": RATE, "language": RATE},
                TWO_BLOCKS | CONNECTOR | DECODER | names("newline.weight"),
                {"connector": "connector"},
            ),
        },
        causal_base_weights,
        reference=spliced_reference,
    ),
    "mini_gemini": System(mini_gemini, MINI_GEMINI_STAGES, causal_base_weights, reference=spliced_reference),
    "mini_gemini_hd": System(
        mini_gemini_hd,
        {"2_finetune_hd": dataclasses.replace(MINI_GEMINI_STAGES["2_finetune"], parts={})},
        causal_base_weights,
        reference=spliced_reference,
    ),
    "minigpt4": System(
        minigpt4,
        {
            "1_align": TinyStage({"connector": RATE}, LINEAR),
            "2_finetune": TinyStage({"connector": RATE}, LINEAR, {"connector": "connector"}),
        },
        causal_base_weights,
        reference=spliced_reference,
        num_answers=2,
    ),
    "minigpt4_llama_2": System(
        minigpt4_llama_2,
        {
            "1_align": TinyStage({"connector": RATE}, LINEAR),
            "2_finetune": TinyStage({"connector": RATE}, LINEAR, {"connector": "connector"}),
        },
        causal_base_weights,
        reference=spliced_reference,
        num_answers=2,
    ),
    "qwen_vl": System(qwen_vl, QWEN_VL_STAGES, causal_base_weights, reference=spliced_reference),
    "vila": System(vila, VILA_STAGES, causal_base_weights, reference=spliced_reference),
    "vila_downsample": System(
        vila_downsample,
        {"1_pretrain": TinyStage({"connector": RATE, "language": RATE}, names("connector.1.{weight,bias}") | DECODER)},
        causal_base_weights,
        reference=spliced_reference,
    ),
    "xcomposer": System(xcomposer, XCOMPOSER_STAGES, causal_base_weights, reference=spliced_reference),
    "xcomposer2": System(
        xcomposer2,
        {
            "1_pretrain": TinyStage(
                XCOMPOSER2_BRIDGE | {"language.model.layers.*.Plora_*": RATE},
                CLIP_TENSORS | CONNECTOR | names(*PARTIAL),
                unreached=names(*UNREACHED),
            ),
            "2_sft": TinyStage(
                XCOMPOSER2_BRIDGE | {"language": Trained(lr=2e-3)},
                CLIP_TENSORS | CONNECTOR | names(*PARTIAL) | DECODER,
                {"vision": "vision", "connector": "connector", "language": "language"},
                unreached=names(*UNREACHED),
            ),
        },
        causal_base_weights,
        reference=spliced_reference,
        surgery=(PartialLoRA(rank=2),),
    ),
    "xcomposer2_4khd": System(
        xcomposer2_4khd,
        {
            "1_pretrain": TinyStage(
                XCOMPOSER2_BRIDGE | {"separators": RATE, "language.model.layers.*.Plora_*": RATE},
                CLIP_TENSORS | CONNECTOR | SEPARATORS | names(*PARTIAL),
                unreached=names(*UNREACHED),
            ),
            "2_sft": TinyStage(
                XCOMPOSER2_BRIDGE | {"separators": RATE, "language": Trained(lr=2e-3)},
                CLIP_TENSORS | CONNECTOR | SEPARATORS | names(*PARTIAL) | DECODER,
                {part: part for part in ("vision", "connector", "separators", "language")},
                unreached=names(*UNREACHED),
            ),
        },
        causal_base_weights,
        reference=spliced_reference,
        surgery=(PartialLoRA(rank=2),),
    ),
    "tied": System(
        lambda **changes: llava_1_5(**({"language": CausalLM(config=LLAMA | {"tie_word_embeddings": True})} | changes)),
        {
            "all": TinyStage(
                {"connector": RATE, "language": RATE}, CONNECTOR | DECODER - names("language.lm_head.weight")
            )
        },
        causal_base_weights,
        reference=spliced_reference,
        ties={"language.lm_head.weight": "language.model.embed_tokens.weight"},
    ),
    "blip": System(
        blip_caption,
        {"2_caption": TinyStage({"vision": RATE, "language": RATE}, BLIP_TOWER | BLIP_WRITES)},
        tower_base_weights,
        reference=blip_reference,
        splices=False,
        pool=pairs,
        needs_image=True,
        asked=asked_about,
    ),
    "blip_vqa": System(
        blip_vqa,
        {
            "2_vqa": TinyStage(
                dict.fromkeys(("vision", "encoder", "language"), RATE), BLIP_TOWER | BLIP_READS | BLIP_WRITES
            )
        },
        tower_base_weights,
        reference=blip_reference,
        splices=False,
        pool=answered,
        needs_image=True,
        asked=asked_about,
    ),
    "blip_nlvr": System(
        blip_nlvr,
        {"2_nlvr": TinyStage(dict.fromkeys(("vision", "language", "head"), RATE), BLIP_TOWER | BLIP_JUDGES)},
        tower_base_weights,
        uses=("generate",),
        splices=False,
        pool=judged,
        needs_image=True,
        asked=judged_about,
        num_answers=1,  # a random head says the same of everything
    ),
    "blip_pretrain": System(
        lambda **changes: blip(**({"dropout": 0.0, "label_smoothing": 0.0} | changes)),
        {
            "1_pretrain": TinyStage(
                dict.fromkeys(("vision", "language", "projections", "heads"), RATE),
                BLIP_TOWER | BLIP_WRITES | PAIR_READS | PAIRS | PAIR_HEADS,
            )
        },
        tower_base_weights,
        uses=("score", "embed", "match"),
        reference=blip_reference,
        splices=False,
        pool=pairs,
        needs_image=True,
        batch=BatchSpec(8, negatives="pack", packs=4),
        moving=frozenset(f"momentum.{name}" for name in PAIR_COPIES) | names("queue.{image,text,place}"),
    ),
}


def make(name: str, train: Mapping[str, Trained] | None = None, **changes: Any) -> VisionLanguageModule:
    """A system that is not built yet, in the last of its stages or with `train` as its stage."""
    system = SYSTEMS[name]
    module = system.make(**changes)
    module.surgery = list(system.surgery)
    # eps: by itself AdamW's first steps are the sign of a gradient, also of one that is nothing but noise
    module.stage = Stage("test", dict(system.last.train if train is None else train), optimizer=AdamW(eps=1e-3))
    return module


def build(name: str, train: Mapping[str, Trained] | None = None, **changes: Any) -> VisionLanguageModule:
    module = make(name, train, **changes)
    module.configure_model()
    return module
