"""The search: ends, least lengths and text marks, and encoder-decoders against transformers' own."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from vlm.language import CausalLM, Decoding
from vlm.language.generation import DecoderPrompt, generate
from vlm.language.layer_inputs import Prompt

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LONG = Decoding(max_new_tokens=16)


@pytest.fixture(scope="module")
def decoder() -> PreTrainedModel:
    torch.manual_seed(0)
    model = CausalLM(config={"model_type": "llama", **SMALL}).build().eval()
    for weight in model.state_dict().values():
        weight *= 6  # so that the next token is another each time
    return model


@pytest.fixture(scope="module")
def prompts(decoder: PreTrainedModel) -> list[Prompt]:
    ids = [torch.randint(1, 64, (n,)) for n in (9, 2, 5)]
    embed = decoder.get_input_embeddings()
    return [Prompt(embed(one), torch.arange(len(one)), torch.zeros(len(one), dtype=torch.bool)) for one in ids]


def written(ids: Sequence[int]) -> str:
    return "".join(chr(ord("0") + token) for token in ids)


def ask(decoder: PreTrainedModel, prompts: Sequence[Prompt], decoding: Decoding, ends: Sequence[int], *stop: str):
    """Answers, the same ones that each prompt gets alone."""

    def search(chosen: Sequence[Prompt], seeds: Sequence[int]) -> list[list[int]]:
        return generate(
            decoder, chosen, decoding=decoding, seeds=seeds, end_ids=ends, pad_id=0, stop=stop, decode=written
        )

    together = search(prompts, range(len(prompts)))
    assert together == [search([prompt], [seed])[0] for seed, prompt in enumerate(prompts)]
    return together


@pytest.mark.parametrize("num_beams", [1, 3])
def test_any_of_several_tokens_ends_an_answer(decoder: PreTrainedModel, prompts: list[Prompt], num_beams: int) -> None:
    decoding = Decoding(max_new_tokens=16, num_beams=num_beams)
    free = ask(decoder, prompts, decoding, [0])
    ends = [ids[4] for ids in free]
    assert len(set(ends)) == len(prompts)
    cut = ask(decoder, prompts, decoding, ends)
    assert all(ids[-1] in ends and not set(ids[:-1]) & set(ends) for ids in cut)
    if num_beams == 1:
        assert cut == [ids[: 1 + next(at for at, token in enumerate(ids) if token in ends)] for ids in free]


@pytest.mark.parametrize(
    "search", [{}, {"num_beams": 3}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "beams", "sampled"]
)
@pytest.mark.parametrize("length", [1, 2])
def test_no_end_before_the_least_length(
    decoder: PreTrainedModel, prompts: list[Prompt], search: dict, length: int
) -> None:
    """A mark of one or two tokens that each answer would soon have, as a text and (the first) as a token."""
    free = ask(decoder, prompts, Decoding(max_new_tokens=16, **search), [0])
    marks = [written(ids[2 : 2 + length]) for ids in free]
    ends = [ids[1] for ids in free]
    short = ask(decoder, prompts, Decoding(max_new_tokens=16, **search), [0], *marks)
    if "num_beams" not in search:  # beams may find a longer answer that is likelier
        assert max(len(ids) for ids in short) <= 4
    for stop in (marks, []):
        decoding = Decoding(max_new_tokens=16, min_new_tokens=10, **search)
        answers = ask(decoder, prompts, decoding, [0] if stop else ends, *stop)
        for ids in answers:
            assert len(ids) > 10
            assert not any(mark in written(ids[:10]) for mark in stop)
            assert stop or not set(ids[:10]) & set(ends)


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("penalty", [1.0, -1.0])
def test_an_encoder_decoder_answers_as_by_itself(num_beams: int, penalty: float) -> None:
    """T5, one text at a time by transformers alone; here all together, and with the start of an answer given."""
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    model.lm_head.weight.data.normal_(std=1.0)
    texts = [torch.randint(2, 64, (n,)) for n in (9, 3, 6)]
    decoding = Decoding(max_new_tokens=10, min_new_tokens=3, num_beams=num_beams, length_penalty=penalty)
    starts = [torch.tensor([0]), torch.tensor([0, 7, 9, 11]), torch.tensor([0, 5])]
    expected: list[list[int]] = []
    prompts = []
    for ids, start in zip(texts, starts, strict=True):
        found: Tensor = model.generate(
            ids[None],
            decoder_input_ids=start[None],
            max_new_tokens=10,
            min_new_tokens=3,
            num_beams=num_beams,
            length_penalty=penalty,
            eos_token_id=1,
            pad_token_id=0,
        )
        answer = found[0, len(start) :].tolist()
        expected.append(answer[: answer.index(1) + 1] if 1 in answer else answer)
        with torch.no_grad():
            prompts.append(DecoderPrompt(model.encoder(ids[None])[0][0], start))
    answers = generate(model, prompts, decoding=decoding, seeds=[0] * 3, end_ids=[1], pad_id=0)
    assert answers == expected
    assert len(set(map(tuple, answers))) == 3
