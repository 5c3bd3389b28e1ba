"""BLIP's text model against the official numbers of its pre-training step and its captioner."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import golden, golden_json
from vlm.checkpoints.tables.bert import bert_unused, med_rules
from vlm.checkpoints.tables.table import Table
from vlm.language import Decoding, Med
from vlm.language.generation import DecoderPrompt, generate
from vlm.language.med import MedModule, MedSearch

TOLERANCE: dict[str, float] = {"atol": 2e-5, "rtol": 1e-5}
"""Float32 noise between SDPA and the published softmax: at most 2.1e-6 seen on hidden states of size 4."""
ENCODER, DECODER = "text_encoder.", "text_decoder."


def published(case: str, config: Any, *, encoder: bool, features_dim: int) -> tuple[MedModule, dict[str, Tensor]]:
    """A text model with the official weights, and all of the case; the weights come back bit-equal."""
    tensors = golden(case)
    weights = {n.removeprefix("weights/"): t for n, t in tensors.items() if n.startswith("weights/")}
    weights = {n: t for n, t in weights.items() if n.startswith((ENCODER, DECODER))}
    network = Med(
        dim=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        encoder=encoder,
    ).build(features_dim)
    rules = med_rules(encoder=ENCODER if encoder else None, decoder=DECODER)
    table = Table(layout="BLIP", rules=rules, unused=bert_unused(ours="language."))
    ours, carried = table.to_ours(weights.items())
    network.load_state_dict({name.removeprefix("language."): tensor for name, tensor in ours.items()})
    back = table.from_ours({f"language.{n}": t for n, t in network.state_dict().items()}, carried)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    return network.eval(), tensors


def test_reads_and_writes_with_one_stack() -> None:
    """A text alone, with its own image and others, and predicted from its image; losses and gradients of each."""
    case = "blip_pretrain_step__a"
    config = golden_json(case)["config"]
    network, tensors = published(case, config["med"], encoder=True, features_dim=config["med"]["encoder_width"])
    ids, mask = tensors["inputs/input_ids"], tensors["inputs/attention_mask"].bool()
    images = tensors["outputs/image_embeds"]
    alone = network.read(ids, mask)
    torch.testing.assert_close(alone[mask], tensors["outputs/text_only_last_hidden_state"][mask], **TOLERANCE)
    projected = F.linear(alone[:, 0], tensors["weights/text_proj.weight"], tensors["weights/text_proj.bias"])
    torch.testing.assert_close(projected, tensors["outputs/text_proj_unnormalised"], **TOLERANCE)

    first = ids.clone()
    first[:, 0] = config["enc_token_id"]
    matched = network.read(first, mask, images)
    torch.testing.assert_close(matched[mask], tensors["outputs/itm_pos_last_hidden_state"][mask], **TOLERANCE)
    image, text = tensors["inputs/neg_image_for_text"], tensors["inputs/neg_text_for_image"]
    # the text with another image, then the image with another text
    others = network.read(
        torch.cat([first, first[text]]), torch.cat([mask, mask[text]]), torch.cat([images[image], images])
    )
    torch.testing.assert_close(others[:, 0], tensors["outputs/itm_neg_cls"], **TOLERANCE)
    pairs = torch.cat([matched[:, 0], others[:, 0]])
    match = F.linear(pairs, tensors["weights/itm_head.weight"], tensors["weights/itm_head.bias"])
    torch.testing.assert_close(match, tensors["outputs/itm_logits"], **TOLERANCE)

    start = ids.clone()
    start[:, 0] = config["bos_token_id"]
    logits = network.logits(network.write(start, images))
    # 1.4e-5 seen on logits of size 10
    torch.testing.assert_close(logits[mask], tensors["outputs/lm_logits"][mask], atol=5e-5, rtol=1e-5)

    labels = torch.tensor([1] * len(ids) + [0] * 2 * len(ids))
    losses = {
        "itm": F.cross_entropy(match, labels),
        "lm": F.cross_entropy(logits[:, :-1][mask[:, 1:]], start[:, 1:][mask[:, 1:]], label_smoothing=0.1),
    }
    names = {
        "text_encoder.embeddings.word_embeddings.weight": "embeddings.words.weight",
        "text_encoder.encoder.layer.0.attention.self.query.weight": "layers.0.attention.query.weight",
        "text_encoder.encoder.layer.1.crossattention.self.key.weight": "layers.1.cross_attention.key.weight",
        "text_decoder.bert.encoder.layer.0.attention.self.query.weight": "layers.0.decoder_attention.query.weight",
        "text_decoder.cls.predictions.transform.dense.weight": "head.dense.weight",
        "text_decoder.cls.predictions.bias": "head.bias",
    }
    for term, loss in losses.items():
        torch.testing.assert_close(loss, tensors[f"outputs/loss_{term}"], atol=1e-5, rtol=1e-5)
        network.zero_grad()
        loss.backward(retain_graph=True)
        published_gradients = {n: tensors.get(f"outputs/grad_{term}/{n}") for n in names}
        assert sum(gradient is not None for gradient in published_gradients.values()) >= 3
        for name, gradient in published_gradients.items():
            ours = network.get_parameter(names[name]).grad
            if gradient is not None:
                torch.testing.assert_close(ours, gradient, atol=1e-6 + 1e-5 * gradient.abs().max().item(), rtol=1e-4)
    # reading does not pass the self-attention of writing, and the other way round
    assert network.layers[0].attention.query.weight.grad is None
    assert network.layers[0].decoder_attention.query.weight.grad is not None


@pytest.fixture(scope="module")
def captioner() -> tuple[MedModule, dict[str, Tensor], Any]:
    case = "blip_generate__a"
    meta = golden_json(case)
    network, tensors = published(case, meta["config"], encoder=False, features_dim=meta["config"]["encoder_width"])
    return network, tensors, meta


def test_the_captioner_predicts_as_published(captioner: Any) -> None:
    network, tensors, meta = captioner
    images, sequences = tensors["inputs/image_embeds"], tensors["outputs/sequences_0"]
    logits = network.logits(network.write(sequences, images))
    expected = tensors["outputs/teacher_forced_logits_on_sequences_0"]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)  # 1.9e-5 seen; they reach 40
    ids, mask = tensors["inputs/caption_ids"].clone(), tensors["inputs/caption_mask"].bool()
    ids[:, 0] = meta["config"]["bos_token_id"]
    trained = mask.clone()
    trained[:, : meta["config"]["prompt_length"]] = False
    logits = network.logits(network.write(ids, images))
    loss = F.cross_entropy(logits[:, :-1][trained[:, 1:]], ids[:, 1:][trained[:, 1:]], label_smoothing=0.1)
    torch.testing.assert_close(loss, tensors["outputs/loss_lm"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("run", range(4))
def test_captions_are_those_of_the_published_search(captioner: Any, run: int) -> None:
    """Greedy and with beams, with a repetition penalty, and not before a least length; each image alone, too."""
    network, tensors, meta = captioner
    arguments, end = meta["runs"][run]["args"], meta["config"]["sep_token_id"]
    expected = meta["runs"][run]["sequences"]
    prompt = torch.tensor(expected[0][: meta["config"]["prompt_length"]])
    prompts = [DecoderPrompt(image, prompt) for image in tensors["inputs/image_embeds"]]
    decoding = Decoding(
        max_new_tokens=arguments["max_length"] - len(prompt),
        min_new_tokens=arguments["min_length"] - len(prompt),
        num_beams=arguments["num_beams"],
        repetition_penalty=arguments.get("repetition_penalty", 1.0),
    )

    def captions(chosen: list[DecoderPrompt]) -> list[list[int]]:
        search = MedSearch(network, end_id=end)
        return generate(search, chosen, decoding=decoding, seeds=[0] * len(chosen), end_ids=[end], pad_id=0)

    wanted = [[id for id in ids[len(prompt) :] if id] for ids in expected]
    assert captions(prompts) == wanted
    assert [captions([one])[0] for one in prompts] == wanted


def test_texts_of_unequal_length_are_written_together(captioner: Any) -> None:
    """Prompts padded on the left and features on the right change no answer."""
    network, tensors, meta = captioner
    search = MedSearch(network, end_id=meta["config"]["sep_token_id"])
    start = torch.tensor(meta["runs"][0]["sequences"][0])
    images = tensors["inputs/image_embeds"]
    prompts = [DecoderPrompt(image[:m], start[:n]) for image, m, n in zip(images, (2, 6, 4), (5, 1, 3), strict=True)]
    for num_beams in (1, 3):
        decoding = Decoding(max_new_tokens=8, num_beams=num_beams)
        together, *alone = (
            generate(search, chosen, decoding=decoding, seeds=[0] * len(chosen), end_ids=[3], pad_id=0)
            for chosen in (prompts, *([one] for one in prompts))
        )
        assert together == [one[0] for one in alone]
        assert len(set(map(tuple, together))) == 3
