"""BLIP's captions, answers and judgements against the published code's numbers and rules."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import golden, golden_json
from tests.support.blip_tasks import TOWER, blip_caption
from vlm.batch import Batch
from vlm.checkpoints.tables.bert import bert_unused, med_rules
from vlm.checkpoints.tables.table import Table
from vlm.codec import step_counts
from vlm.errors import UserError
from vlm.language import Decoding, Med
from vlm.prompts import BertTokenizer
from vlm.sample import ImageFile, ImagePart, Message, Sample, TextPart

CASE = "blip_generate__a"


class Features(nn.Module):
    """A tower that has seen the images already."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = nn.Parameter(features, requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.features[: len(pixels)]


def pack(module: Any, samples: list[Sample], *, generate: bool = False, seed: int | None = None) -> Batch:
    items = [module.codec.encode(sample, generate=generate, seed=seed) for sample in samples]
    return module.codec.collate(items, counts=step_counts(items))


def image() -> ImageFile:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return ImageFile("grey", data=file.getvalue())


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Tensor], Any]:
    """The published captioner, its tower replaced by what it made of three images."""
    tensors, meta = golden(CASE), golden_json(CASE)
    config = meta["config"]
    folder = tmp_path_factory.mktemp("bert")
    added = ["[DEC]", "[ENC]"]
    words = [word for word in meta["bert_vocab"] if word not in added]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    language = Med(
        dim=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        encoder=False,
    )
    module = blip_caption(
        vision=dataclasses.replace(TOWER, options={**TOWER.options, "embed_dim": config["encoder_width"]}),
        language=language,
        tokenizer=BertTokenizer(str(folder)),
        max_tokens=config["max_position_embeddings"],
        label_smoothing=0.1,
    )
    module.configure_model()
    weights = {n.removeprefix("weights/"): t for n, t in tensors.items() if n.startswith("weights/text_decoder")}
    table = Table("BLIP", med_rules(encoder=None, decoder="text_decoder."), unused=bert_unused(ours="language."))
    ours, _ = table.to_ours(weights.items())
    module.language.load_state_dict({name.removeprefix("language."): tensor for name, tensor in ours.items()})
    module.vision = Features(tensors["inputs/image_embeds"])
    return module.eval(), tensors, meta


def captions(texts: list[str]) -> list[Sample]:
    return [
        Sample(str(at), (Message("user", (ImagePart(),)), Message("assistant", (TextPart(text),))), (image(),))
        for at, text in enumerate(texts)
    ]


def test_the_caption_loss_is_the_published_one(captioner: Any) -> None:
    """The prompt stands before each caption and is not trained; smoothing 0.1."""
    module, tensors, meta = captioner
    prompt = meta["config"]["prompt"]
    batch = pack(module, captions([text.removeprefix(prompt) for text in meta["captions"]]))
    ids, mask = tensors["inputs/caption_ids"].clone(), tensors["inputs/caption_mask"].bool()
    ids[:, 0] = meta["config"]["bos_token_id"]
    padded = batch.text.padded(0)  # without the last token, which is a target alone
    for row, own, real, targets in zip(ids, *padded, batch.text.owner, strict=True):
        assert own[real].tolist() == row[: real.sum()].tolist(), targets
    assert batch.text.targets.tolist() == [
        token for row, real in zip(ids, mask, strict=True) for token in row[real][meta["config"]["prompt_length"] :]
    ]
    loss = module.losses(batch)["lm"] / batch.counts["lm"]
    torch.testing.assert_close(loss, tensors["outputs/loss_lm"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("run", range(4))
def test_captions_are_the_published_ones(captioner: Any, run: int) -> None:
    """Published lengths count the prompt of four tokens."""
    module, _, meta = captioner
    arguments, given = meta["runs"][run]["args"], meta["config"]["prompt_length"]
    decoding = Decoding(
        max_new_tokens=arguments["max_length"] - given,
        min_new_tokens=arguments["min_length"] - given,
        num_beams=arguments["num_beams"],
        repetition_penalty=arguments.get("repetition_penalty", 1.0),
    )
    assert module.answers(pack(module, captions(["a"] * 3), generate=True), decoding) == meta["runs"][run]["captions"]


def test_the_prompt_is_the_users_if_there_is_one(captioner: Any) -> None:
    module, _, _ = captioner
    [plain] = captions(["a dog"])
    asked = dataclasses.replace(
        plain, messages=(Message("user", (ImagePart(), TextPart("\na photo of"))), plain.messages[1])
    )
    begun = dataclasses.replace(plain, messages=(plain.messages[0], dataclasses.replace(plain.messages[1], begun=True)))
    words = ["a picture of", "a photo of", "a picture of a dog"]
    for sample, text in zip((plain, asked, begun), words, strict=True):
        ids = pack(module, [sample], generate=True).text.ids.tolist()
        assert module.codec.tokenizer.decode(ids) == text
    assert pack(module, [asked]).text.targets.tolist() == [*module.codec.tokenizer.encode("a dog")[0], 3]
    sampled = Decoding(max_new_tokens=16, temperature=1.0, top_p=0.9, repetition_penalty=1.1)
    drawn = {module.generate(plain, decoding=dataclasses.replace(sampled, seed=seed)) for seed in range(4)}
    assert len(drawn) > 1
    with pytest.raises(UserError, match="written, not chosen"):
        module.generate(plain, candidates=("a dog",))
