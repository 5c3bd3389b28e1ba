"""BLIP's captions, answers and judgements against the published code's numbers and rules, and transformers' classes."""

import dataclasses
import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vlm  # first: repairs torchvision
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForQuestionAnswering

from callbacks.stage_transition import write_stage
from tests.conftest import golden, golden_json
from tests.support.blip_tasks import (
    TOKENIZER,
    TOWER,
    VOCABULARY,
    answered,
    blip_caption,
    blip_nlvr,
    blip_vqa,
    sizes,
)
from tests.support.samples import pairs, picture
from vlm.batch import Batch
from vlm.building.build import assemble
from vlm.building.network import empty_weights
from vlm.checkpoints.published.family import get_family
from vlm.checkpoints.tables.bert import bert_unused, med_rules
from vlm.checkpoints.tables.table import Table
from vlm.codec import step_counts
from vlm.commands.convert import convert
from vlm.commands.export import export
from vlm.errors import UserError
from vlm.language import Decoding, Med, PairMed
from vlm.prompts import BertTokenizer
from vlm.sample import ImageFile, ImagePart, Message, Sample, TextPart
from vlm.stages import Stage, Trained
from vlm.systems import BLIPVQA, BLIPCaption
from vlm.vision import TimmTower

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


# -- questions and answers, against transformers


