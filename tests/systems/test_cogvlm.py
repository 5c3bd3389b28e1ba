"""CogVLM against the official numbers (`cogvlm_model__a`, `cogvlm_masks__a`) and its released files."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import vlm  # first: repairs torchvision
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers

from callbacks.stage_transition import write_stage
from tests.conftest import GOLDEN, golden, golden_json
from tests.support.cogvlm import cogvlm
from tests.support.parity import assert_same_scores, assert_same_state
from tests.support.samples import samples
from tests.systems.test_contract import collate, disturb
from vlm.batch import IGNORE, Batch, Row, TokenSequence, Views, next_token_targets
from vlm.building.network import empty_weights
from vlm.checkpoints.published.family import get_family
from vlm.commands.convert import convert
from vlm.connectors import GLU
from vlm.errors import SampleError, UserError
from vlm.language import CausalLM, PeftAdapter, VisualExpert
from vlm.language.adapters import replace_adapters
from vlm.prompts import get_template
from vlm.prompts.template import IMAGE
from vlm.sample import ImagePart, Message, TextPart
from vlm.stages import InitFrom, Stage, Trained
from vlm.systems.cogvlm import image_blocks
from vlm.vision import TimmTower

CASE = "cogvlm_model__a"
STATED: dict[str, Any] = {
    "_name_or_path": "./", "architectures": ["CogVLMForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_cogvlm.CogVLMConfig",
                 "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM"},
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 32,
    "pad_token_id": 0, "rms_norm_eps": 1e-05, "template_version": "chat", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.35.0", "use_cache": True,
    "vision_config": {"dropout_prob": 0.0, "hidden_act": "gelu", "hidden_size": 1792, "image_size": 490,
                      "in_channels": 3, "intermediate_size": 15360, "layer_norm_eps": 1e-06, "num_heads": 16,
                      "num_hidden_layers": 63, "num_positions": 1226, "patch_size": 14},
    "vocab_size": 32000,
}  # fmt: skip
"""A released `config.json`."""


def config_of(size: dict[str, Any]) -> dict[str, Any]:
    """The released file with the sizes of a golden case."""
    vision = STATED["vision_config"] | {
        "hidden_size": size["vwidth"], "image_size": size["image"], "intermediate_size": size["vmlp"],
        "num_heads": size["vheads"], "num_hidden_layers": size["vlayers"], "num_positions": size["grid"] ** 2 + 1,
        "patch_size": size["patch"],
    }  # fmt: skip
    return STATED | {
        "hidden_size": size["hidden"], "intermediate_size": size["mlp"], "num_attention_heads": size["heads"],
        "num_hidden_layers": size["layers"], "vocab_size": size["vocab"], "vision_config": vision,
    }  # fmt: skip


def published_folder(folder: Path, **changes: Any) -> Path:
    """The golden weights in the released form, with a tokenizer that fits their vocabulary."""
    folder.mkdir()
    weights = {name.removeprefix("weights/"): t for name, t in golden(CASE).items() if name.startswith("weights/")}
    for layer in range(2):  # what no attention feels, and what older files have
        weights[f"model.vision.transformer.layers.{layer}.attention.query_key_value.bias"][32:64] = 0.5
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_of(golden_json(CASE)["config"]) | changes))
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, 90)}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@torch.no_grad()
def test_the_whole_model_equals_the_official_numbers(tmp_path: Path) -> None:
    """Each stage of it. The official rows are padded, ours lie one after another."""
    tensors, size = golden(CASE), golden_json(CASE)["config"]
    module = vlm.load(published_folder(tmp_path / "official"))
    assert module.surgery == [VisualExpert()]
    near = {"atol": 1e-5, "rtol": 0.0}
    trunk = module.vision.trunk
    assert len(trunk.blocks) == size["vlayers"]
    torch.testing.assert_close(module.vision(tensors["inputs/images"]), tensors["outputs/vit_out"][:, 1:], **near)

    width, sequences = size["grid"] ** 2 + 2, []
    for ids, kinds, mask, labels in zip(
        *(tensors[f"inputs/{name}"] for name in ("input_ids", "token_type_ids", "attention_mask", "labels")),
        strict=True,
    ):
        real = mask.bool()
        slots = kinds[real].nonzero().squeeze(1)
        positions, visual = image_blocks(ids[real], slots, width)
        targets = next_token_targets(labels[real])
        sequences.append(TokenSequence(ids[real], targets, slots={"image": slots}, positions=positions, visual=visual))
    row, real = Row.pack(sequences, ["image"]), tensors["inputs/attention_mask"].bool()
    assert torch.equal(row.positions, tensors["outputs/position_ids"][real])
    of = torch.tensor([0, 1])
    views = Views(tensors["inputs/images"], of, of, ((1, 1),) * 2, ((12, 12),) * 2)
    batch = Batch(text=row, rows={}, views={"image": views}, samples=(), counts={"images": 2.0})
    torch.testing.assert_close(module.image_features(batch), tensors["outputs/image_features"].flatten(0, 1), **near)
    torch.testing.assert_close(module.embed_row(batch), tensors["outputs/inputs_embeds"][real], **near)
    logits = module.label_logits(batch)
    # 3e-6 seen; with the end of an image given to the expert, or a position for each patch, more than 1
    torch.testing.assert_close(logits, tensors["outputs/logits"][real][row.label_positions], atol=3e-5, rtol=0)
    loss = module.losses(batch)["lm"] / int((row.targets != IGNORE).sum())
    torch.testing.assert_close(loss, tensors["outputs/loss"], **near)


# -- texts


def messages(query: str, history: list[list[str]]) -> list[Message]:
    asked = [query] if not history else [history[0][0], *(q for q, _ in history[1:]), query]
    told: list[Message] = []
    for at, question in enumerate(asked):
        told.append(Message("user", (*([ImagePart()] if at == 0 else []), TextPart(question))))
        if at < len(history):
            told.append(Message("assistant", (TextPart(history[at][1]),)))
    return told


class Bytes:
    """The stand-in of the golden cases: a token for every byte."""

    bos_id, eos_id = 1, 2

    def encode(self, text: str, *, literal: Any = ()) -> tuple[list[int], list[tuple[int, int]]]:
        ids, offsets, at = [], [], 0
        while at < len(text):
            step = 4 if text.startswith("</s>", at) else 1
            ids.append(2 if step == 4 else ord(text[at]) + 3)
            offsets.append((at, at + step))
            at += step
        return ids, offsets


def test_prompts_and_labels_equal_the_official_ones() -> None:
    cases, found = golden_json("cogvlm_masks__a", "data.json"), 0
    codec = cogvlm().codec
    for case in cases["train"]:
        template, slots = get_template(f"cogvlm_{case['signal']}"), case["image_length"] + 2
        before, *rest = case["prompt"].split("<EOI>")
        marks = [part for text in rest for part in (ImagePart(), TextPart(text))]
        content = marks if rest else [ImagePart(), TextPart(before)]
        told = [Message("user", tuple(content)), Message("assistant", (TextPart(case["caption"]),))]
        tokens = template.tokenize(told, Bytes())  # type: ignore[arg-type]
        wide = codec.reserve(tokens.ids, tokens.labels, [slots] * tokens.ids.count(IMAGE))
        ids, labels, _ = (part.tolist() for part in wide)
        if len(ids) > case["max_target_length"] - 5:
            continue  # published texts are left out or cut then; here it is an error
        assert ids == case["result"]["input_ids"][: len(ids)]
        assert labels == case["result"]["labels"][: len(ids)]
        assert set(case["result"]["labels"][len(ids) :]) <= {IGNORE}
        found += 1
    for case in cases["inference"]:
        template = get_template(f"cogvlm_{case['signal']}")
        told = messages(case["prompt"].removeprefix("<EOI>"), [])
        tokens = template.tokenize(told, Bytes(), generate=True)  # type: ignore[arg-type]
        ids, _, _ = codec.reserve(tokens.ids, tokens.labels, [case["image_length"] + 2])
        assert ids.tolist() == case["result"]["input_ids"]
    for case in cases["history_to_prompt"]:
        spans = get_template(f"cogvlm_{case['signal']}").render(messages(case["query"], case["history"]), generate=True)
        assert "".join(getattr(span, "text", "<EOI>") for span in spans) == case["text"]
    assert found >= 5


def test_answers_before_the_last_are_written_as_in_a_prompt() -> None:
    """So that what is trained is what is asked, but for the mark that ends the last answer."""
    told = [*messages("b?", [["a?", "A"]]), Message("assistant", (TextPart("B"),))]
    tokenizer = cogvlm().codec.tokenizer
    for name in ("cogvlm_chat", "cogvlm_chat_old"):
        template = get_template(name)
        prompt = template.tokenize(told[:-1], tokenizer, generate=True).ids
        trained = template.tokenize(told, tokenizer)
        assert trained.ids[: len(prompt)] == prompt
        assert trained.ids[len(prompt) :] == [*tokenizer.encode("B")[0], 2]
        assert [token for token in trained.labels if token != IGNORE] == [
            *tokenizer.encode("A")[0], *tokenizer.encode("B")[0], 2
        ]  # fmt: skip


def test_a_template_of_one_exchange_makes_a_sequence_of_each(tmp_path: Path) -> None:
    """And every one of them sees the image; an answer that is read alone is none."""
    sample = next(sample for sample in samples(tmp_path, 8) if sample.images)
    question, answer = sample.messages[:2]
    more = replace(sample, messages=(question, answer, Message("user", (TextPart("and?"),)), answer))
    one, chat = cogvlm(template="cogvlm_base").codec, cogvlm().codec
    item = one.encode(more)
    assert len(item.text) == 2
    assert len(item.sample.images) == 2 * len(sample.images)
    assert all(len(sequence.slots["image"]) == 18 * len(sample.images) for sequence in item.text)
    assert item.counts["lm"] == sum(float((sequence.targets != IGNORE).sum()) for sequence in item.text)
    assert len(chat.encode(more).text) == 1
    with pytest.raises(SampleError, match="over the limit of 20"):
        cogvlm(max_tokens=20).codec.encode(more)


@torch.no_grad()
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_lies_over_both_ways_through_a_layer(dora: bool, tmp_path: Path) -> None:
    """Text and image tokens meet one each; merged, the plain weights of both compute the same."""
    base = cogvlm()
    base.stage = Stage("base", {"language": Trained(1.0)})
    base.configure_model()
    disturb(base, base.trained_names())
    write_stage(tmp_path / "0", base, global_step=1)
    module, follows = cogvlm(), InitFrom(str(tmp_path / "0"))
    module.register_surgery(PeftAdapter(rank=2, alpha=4, dora=dora))
    module.stage = Stage("lora", {"adapters": Trained(1.0)}, follows=[follows])
    module.configure_model()
    batch = collate(module, samples(tmp_path, 6))
    before = module.eval().label_logits(batch)
    names = module.trained_names()
    of_expert = {name for name in names if ".expert.lora_" in name}
    assert len(of_expert) == len(names) / 2
    disturb(module, of_expert)
    text = collate(module, [sample for sample in samples(tmp_path, 6) if not sample.images])
    assert torch.equal(module.label_logits(text), base.eval().label_logits(text))
    disturb(module, names)
    logits = module.label_logits(batch)
    assert (logits - before).abs().max() > 1e-3
    write_stage(tmp_path / "1", module, global_step=1)
    assert torch.equal(vlm.load(tmp_path / "1").label_logits(batch), logits)
    merged = cogvlm()
    merged.stage = Stage(
        "next", {"connector": Trained(1.0)}, follows=[follows, InitFrom(str(tmp_path / "1"), merge=True)]
    )
    merged.configure_model()
    assert merged.surgery == [VisualExpert()]
    # W x + B A x and (W + B A) x: rounded elsewhere
    torch.testing.assert_close(merged.eval().label_logits(batch), logits, atol=2e-6, rtol=1e-5)
    replace_adapters(module, merge=True)
    torch.testing.assert_close(module.label_logits(batch), logits, atol=2e-6, rtol=1e-5)


# -- released files


def test_published_files_come_back_bit_equal(tmp_path: Path) -> None:
    source = published_folder(tmp_path / "official", template_version="base")
    convert(source, tmp_path / "ours", system="cogvlm", target_layout="ours")
    convert(tmp_path / "ours", tmp_path / "back", system="cogvlm", target_layout="official")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() - after.keys() == {name for name in before if "inv_freq" in name}
    assert [name for name in after if not torch.equal(before[name], after[name])] == []
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())
    assert vlm.load(tmp_path / "back").codec.template.name == "cogvlm_base"


def test_a_stage_goes_on_from_released_weights_and_back(tmp_path: Path) -> None:
    source = published_folder(tmp_path / "official")
    opened = vlm.load(source)
    arguments = opened.arguments | {"connector": replace(opened.arguments["connector"])}
    module = type(opened)(**arguments)
    train = {"connector": Trained(1.0), "language.model.layers.*.expert.weight": Trained(1.0), "vision": Trained(0.1)}
    module.stage = Stage("3_sft", train, follows=[InitFrom(str(source))])
    module.configure_model()
    assert_same_state(module, opened)
    disturb(module, module.trained_names())
    write_stage(tmp_path / "artefact", module, global_step=1)
    convert(tmp_path / "artefact", tmp_path / "back", system="cogvlm", target_layout="official")
    again = vlm.load(tmp_path / "back")
    assert_same_state(module, again)
    pool = [sample for sample in samples(tmp_path, 6) if sample.images]
    assert_same_scores(module.eval().score(pool), again.score(pool))


def paper_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released checkpoint, written out from section 6.6 of its facts."""
    vision = "model.vision."
    theirs: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32000, 4096),
        "model.norm.weight": (4096,),
        "lm_head.weight": (32000, 4096),
        vision + "boi": (1, 1, 4096),
        vision + "eoi": (1, 1, 4096),
        vision + "patch_embedding.cls_embedding": (1, 1792),
        vision + "patch_embedding.position_embedding.weight": (1226, 1792),
        vision + "patch_embedding.proj.weight": (1792, 3, 14, 14),
        vision + "patch_embedding.proj.bias": (1792,),
        vision + "linear_proj.linear_proj.weight": (4096, 1792),
        vision + "linear_proj.norm1.weight": (4096,),
        vision + "linear_proj.norm1.bias": (4096,),
        vision + "linear_proj.dense_h_to_4h.weight": (11008, 4096),
        vision + "linear_proj.gate_proj.weight": (11008, 4096),
        vision + "linear_proj.dense_4h_to_h.weight": (4096, 11008),
    }
    for i in range(63):
        layer = f"{vision}transformer.layers.{i}."
        linears = {"attention.query_key_value": (5376, 1792), "attention.dense": (1792, 1792)}
        linears |= {"mlp.fc1": (15360, 1792), "mlp.fc2": (1792, 15360)}
        for name, shape in linears.items():
            theirs |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        for name in ("input", "post_attention"):
            theirs |= {f"{layer}{name}_layernorm.{kind}": (1792,) for kind in ("weight", "bias")}
    for i in range(32):
        layer = f"model.layers.{i}."
        theirs |= {f"{layer}{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
        for kind in ("vision", "language"):
            theirs[f"{layer}self_attn.{kind}_expert_query_key_value.weight"] = (12288, 4096)
            theirs[f"{layer}self_attn.{kind}_expert_dense.weight"] = (4096, 4096)
            for name, shape in {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}.items():
                theirs[f"{layer}mlp.{kind}_mlp.{name}_proj.weight"] = shape
    return theirs


def test_paper_size_has_the_published_tensors(tmp_path: Path) -> None:
    """As the folder's own `config.json` describes the network."""
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "_shared" / "llama_sp_tokenizer.model").read_bytes())
    family: Any = get_family("cogvlm")
    arguments = family.describe_folder(STATED, tmp_path)["init_args"]
    module = cogvlm(
        vision=TimmTower(**arguments["vision"]["init_args"]),
        connector=GLU(**arguments["connector"]["init_args"]),
        language=CausalLM(**arguments["language"]["init_args"]),
    )
    assert module.codec.num_tokens(640, 480) == 1227
    with empty_weights():
        for name, part in module.build_parts().items():
            module.add_module(name, part)
        VisualExpert().apply(module)
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs, table = paper_shapes(), family.table("official", STATED)
    carried = {f"vision.trunk.blocks.{i}.attn.k_bias": (1792,) for i in range(63)}
    assert table.check(theirs, side="theirs") == ours | carried
    assert table.check(ours, side="ours") == theirs
    assert sum(math.prod(shape) for shape in theirs.values()) == 17_639_685_376
    expert = sum(math.prod(shape) for name, shape in ours.items() if name.endswith("expert.weight"))
    connector = sum(math.prod(shape) for name, shape in ours.items() if name.startswith("connector."))
    assert expert + connector == 6_618_628_096  # what stages 1 and 2 train; the paper says 6.5B


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template_version": "vqa"}, "template_version is 'vqa', and only base, chat is known"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"num_multi_query_heads": 8}, "num_multi_query_heads is 8, an entry that is not known"),
        ({"vision_config": STATED["vision_config"] | {"num_positions": 257}}, "490 px in patches of 14 are 1225"),
        ({"vision_config": STATED["vision_config"] | {"hidden_act": "relu"}}, 'hidden_act is "relu"'),
    ],
)
def test_files_that_say_something_else_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "_shared" / "llama_sp_tokenizer.model").read_bytes())
    with pytest.raises(UserError, match=message):
        get_family("cogvlm").describe_folder(STATED | changes, tmp_path)  # type: ignore[attr-defined]
