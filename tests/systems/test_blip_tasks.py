"""BLIP's captions, answers and judgements against the published code's numbers and rules, and transformers' classes."""

import dataclasses
import io
import json
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
    judged,
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
from vlm.data import NLVR2, BlipQuestions, CaptionList
from vlm.errors import SampleError, UserError
from vlm.language import Decoding, Med, PairMed
from vlm.prompts import BertTokenizer
from vlm.prompts.cleaning import clean_caption, clean_question
from vlm.sample import ImageFile, ImagePart, Message, Sample, TextPart
from vlm.stages import InitFrom, Stage, Trained
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


def heavy(sample: Sample, weight: float) -> Sample:
    """The sample with another weight of its answer."""
    *asked, answer = sample.messages
    return dataclasses.replace(sample, messages=(*asked, dataclasses.replace(answer, weight=weight)))


def test_an_answer_costs_what_its_weight_says(captioner: Any, questions: Any) -> None:
    for module, sample in (
        (captioner[0], captions(["a dog"])[0]), (questions[1], dataclasses.replace(questions[2][0], answers=()))
    ):  # fmt: skip
        whole, half = pack(module, [sample]), pack(module, [heavy(sample, 0.5)])
        with torch.no_grad():
            torch.testing.assert_close(module.losses(half)["lm"], module.losses(whole)["lm"] / 2)
    whole, half = (pack(captioner[0], [heavy(captions(["a dog"])[0], weight)]) for weight in (1.0, 0.5))
    assert half.counts["lm"] == whole.counts["lm"] / 2


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
    torch.testing.assert_close(ours.losses(batch)["lm"], expected, atol=1e-4, rtol=1e-5)  # 6e-5 measured of 329


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


# -- two images


def test_two_images_against_plain_products(tmp_path: Path) -> None:
    """The published layers spelled out: two attentions, then their mean in the first, a linear layer in the second."""
    module = blip_nlvr()
    module.configure_model()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    samples = judged(tmp_path, 4)
    batch = pack(module, samples)
    weights = dict(module.language.named_parameters())

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(x: Tensor, context: Tensor, name: str) -> Tensor:
        query, key, value = (
            linear(source, f"{name}.{kind}").unflatten(1, (4, 8)).transpose(0, 1)
            for source, kind in ((x, "query"), (context, "key"), (context, "value"))
        )
        found = ((query @ key.transpose(1, 2)) / 8**0.5).softmax(-1) @ value
        return linear(found.transpose(0, 1).flatten(1), f"{name}.dense")

    with torch.no_grad():
        logits, features = module.truth_logits(batch), module.vision(batch.views["image"].pixels)
        for at, sample in enumerate(samples):
            ids = module.codec.encode(sample).text[0].ids
            x = weights["embeddings.words.weight"][ids] + weights["embeddings.positions.weight"][: len(ids)]
            x = norm(x, "embeddings.norm")
            for layer in ("layers.0", "layers.1"):
                x = norm(x + attend(x, x, f"{layer}.attention"), f"{layer}.attention.norm")
                cross = f"{layer}.cross_attention"
                both = [attend(x, features[2 * at], cross), attend(x, features[2 * at + 1], f"{cross}.second")]
                joined = sum(both) / 2 if layer == "layers.0" else linear(torch.cat(both, 1), f"{cross}.merge")
                x = norm(x + joined, f"{cross}.norm")
                inner = F.gelu(linear(x, f"{layer}.mlp.fc1"))
                x = norm(x + linear(inner, f"{layer}.mlp.fc2"), f"{layer}.mlp.norm")
            expected = module.head[2](module.head[0](x[0]).relu())
            torch.testing.assert_close(logits[at], expected, atol=2e-5, rtol=1e-5)  # 1e-6 measured
            alone = module.truth_logits(pack(module, [sample]))[0]
            torch.testing.assert_close(alone, logits[at], atol=2e-5, rtol=1e-5)
    loss = F.cross_entropy(logits, torch.tensor([0, 1, 0, 1]), reduction="sum")
    torch.testing.assert_close(module.losses(batch)["nlvr"], loss, atol=1e-5, rtol=1e-5)


def test_the_two_attentions_start_as_the_one_of_the_pretrained_model(tmp_path: Path) -> None:
    """What decodes is left out, what joins both starts new; in training, half of the samples are turned round."""
    pretrained = blip_vqa(encoder=Med(**sizes()))  # a stand-in that reads and writes, as pre-training leaves it
    pretrained.stage = Stage("x", {part: Trained(lr=1e-3) for part in ("vision", "encoder", "language")})
    pretrained.configure_model()
    write_stage(tmp_path / "artefact", pretrained, global_step=1)
    module = blip_nlvr(seed=3)
    follow = InitFrom(
        str(tmp_path / "artefact"),
        {"vision": "vision", "language": "encoder"},
        leave_out=["encoder.layers.*.decoder_attention.*", "encoder.head.*"],
        fresh=["language.layers.*.cross_attention.merge.*"],
    )
    module.stage = Stage(
        "2_nlvr", {part: Trained(lr=1e-3) for part in ("vision", "language", "head")}, follows=[follow]
    )
    module.configure_model()
    origin = dict(pretrained.encoder.named_parameters())
    for name, tensor in module.language.named_parameters():
        if ".merge." not in name:
            assert torch.equal(tensor, origin[name.replace(".second.", ".")]), name
    sample = dataclasses.replace(
        judged(tmp_path, 1)[0],
        messages=(
            Message("user", (ImagePart(), ImagePart(), TextPart("The LEFT image has two, right?"))),
            Message("assistant", (TextPart("True"),)),
        ),
    )
    seen = {module.codec.encode(sample, seed=seed).sample.images for seed in range(16)}
    assert seen == {sample.images, sample.images[::-1]}
    for seed in range(16):
        item = module.codec.encode(sample, seed=seed)
        words = module.codec.tokenizer.decode(item.text[0].ids.tolist())
        assert words == (
            "the left image has two, right?" if item.sample == sample else "the right image has two, left?"
        )


