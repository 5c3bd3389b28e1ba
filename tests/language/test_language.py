"""The language part: packed attention, label positions, partial LoRA."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.conftest import golden, golden_json
from vlm.batch import Row, TokenSequence, next_token_targets
from vlm.errors import UserError
from vlm.language import CausalLM, Decoding, PartialLoRA
from vlm.language.attention import packed_attention
from vlm.language.causal_lm import label_logits
from vlm.language import choosing
from vlm.language.choosing import weigh_candidates, weigh_options
from vlm.language.layer_inputs import LayerInputs, Prompt, informing
from vlm.language.partial_lora import PartialLoRALinear

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gemma": {},
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 5.0},
}


def row(*lengths: int) -> Row:
    sequences = []
    for length in lengths:
        ids = torch.randint(1, 64, (length,))
        labels = ids.clone()
        labels[: length // 2] = -100
        sequences.append(TokenSequence(ids, next_token_targets(labels)))
    return Row.pack(sequences)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_row_equals_separate_forwards(family: str) -> None:
    packed = CausalLM(config={"model_type": family, **SMALL, **FAMILIES[family]}).build().eval()
    reference = AutoModelForCausalLM.from_config(packed.config, attn_implementation="eager").eval()
    reference.load_state_dict(packed.state_dict())
    batch = row(11, 3, 7)
    ours = label_logits(packed, packed.get_input_embeddings()(batch.ids), batch)
    theirs = []
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        theirs.append(reference(input_ids=batch.ids[None, start:end], use_cache=False).logits[0])
    # eager and SDPA sum in another order: 5e-7 seen
    torch.testing.assert_close(ours, torch.cat(theirs)[batch.label_positions], atol=5e-6, rtol=1e-5)


def test_a_sequence_never_sees_its_neighbour() -> None:
    model = CausalLM(config={"model_type": "llama", **SMALL}).build().eval()
    one = row(6, 9)
    embeds = model.get_input_embeddings()(one.ids).detach()
    changed = embeds.clone()
    changed[:6] += 1.0
    first, second = (label_logits(model, e, one) for e in (embeds, changed))
    of_second = one.label_positions >= 6
    assert torch.equal(first[of_second], second[of_second])
    assert not torch.allclose(first[~of_second], second[~of_second])


def test_packed_attention_refuses_what_it_would_get_wrong() -> None:
    q = torch.zeros(2, 1, 4, 8)
    with pytest.raises(ValueError, match="cu_seqlens"):
        packed_attention(nn.Identity(), q, q, q, None)
    q, bounds = q[:1], torch.tensor([0, 4])
    with pytest.raises(ValueError, match="together"):
        packed_attention(nn.Identity(), q, q, q, None, cu_seqlens=bounds, max_len=4, cu_seqlens_k=bounds)
    for wrong in ({"cu_seqlens_k": bounds, "max_len_k": 4}, {"sliding_window": 2, "is_causal": False}):
        with pytest.raises(ValueError, match="causal"):
            packed_attention(nn.Identity(), q, q, q, None, cu_seqlens=bounds, max_len=4, **wrong)


def test_language_errors_name_the_key(tmp_path) -> None:
    with pytest.raises(UserError, match="model_type"):
        CausalLM().transformers_config()
    with pytest.raises(UserError, match=r"no config.json in .*give a folder"):
        CausalLM(path=str(tmp_path)).transformers_config()
    with pytest.raises(UserError, match="num_beams: 1"):
        Decoding(temperature=0.5, num_beams=2)


def test_the_option_with_the_lowest_mean_loss_is_chosen() -> None:
    packed = CausalLM(config={"model_type": "qwen2", **SMALL}).build().eval()
    reference = AutoModelForCausalLM.from_config(packed.config, attn_implementation="eager").eval()
    for weight in packed.state_dict().values():
        weight *= 4  # so that losses differ
    reference.load_state_dict(packed.state_dict())
    prompts = [torch.randint(1, 64, (n,)) for n in (9, 1, 4, 6, 5, 7)]
    lengths = ((1, 1, 1), (2, 1), (1,), (3, 1, 2), (1, 4), (2, 2))
    options = [[torch.randint(1, 64, (n,)).tolist() for n in group] for group in lengths]
    wanted = []
    for prompt, group in zip(prompts, options, strict=True):
        losses = []
        for ids in group:
            whole = torch.cat([prompt, torch.tensor(ids)])
            logits = reference(input_ids=whole[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
            losses.append(nn.functional.cross_entropy(logits, whole[len(prompt) :]).item())
        wanted.append(losses.index(min(losses)))
    assert len(set(wanted)) > 1
    told = [
        Prompt(packed.get_input_embeddings()(ids), torch.arange(len(ids)), torch.zeros(len(ids), dtype=torch.bool))
        for ids in prompts
    ]
    assert [int(losses.argmin()) for losses in weigh_options(packed, told, options)] == wanted
    with pytest.raises(UserError, match=r"options must have one \{\}"):
        Decoding(options="A")


def test_samples_follow_the_probabilities() -> None:
    """Of the tokens that temperature, top_k and top_p leave, each is drawn as often as it is probable."""
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]]).repeat(4000, 1)
    (sampling,) = Decoding(temperature=2.0, top_k=4, top_p=0.9).processors(range(4000))
    drawn = sampling(torch.zeros(4000, 1, dtype=torch.int64), scores).argmax(-1)
    kept = (scores[0] / 2.0)[[0, 1, 2, 4]].softmax(-1)  # the smallest is not in the first four
    order = kept.argsort(descending=True)
    inside = order[: int((kept[order].cumsum(0) < 0.9).sum()) + 1]
    expected = torch.zeros(5)
    expected[torch.tensor([0, 1, 2, 4])[inside]] = kept[inside] / kept[inside].sum()
    torch.testing.assert_close(drawn.bincount(minlength=5) / 4000, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("case", ["xc2_plora_linear__a"])
def test_partial_lora_equals_the_official_layer(case: str) -> None:
    tensors, config = golden(case), golden_json(case)["config"]
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config["bias"])
    layer = PartialLoRALinear(linear, PartialLoRA(rank=config["lora_r"], scale=config["lora_alpha"] / config["lora_r"]))
    layer.load_state_dict({k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")})
    x = tensors["inputs/x"].requires_grad_()
    mask = tensors["inputs/im_mask"].bool()
    told = LayerInputs(torch.zeros_like(mask), mask.flatten().nonzero().squeeze(1))
    with informing(layer, told):
        y = layer(x)
    torch.testing.assert_close(y, tensors["outputs/y"], atol=1e-5, rtol=0)
    (y * tensors["inputs/grad_probe"]).sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, tensors[f"outputs/grad/{name}"], rtol=1e-4, atol=1e-6)
    with informing(layer, LayerInputs(torch.zeros_like(mask), torch.zeros(0, dtype=torch.int64))):
        torch.testing.assert_close(layer(x), tensors["outputs/y_all_false"], atol=1e-5, rtol=0)


def test_parameters_are_float32_whatever_the_folder_says(tmp_path) -> None:
    config = CausalLM(config={"model_type": "llama", **SMALL}).transformers_config()
    config.dtype = torch.float16  # as in Vicuna's config.json
    config.save_pretrained(tmp_path)
    assert {p.dtype for p in CausalLM(path=str(tmp_path)).build().parameters()} == {torch.float32}


@pytest.mark.parametrize("by", ["mean", "sum"])
def test_many_candidates_are_weighed_behind_one_prompt(by, monkeypatch, tmp_path) -> None:
    """As one by one, and each prompt is computed once: forwards grow with the candidates' tokens alone."""
    packed = CausalLM(config={"model_type": "llama", **SMALL}).build().eval()
    for weight in packed.state_dict().values():
        weight *= 4
    generator = torch.Generator().manual_seed(3)
    told = [
        Prompt(packed.get_input_embeddings()(ids), torch.arange(len(ids)), torch.zeros(len(ids), dtype=torch.bool))
        for ids in (torch.randint(1, 64, (n,), generator=generator) for n in (9, 2, 5))
    ]
    candidates = [torch.randint(1, 64, (1 + at % 4,), generator=generator).tolist() for at in range(40)]
    one_by_one = torch.stack([weigh_options(packed, [prompt], [candidates], by=by)[0] for prompt in told])
    assert len(set(one_by_one.argmin(1).tolist())) > 1
    monkeypatch.setattr(choosing, "_CHUNK", 16)
    tokens = []
    packed.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    # sums in another order: 2e-6 seen on losses up to 30
    torch.testing.assert_close(weigh_candidates(packed, told, candidates, by=by), one_by_one, atol=2e-5, rtol=1e-5)
    assert tokens[0] == 3 * 9
    assert sum(tokens[1:]) == 3 * sum(len(ids) - 1 for ids in candidates)
    file = tmp_path / "ans2label.json"
    file.write_text('{"a dog": 0, "yes": 1}')
    assert Decoding(candidates_file=str(file)).candidates == ("a dog", "yes")
    file.write_text("[]")
    with pytest.raises(UserError, match="at least one"):
        Decoding(candidates_file=str(file))
