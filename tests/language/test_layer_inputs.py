"""What layers are told: against the official numbers, and the same in training, scores, options and generation."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import golden, golden_json
from tests.support.samples import questions, samples
from tests.support.systems import LLAMA, RATE, SYSTEMS, build, make
from tests.systems.test_contract import collate, disturb
from vlm.batch import IGNORE, Row, TokenSequence
from vlm.errors import UserError
from vlm.language import CausalLM, CrossAttention, Decoding, PartialLoRA, Surgery, VisualExpert
from vlm.language.causal_lm import batched_attention, label_logits
from vlm.language.layer_inputs import Context, LayerInputs
from vlm.systems.cogvlm import image_blocks

# -- official numbers


class Holder(nn.Module):
    """A language model alone, where surgery finds it."""

    def __init__(self, config: Mapping[str, Any], *surgery: Surgery) -> None:
        super().__init__()
        self.language: Any = CausalLM(config={"model_type": "llama", **config}).build().eval()
        for operation in surgery:
            operation.apply(self)


def llama(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": config["vocab"],
        "hidden_size": config["hidden"],
        "intermediate_size": config["mlp"],
        "num_hidden_layers": config["layers"],
        "num_attention_heads": config["heads"],
        "num_key_value_heads": config.get("kv", config["heads"]),
        "rms_norm_eps": config["rms_eps"],
        "rope_theta": config.get("theta", 10000.0),
    } | changes


def from_cogvlm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CogVLM's and CogAgent's tensors of the language model by our names."""
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("weights/")
        expert = "expert.weight" if "vision_expert" in name or "vision_mlp" in name else "weight"
        block = name.partition("self_attn.")[0] + "self_attn."
        if name.startswith(("model.vision.", "model.cross_vision.")):
            continue
        if "query_key_value" in name:
            for leaf, part in zip("qkv", tensor.chunk(3), strict=True):
                ours[f"{block}{leaf}_proj.{expert}"] = part
        elif "_expert_dense" in name:
            ours[f"{block}o_proj.{expert}"] = tensor
        else:
            plain = name.replace("language_mlp.", "").replace("vision_mlp.", "")
            ours[plain.removesuffix("weight") + expert if "_mlp." in name else plain] = tensor
    return ours