def hub_folder(kind: Any, folder: Path, *, width: int) -> Any:
    """A random model of transformers, saved with the vocabulary beside it; it is in eval mode."""
    text = {"hidden_size": 32, "encoder_hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "vocab_size": 104, "max_position_embeddings": 64, "bos_token_id": 102}
    vision = {"hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 7, "initializer_range": 0.2}
    ends = {"sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    model = kind(BlipConfig(text_config=text | ends, vision_config=vision)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.normal_(std=0.4)
    model.save_pretrained(folder)
    shutil.copyfile(VOCABULARY / "vocab.txt", folder / "vocab.txt")
    return model


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, list[Sample], Path]:
    """A model of transformers, the same as ours opens it, and samples with several answers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vqa")
    theirs = hub_folder(BlipForQuestionAnswering, folder / "hf", width=32)
    return theirs, vlm.load(folder / "hf"), answered(folder, 9), folder


def decoded(theirs: Any, ours: Any, sample: Sample, ids: Tensor) -> Tensor:
    """float[A, n, vocabulary] of transformers' decoder behind one question."""
    batch = pack(ours, [sample])
    with torch.no_grad():
        image = theirs.vision_model(batch.views["image"].pixels)[0]
        states = theirs.text_encoder(batch.text.ids[None], encoder_hidden_states=image)[0]
        return theirs.text_decoder(ids, encoder_hidden_states=states.expand(len(ids), -1, -1)).logits


def test_a_question_costs_the_sum_over_its_answers_tokens(questions: Any) -> None:
    """Times the weight of each answer, smoothed by 0.1, over the number of questions."""
    theirs, ours, samples, _ = questions
    weights = (0.6, 0.3, 0.1)
    samples = [
        dataclasses.replace(
            sample, answers=tuple((text, w) for (text, _), w in zip(sample.answers, weights, strict=False))
        )
        for sample in samples
    ]
    expected = torch.zeros(())
    for sample in samples:
        item = ours.codec.encode(sample)
        for (_, weight), text in zip(sample.answers, item.rows["answers"], strict=True):
            logits = decoded(theirs, ours, sample, text.ids[None])[0]
            expected += weight * F.cross_entropy(logits, text.targets, reduction="sum", label_smoothing=0.1)
    batch = pack(ours, samples)
    assert batch.counts["lm"] == len(samples)
    torch.testing.assert_close(ours.losses(batch)["lm"], expected, atol=1e-4, rtol=1e-5)  # 1.5e-5 seen of 200


def test_the_answer_is_the_candidate_of_the_published_ranking(questions: Any) -> None:
    """The likeliest first tokens, then the smallest smoothed loss; against the same rule on transformers' logits."""
    theirs, ours, samples, _ = questions
    texts = (
        "red card",
        "a ball",
        "two",
        "yes no",
        "no card",
        "red ball",
        "what is",
        "a card",
        "left",
        "right ball",
        "x y",
    )
    rows = [[102, *ours.codec.tokenizer.encode(text)[0], 3] for text in texts]
    wanted = []
    for sample in samples:
        first = decoded(theirs, ours, sample, torch.tensor([[102]]))[0, 0].softmax(-1)
        likely = sorted(range(len(rows)), key=lambda at: -first[rows[at][1]].item())[:4]
        losses = []
        for at in likely:
            ids = torch.tensor(rows[at])
            logits = decoded(theirs, ours, sample, ids[None, :-1])[0]
            losses.append(F.cross_entropy(logits, ids[1:], reduction="sum", label_smoothing=0.1).item())
        wanted.append(texts[likely[losses.index(min(losses))]])
    ours.arguments["num_ranked"] = 4
    assert ours.generate(samples, candidates=texts) == wanted
    assert [ours.generate(sample, candidates=texts) for sample in samples] == wanted
    assert len(set(wanted)) > 1
    ours.arguments["num_ranked"] = 128  # more than there are


def test_answers_are_written_as_transformers_writes_them(questions: Any) -> None:
    theirs, ours, samples, _ = questions
    for sample in samples:
        batch = pack(ours, [sample], generate=True)
        ids = theirs.generate(
            input_ids=batch.text.ids[None], pixel_values=batch.views["image"].pixels, max_length=8, num_beams=1
        )
        assert ours.generate(sample, max_new_tokens=7) == ours.codec.decode(ids[0].tolist())


def test_frames_of_a_video_are_looked_at_together(questions: Any, tmp_path: Path) -> None:
    """Their features stand side by side; a sample of one image in the same pack does not see the padding."""
    theirs, ours, samples, _ = questions
    frames = tuple(picture(tmp_path, f"frame{at}", (30, 40), at) for at in range(16))
    message = Message("user", (*[ImagePart()] * 16, TextPart("what is it?")))
    video = dataclasses.replace(samples[0], messages=(message, samples[0].messages[1]), images=frames)
    batch = pack(ours, [video])
    with torch.no_grad():
        image = theirs.vision_model(batch.views["image"].pixels)[0].flatten(0, 1)[None]
        states = theirs.text_encoder(batch.text.ids[None], encoder_hidden_states=image)[0]
        found, mask = ours.question_states(batch)
        together, _ = ours.question_states(pack(ours, [samples[1], video, samples[2]]))
    torch.testing.assert_close(found, states, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(together[1, : found.shape[1]][mask[0]], found[0], atol=2e-5, rtol=1e-5)


def test_captions_of_transformers(tmp_path: Path) -> None:
    """Logits, and answers of the search, of a folder that is opened as it is."""
    theirs = hub_folder(BlipForConditionalGeneration, tmp_path / "hf", width=24)
    ours, samples = vlm.load(tmp_path / "hf"), pairs(tmp_path, 3)
    for sample in samples:
        batch = pack(ours, [sample])
        pixels = batch.views["image"].pixels
        with torch.no_grad():
            image = theirs.vision_model(pixels)[0]
            logits = theirs.text_decoder(batch.text.ids[None], encoder_hidden_states=image).logits[0]
            found = ours.label_logits(batch)
        torch.testing.assert_close(found, logits[batch.text.label_positions], atol=1e-4, rtol=1e-5)
        given = pack(ours, [sample], generate=True).text.ids
        # transformers drops the last id of a prompt, which is its [SEP]
        ids = theirs.generate(
            pixel_values=pixels, input_ids=torch.cat([given, torch.tensor([3])])[None], max_length=12, num_beams=1
        )[0]
        assert ours.generate(sample, max_new_tokens=12 - len(given)) == ours.codec.continuation(
            given.tolist(), ids[len(given) :].tolist()
        )


# -- weights


def assert_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_published_folders_there_and_back(questions: Any, tmp_path: Path) -> None:
    """Both layouts of each network, bit-equal; official files know their sizes from their tensors."""
    _, _, _, folder = questions
    seven_layers = PairMed(**sizes(num_layers=7))
    for name, module in (("vqa", blip_vqa()), ("caption", blip_caption()), ("nlvr", blip_nlvr(language=seven_layers))):
        parts = {"vqa": ("encoder",), "caption": (), "nlvr": ("head",)}[name]
        module.stage = Stage("x", {part: Trained(lr=1e-3) for part in ("vision", "language", *parts)})
        module.configure_model()
        write_stage(tmp_path / name, module, global_step=1)
        convert(tmp_path / name, tmp_path / f"{name}_official", system="blip", target_layout="official")
        convert(tmp_path / f"{name}_official", tmp_path / f"{name}_ours", system="blip", target_layout="ours")
        assert_equal(vlm.load(tmp_path / f"{name}_ours").state_dict(), module.state_dict())
        convert(tmp_path / f"{name}_ours", tmp_path / f"{name}_back", system="blip", target_layout="official")
        first, again = (load_file(tmp_path / f"{name}_{side}" / "model.safetensors") for side in ("official", "back"))
        assert_equal(again, first)
    convert(folder / "hf", tmp_path / "ours", system="blip", target_layout="ours")
    convert(tmp_path / "ours", tmp_path / "hf", system="blip", target_layout="hf")
    theirs, ours = (load_file(path / "model.safetensors") for path in (folder / "hf", tmp_path / "hf"))
    assert_equal({name: ours[name] for name in theirs}, theirs)
    assert ours.keys() - theirs.keys() <= {f"text_decoder.cls.predictions.decoder.{p}" for p in ("weight", "bias")}
    with pytest.raises(UserError, match="no class of Hugging Face's holds BLIP_NLVR"):
        convert(tmp_path / "nlvr", tmp_path / "x", system="blip", target_layout="hf")


def test_an_exported_stage_opens_in_transformers(tmp_path: Path) -> None:
    module, [sample] = blip_caption(), pairs(tmp_path, 1)
    module.stage = Stage("x", {part: Trained(lr=1e-3) for part in ("vision", "language")})
    module.configure_model()
    write_stage(tmp_path / "run", module, global_step=1)
    export(tmp_path / "run", tmp_path / "exported")
    model, info = BlipForConditionalGeneration.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(info.values()), info
    batch = pack(module, [sample])
    with torch.no_grad():
        image = model.vision_model(batch.views["image"].pixels)[0]
        logits = model.text_decoder(batch.text.ids[None], encoder_hidden_states=image).logits[0]
        expected = module.eval().label_logits(batch)
    torch.testing.assert_close(logits[batch.text.label_positions], expected, atol=2e-5, rtol=1e-5)


def test_paper_size_has_the_published_numbers() -> None:
    """223,971,644 of the captioner, and every name and shape of transformers' classes, on the meta device."""
    base = TimmTower("vit_base_patch16_224", class_token=True, final_norm=True, options={"img_size": 384})
    text = {"vocab_size": 30524}
    captions = BLIPCaption(vision=base, language=Med(**text, encoder=False), tokenizer=TOKENIZER)
    answers = BLIPVQA(
        vision=base, encoder=Med(**text, decoder=False), language=Med(**text, encoder=False), tokenizer=TOKENIZER
    )
    classes = {BlipForConditionalGeneration: (captions, 223_971_644), BlipForQuestionAnswering: (answers, 361_230_140)}
    for kind, (module, count) in classes.items():
        with torch.device("meta"), empty_weights():
            assemble(module)
            theirs = kind(BlipConfig())
        assert sum(p.numel() for p in module.parameters()) == count == sum(p.numel() for p in theirs.parameters())
        table = get_family("blip").table("hf", {"architectures": [kind.__name__]})
        made = table.check({name: tuple(t.shape) for name, t in theirs.state_dict().items()}, side="theirs")
        assert made == {name: tuple(t.shape) for name, t in module.state_dict().items()}