# -- data, and what is wrong with it


def test_published_annotations(tmp_path: Path) -> None:
    """Shares of people as weights, 0.2 for Visual Genome, one sample per caption, two images with a sentence."""

    def written(name: str, records: Any) -> Path:
        (tmp_path / name).write_text(json.dumps(records))
        return tmp_path / name

    people = ["red"] * 6 + ["dark red"] * 3 + ["pink"]
    asked = {"question": "What color is it?", "question_id": 7}
    source = BlipQuestions(
        written(
            "vqa.json",
            [
                {**asked, "answer": people, "image": "a.jpg", "dataset": "vqa"},
                {**asked, "answer": "red", "image": "b.jpg"},
            ],
        )
    )
    assert source[0].answers == (("red", 0.6), ("dark red", 0.3), ("pink", 0.1))
    assert source[1].answers == (("red", 0.2),)
    item = blip_vqa().codec.encode(source[0])
    assert [row.weight for row in item.rows["answers"]] == [0.6, 0.3, 0.1]
    assert blip_vqa().codec.tokenizer.decode(item.text[0].ids.tolist()) == "what color is it?"
    caption = {"image": "a.jpg", "image_id": "coco_9"}
    captions = CaptionList(written("coco.json", [{**caption, "caption": one} for one in ("A card.", "Two cards!")]))
    assert [sample.group for sample in captions] == ["coco_9"] * 2
    text = blip_caption().codec.encode(captions[1]).text[0]
    assert blip_caption().codec.tokenizer.decode([*text.ids.tolist(), 3]) == "a picture of two cards"
    pair = {"sentence": "There are two.", "label": "False", "images": ["a.png", "b.png"]}
    judgements = NLVR2(written("nlvr.json", [pair, {**pair, "images": ["a.png"]}, {**pair, "label": "maybe"}]))
    assert [image.name for image in judgements[0].images] == ["a.png", "b.png"]
    assert judgements[0].answers == (("False", 1.0),)
    with pytest.raises(SampleError, match="'images' names 1; a sentence is judged about two"):
        judgements[1]
    with pytest.raises(SampleError, match="'label' must be True or False, found 'maybe'"):
        judgements[2]


def test_texts_are_cleaned_as_published() -> None:
    for case in golden_json("caption_cleaning__a", "captions.json"):
        for words in (30, 50):
            assert clean_caption(case["text"], words) == case[f"blip_pre_caption_{words}"]
    for case in golden_json("caption_cleaning__a", "questions.json"):
        assert clean_question(case["text"]) == case["blip_pre_question_50"]


def test_what_cannot_be_trained_on_is_said(tmp_path: Path) -> None:
    [caption], [question], [pair] = pairs(tmp_path, 1), answered(tmp_path, 1), judged(tmp_path, 1)
    user, _ = question.messages
    silent = dataclasses.replace(question, messages=(user,), answers=())
    wordless = dataclasses.replace(question, messages=(Message("user", (ImagePart(),)), question.messages[1]))
    long = dataclasses.replace(question, messages=(Message("user", (ImagePart(), TextPart("what " * 40))),))
    single = dataclasses.replace(pair, images=pair.images[:1])
    unsure = dataclasses.replace(pair, messages=(pair.messages[0], Message("assistant", (TextPart("perhaps"),))))
    twice = dataclasses.replace(question, messages=question.messages * 2)
    none = dataclasses.replace(caption, images=())
    cases = [
        (blip_caption(), none, "0 images where 1 are looked at"),
        (blip_caption(), dataclasses.replace(caption, messages=caption.messages[:1]), "has no caption to train on"),
        (blip_vqa(), silent, "has no answer to train on"),
        (blip_vqa(), wordless, "has no question"),
        (blip_vqa(max_tokens=35), long, "a text of 42 tokens, over the limit of 35"),
        (blip_vqa(), twice, "a conversation; this system takes one question and one answer"),
        (blip_nlvr(), single, "1 images where 2 are looked at"),
        (blip_nlvr(), unsure, "the answer must be True or False, found 'perhaps'"),
        (blip_nlvr(), heavy(pair, 0.5), "its answer has weight 0.5, but judgements count alike"),
    ]
    for module, sample, message in cases:
        with pytest.raises(SampleError, match=message):
            module.codec.encode(sample)
    with pytest.raises(UserError, match=r"candidates_file: .*answers.json cannot be read"):
        Decoding(candidates_file=str(tmp_path / "answers.json"))
    module = blip_nlvr()
    module.configure_model()
    with pytest.raises(UserError, match="the answer is True or False"):
        module.generate(pair, candidates=("yes",))
    small = blip_caption(language=Med(**sizes(encoder=False, vocab_size=90)))
    with pytest.raises(UserError, match="makes ids up to 103, but language has 90 token embeddings"):
        small.configure_model()


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