def from_internlm2(tensors: Mapping[str, Tensor], *, groups: int, head_dim: int) -> dict[str, Tensor]:
    """InternLM2's tensors, those of partial LoRA among them, by our names."""
    names = {"wo": "o_proj", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    names |= {"attention.": "self_attn.", "feed_forward": "mlp", "attention_norm": "input_layernorm"}
    names |= {"ffn_norm": "post_attention_layernorm", "tok_embeddings": "embed_tokens", "output": "lm_head"}
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("weights/")
        for theirs, our in names.items():
            plain = plain.replace(theirs, our)
        if "wqkv.Plora_A" in plain:
            ours[plain.replace("wqkv", "q_proj")] = tensor  # of all three
        elif "wqkv" in plain:
            heads = tensor.unflatten(0, (groups, -1, head_dim))
            parts = {"q": heads[:, :-2], "k": heads[:, -2], "v": heads[:, -1]}
            ours |= {
                plain.replace("wqkv", f"{leaf}_proj"): part.reshape(-1, tensor.shape[1]) for leaf, part in parts.items()
            }
        else:
            ours[plain] = tensor
    return ours


def official(case: str, weights: Mapping[str, Tensor], language: nn.Module) -> None:
    missing, unexpected = language.load_state_dict(dict(weights), strict=False)
    assert not missing + unexpected, case


def packed(tensors: Mapping[str, Tensor], *, width: int) -> tuple[Row, Tensor]:
    """The unpadded tokens of a case of CogVLM's as a row, and its embeddings."""
    sequences, embeds = [], []
    for ids, kinds, mask, vectors in zip(
        *(tensors[f"inputs/{name}"] for name in ("input_ids", "token_type_ids", "attention_mask")),
        tensors["outputs/inputs_embeds"],
        strict=True,
    ):
        real = mask.bool()
        positions, visual = image_blocks(ids[real], kinds[real].nonzero().squeeze(1), width)
        targets = torch.zeros(int(real.sum()), dtype=torch.int64)
        sequences.append(TokenSequence(ids[real], targets, positions=positions, visual=visual))
        embeds.append(vectors[real])
    return Row.pack(sequences), torch.cat(embeds)


def batched(language: Any, tensors: Mapping[str, Tensor], inputs: LayerInputs) -> Tensor:
    """Logits of padded sequences, as a prompt is read in generation: float[B, T, vocabulary]."""
    with batched_attention(language):
        return language(
            inputs_embeds=tensors["outputs/inputs_embeds"],
            attention_mask=tensors["inputs/attention_mask"],
            position_ids=inputs.positions,
            use_cache=False,
            layer_inputs=inputs,
        ).logits


@torch.no_grad()
@pytest.mark.parametrize("case", ["cogvlm_model__a", "cogagent_model__a"])
def test_expert_and_cross_attention_equal_the_official_model(case: str) -> None:
    tensors, config = golden(case), golden_json(case)["config"]
    surgery: list[Surgery] = [VisualExpert()]
    if "c_width" in config:
        surgery.append(CrossAttention(context=config["c_width"], width=config["c_width"], heads=config["cross_heads"]))
    language = Holder(llama(config), *surgery).language
    official(case, from_cogvlm({n: t for n, t in tensors.items() if n.startswith("weights/")}), language)
    features = tensors.get("outputs/cross_features")
    context = None if features is None else Context.pack(list(features))
    row, embeds = packed(tensors, width=config["grid"] ** 2 + 2)
    real = tensors["inputs/attention_mask"].bool()
    if "outputs/position_ids" in tensors:
        assert torch.equal(row.positions, tensors["outputs/position_ids"][real])
        expected = tensors["outputs/vision_expert_mask"][real]
        assert torch.equal(row.visual, expected.nonzero().squeeze(1))
    logits = tensors["outputs/logits"][real]
    # 1.4e-6 and 8.0e-6 seen; with the mark behind an image given to the expert, or positions 0, 1, 2, ..., more than 1
    torch.testing.assert_close(
        label_logits(language, embeds, row, LayerInputs.of(row, context)), logits, atol=3e-5, rtol=0
    )
    positions, visual = torch.zeros_like(real, dtype=torch.int64), torch.zeros_like(real)
    positions[real] = row.positions
    visual[real] = torch.zeros(len(embeds), dtype=torch.bool).index_fill(0, row.visual, True)
    inputs = LayerInputs(positions, visual.flatten().nonzero().squeeze(1), context)
    torch.testing.assert_close(batched(language, tensors, inputs)[real], logits, atol=3e-5, rtol=0)


def test_marks_and_shared_positions_equal_the_official_rules() -> None:
    cases = golden_json("cogvlm_masks__a", "data.json")
    found = 0
    for case in cases["hf_token_types"]:
        kinds = torch.tensor(case["token_type_ids"])
        real = torch.ones_like(kinds) if case["attention_mask"] is None else torch.tensor(case["attention_mask"])
        if real.dim() > 1 or not bool(real.all()):
            continue
        image = kinds.nonzero().squeeze(1)
        runs = (image.diff() != 1).nonzero().squeeze(1) + 1
        sizes = {len(run) for run in image.tensor_split(runs)}
        if len(sizes) != 1 or min(sizes) < 3:
            continue  # not blocks of one width, or none
        positions, visual = image_blocks(kinds, image, sizes.pop())
        assert positions.tolist() == case["position_ids"]
        assert visual.tolist() == torch.tensor(case["vision_expert_mask"]).nonzero().squeeze(1).tolist()
        found += 1
    for case in cases["train"] + cases["inference"]:
        if case["result"] is None:
            continue
        image = torch.tensor(case["result"]["image_embed_mask"]).nonzero().squeeze(1)
        ids = torch.tensor(case["result"]["input_ids"])
        positions, visual = image_blocks(ids, image, case["image_length"] + 2)
        assert visual.tolist() == torch.tensor(case["result"]["vision_expert_mask"]).nonzero().squeeze(1).tolist()
        if "position_ids" in case["result"]:
            assert positions.tolist() == case["result"]["position_ids"]
        found += 1
    assert found > 10


@torch.no_grad()
def test_partial_lora_equals_the_official_model() -> None:
    case = "xc2_internlm2__a"
    tensors, config = golden(case), golden_json(case)["config"]
    language = Holder(llama(config), PartialLoRA(rank=config["r"], scale=config["alpha"] / config["r"])).language
    weights = {n: t for n, t in tensors.items() if n.startswith("weights/")}
    official(case, from_internlm2(weights, groups=config["kv"], head_dim=config["head_dim"]), language)
    real, visual = tensors["inputs/attention_mask"].bool(), tensors["inputs/im_mask"].bool()
    positions = real.cumsum(1) - 1
    for mask, name in ((visual, "outputs/logits"), (torch.zeros_like(visual), "outputs/logits_mask_off")):
        expected = tensors[name][real]  # 3.6e-6 seen
        inputs = LayerInputs(positions, mask.flatten().nonzero().squeeze(1))
        torch.testing.assert_close(batched(language, tensors, inputs)[real], expected, atol=3e-5, rtol=0)
        sequences = [
            TokenSequence(ids[keep], torch.zeros_like(ids[keep]), visual=one[keep].nonzero().squeeze(1))
            for ids, keep, one in zip(tensors["inputs/input_ids"], real, mask, strict=True)
        ]
        row, embeds = Row.pack(sequences), tensors["outputs/inputs_embeds"][real]
        torch.testing.assert_close(label_logits(language, embeds, row), expected, atol=3e-5, rtol=0)


def test_an_expert_costs_what_the_language_model_costs() -> None:
    config = LLAMA | {"vocab_size": 64}
    plain, routed = Holder(config).language, Holder(config, VisualExpert()).language
    targets = torch.zeros(40, dtype=torch.int64)
    row = Row.pack([TokenSequence(targets, targets, visual=torch.arange(n, 20 + n)) for n in (2, 9)])
    embeds = torch.randn(80, 32, requires_grad=True)
    counts = []
    for language in (plain, routed):
        with FlopCounterMode(display=False) as counter:
            label_logits(language, embeds, row).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# -- the same everywhere

TOLD = [name for name, system in SYSTEMS.items() if system.surgery]


def trained(name: str, **changes: Any) -> Any:
    module = build(name, **changes)
    disturb(module, module.trained_names())
    return module


def unchanged(name: str) -> Any:
    module = make(name, {"connector": RATE})
    module.surgery = []
    module.configure_model()
    return module


@torch.no_grad()
def continued(module: Any, sample: Any, count: int) -> str:
    """A greedy answer without a cache: the whole row again for each token, as in training."""
    item = module.codec.encode(sample, generate=True)
    batch = collate_prompt(module, item)
    row, embeds, context = batch.text, module.embed_row(batch), module.layer_inputs(batch).context
    ids: list[int] = []
    positions = row.positions
    for _ in range(count):
        targets = torch.full((len(embeds),), IGNORE)
        targets[-1] = 0
        sequence = TokenSequence(torch.zeros_like(targets), targets, positions=positions, visual=row.visual)
        now = Row.pack([sequence])
        ids.append(int(label_logits(module.language, embeds, now, LayerInputs.of(now, context)).argmax()))
        if ids[-1] == module.codec.tokenizer.eos_id:
            break
        embeds = torch.cat([embeds, module.language.get_input_embeddings()(torch.tensor(ids[-1:]))])
        positions = torch.cat([positions, positions[-1:] + 1])
    return module.codec.decode(ids)


def collate_prompt(module: Any, item: Any) -> Any:
    return module.codec.collate([item], counts={"images": float(len(item.sample.images))})


@pytest.mark.parametrize("name", TOLD)
def test_answers_with_a_cache_equal_those_without(name: str, tmp_path: Path) -> None:
    module, asked = trained(name), questions(tmp_path)
    base = unchanged(name)
    assert module.generate(asked, decoding=Decoding(max_new_tokens=8)) == [continued(module, s, 8) for s in asked]
    new = {n for n, _ in module.named_parameters()} - {n for n, _ in base.named_parameters()}
    changed = build(name)
    disturb(changed, new)  # of the new paths alone: text answers as before, images do not
    expected = base.generate(asked, decoding=Decoding(max_new_tokens=8))
    found = changed.generate(asked, decoding=Decoding(max_new_tokens=8))
    assert [a == b for a, b in zip(found, expected, strict=True)] == [not sample.images for sample in asked]


@pytest.mark.parametrize("beams", [1, 3])
def test_keys_and_values_of_images_are_computed_once(beams: int, tmp_path: Path) -> None:
    module, calls = trained("cogagent"), []
    for layer in module.language.model.layers:
        layer.cross_attn.key_value.register_forward_hook(lambda *_: calls.append(1))
    module.generate(questions(tmp_path), decoding=Decoding(max_new_tokens=5, min_new_tokens=5, num_beams=beams))
    assert len(calls) == len(module.language.model.layers)


@pytest.mark.parametrize("name", TOLD)
def test_the_chosen_option_knows_the_image(name: str, tmp_path: Path) -> None:
    module = trained(name)
    asked = [dataclasses.replace(sample, choices=tuple(ascii_uppercase)) for sample in questions(tmp_path)]
    encode = module.codec.tokenizer.encode
    texts = [encode(f" {letter} is right")[0] for letter in ascii_uppercase]
    wanted = []
    for sample in asked:
        batch = collate_prompt(module, module.codec.encode(sample, generate=True))
        with torch.no_grad(), batched_attention(module.language):
            embeds, inputs, losses = module.embed_row(batch), module.layer_inputs(batch), []
            for ids in texts:
                after = module.language.get_input_embeddings()(torch.tensor(ids[:-1]))
                whole = torch.cat([embeds, after])[None]
                positions = torch.cat([inputs.positions, inputs.positions[-1] + torch.arange(1, len(ids))])[None]
                logits = module.language(
                    inputs_embeds=whole,
                    attention_mask=torch.ones(whole.shape[:2]),
                    position_ids=positions,
                    use_cache=False,
                    layer_inputs=dataclasses.replace(inputs, positions=positions),
                ).logits[0, len(embeds) - 1 :]
                losses.append(nn.functional.cross_entropy(logits, torch.tensor(ids)).item())
        wanted.append(ascii_uppercase[losses.index(min(losses))])
    decoding = Decoding(options=" {} is right")
    assert module.generate(asked, decoding=decoding) == wanted
    assert [module.generate([sample], decoding=decoding)[0] for sample in asked] == wanted
    assert len(set(wanted)) > 1
    texts_of = {letter: f" {letter} is right" for letter in ascii_uppercase}
    among = Decoding(candidates=list(texts_of.values()))  # type: ignore[arg-type]  (as files deliver them)
    assert module.generate(asked, decoding=among) == [texts_of[letter] for letter in wanted]


@pytest.mark.parametrize("name", TOLD)
def test_text_in_a_mixed_pack_is_what_it_was(name: str, tmp_path: Path) -> None:
    module, pool = build(name), samples(tmp_path)
    base = unchanged(name)
    disturb(module, {n for n, _ in module.named_parameters()} - {n for n, _ in base.named_parameters()})
    batch = collate(module, pool)
    with torch.no_grad():
        difference = (module.label_logits(batch) - base.label_logits(batch)).abs().amax(1)
    sequence = torch.searchsorted(batch.text.cu_seqlens[1:].long(), batch.text.label_positions, right=True)
    is_text = torch.tensor([not pool[owner].images for owner in batch.text.owner[sequence].tolist()])
    # partial LoRA adds to image tokens alone; the expert's products are of other shapes, which may sum in another order
    assert difference[is_text].max() <= (0 if name.startswith("xcomposer2") else 1e-5)
    assert difference[~is_text].min() > 1e-4


@pytest.mark.parametrize("name", TOLD)
def test_two_forwards_before_one_backward_under_recomputation(name: str, tmp_path: Path) -> None:
    """Each row's layers are told of that row when they run again."""
    pool = samples(tmp_path)
    found = []
    for checkpointing in (False, True):
        module = trained(name, language=CausalLM(config=LLAMA, checkpointing=checkpointing)).double()
        total = sum(sum(module.losses(collate(module, [pool[i]], of=pool)).values()) for i in (0, 1, 2))
        total.backward()
        found.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    for gradient_name, gradient in found[0].items():
        torch.testing.assert_close(found[1][gradient_name], gradient, rtol=1e-11, atol=1e-13)


def test_what_cannot_be_told_is_refused() -> None:
    language = Holder(LLAMA, PartialLoRA(rank=2)).language
    with pytest.raises(ValueError, match="takes `layer_inputs`"):
        language(input_ids=torch.tensor([[1, 2]]), use_cache=False)
    with pytest.raises(ValueError, match="was told nothing"):
        language.model.layers[0].mlp.up_proj(torch.zeros(1, 32))
    changed, ids = Holder(LLAMA, CrossAttention(context=8, width=8, heads=2)).language, torch.tensor([1, 2])
    row, embeds = Row.pack([TokenSequence(ids, ids)]), changed.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="takes a context"):
        label_logits(changed, embeds, row)
    with pytest.raises(UserError, match=r"in no layer"):
        Holder(LLAMA, PartialLoRA(rank=2, targets=[r"language\.lm_head"]))
    with pytest.raises(UserError, match="matches no linear layer"):
        Holder(LLAMA, PartialLoRA(rank=2, targets=["q_proj"]))
    opt = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    for surgery in (VisualExpert(), CrossAttention(context=8, width=8, heads=2)):
        with pytest.raises(UserError, match="Llama's kind"):
            Holder({"model_type": "gpt_neox", "intermediate_size": 16, **opt}, surgery)
