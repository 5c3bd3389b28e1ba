"""`vlm run imagine`: from answers to pictures."""

import json
from pathlib import Path

import vlm  # noqa: F401
import pytest
import torch
from PIL import Image

from callbacks.stage_transition import write_stage
from tests.support.samples import picture
from tests.support.systems import build
from vlm.errors import UserError
from vlm.procedures import main
from vlm.procedures.imagine import Answer, Diffusers, draw


class Painter:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def __call__(self, prompt: str, *, seed: int) -> Image.Image:
        self.asked.append((prompt, seed))
        return Image.new("RGB", (8, 8), (seed % 256, 0, 0))


def test_pictures_are_drawn_once_and_listed(tmp_path: Path) -> None:
    painter = Painter()
    answers = [
        Answer("a/1", "Draw a cat <GEN>", "Gladly: <h>a cat</h>, better <h>a cat on a wall</h>."),
        Answer("b", "What is this?", "A boat."),
        Answer("c", "A dog <GEN>", "<h>a dog</h>"),
    ]
    first = draw(answers[:2], painter, tmp_path / "drawn", seed=1)
    assert (first.new, first.old, first.none) == (1, 0, 1)
    with open(tmp_path / "drawn/pictures.jsonl", "a") as file:
        file.write('{"id": "c", "pic')  # the computer went off
    second = draw(answers, painter, tmp_path / "drawn", seed=1)
    assert (second.new, second.old, second.none) == (1, 1, 1)
    assert [prompt for prompt, _ in painter.asked] == ["a cat on a wall", "a dog"]
    lines = [json.loads(line) for line in (tmp_path / "drawn/pictures.jsonl").read_text().splitlines()]
    assert [(line["id"], line["picture"], line["prompt"]) for line in lines] == [
        ("a/1", "a_1.png", "a cat on a wall"),
        ("c", "c.png", "a dog"),
    ]
    alone = Painter()
    draw(answers[2:], alone, tmp_path / "alone", seed=1)
    assert alone.asked == painter.asked[1:], "a picture depends on its own answer"
    with pytest.raises(UserError, match="another prompt for 'c'"):
        draw([Answer("c", "", "<h>a hen</h>")], painter, tmp_path / "drawn")
    with pytest.raises(UserError, match="the same id"):
        draw([Answer("x/y", "", ""), Answer("x_y", "", "")], painter, tmp_path / "x")


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --answers FILE"):
        main(["imagine", "--out", str(tmp_path / "x")])
    with pytest.raises(UserError, match="name it with --weights"):
        main(["imagine", "--prompt", "A cat", "--out", str(tmp_path / "x")])
    (tmp_path / "wrong.jsonl").write_text('{"id": 1, "text": "a"}\n')
    with pytest.raises(UserError, match=r"wrong.jsonl: sample '1': 'answer' must be a text"):
        main(["imagine", "--answers", str(tmp_path / "wrong.jsonl"), "--out", str(tmp_path / "x")])


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random pipeline of SDXL's class."""
    diffusers = pytest.importorskip("diffusers", reason="the optional extra `imagine` is not installed")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        transformer_layers_per_block=(1, 1),
        cross_attention_dim=64,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    text = CLIPTextConfig(
        hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, projection_dim=32,
        vocab_size=1000, hidden_act="gelu", bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sdxl")
    vocab = {
        "<|startoftext|>": 0,
        "<|endoftext|>": 1,
        **{c: at + 2 for at, c in enumerate("abcdefghijklmnopqrstuvwxyz")},
    }
    vocab |= {"ab": 28} | {f"{c}</w>": 29 + at for at, c in enumerate("abcdefghijklmnopqrstuvwxyz,.<>")}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = CLIPTokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    tokenizer.model_max_length = 77
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
    )
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


def test_a_pipeline_draws_the_same_picture_again(sdxl: Path) -> None:
    painter = Diffusers(str(sdxl), steps=2, size=(16, 16))
    first, again, other = (painter("a cat", seed=seed).tobytes() for seed in (3, 3, 4))
    assert first == again != other
    assert Diffusers(str(sdxl), steps=2, size=(16, 16), negative="a dog")("a cat", seed=3).tobytes() != first
    with pytest.raises(UserError, match="--generator nowhere/at/all: cannot be opened"):
        Diffusers("nowhere/at/all")


def test_from_a_request_to_a_picture(
    sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_stage(tmp_path / "artefact", build("mini_gemini", template="mini_gemini_vicuna_v1"), global_step=1)
    file = picture(tmp_path, "seen", (40, 30), 1)
    asked: list[str] = []

    def answer(self, samples, **_):
        [sample] = samples
        asked.append("".join(getattr(part, "text", "<image>") for part in sample.messages[0].content))
        self.codec.encode(sample, generate=True)
        return ["Here it is: <h>a cat, oil painting</h>"]

    monkeypatch.setattr("vlm.module.VisionLanguageModule.generate", answer)
    options = ["--weights", str(tmp_path / "artefact"), "--image", str(file.path), "--ocr", "exit", "gate 4",
               "--generator", str(sdxl), "--steps", "2", "--size", "16", "16"]  # fmt: skip
    assert main(["imagine", "--prompt", "Paint it.", "--out", str(tmp_path / "drawn"), *options]) == 0
    assert asked == ["<image>\nPaint it.\nReference OCR Token: exit, gate 4\n <GEN>"]
    assert Image.open(tmp_path / "drawn/picture.png").size == (16, 16)
    assert "1 pictures drawn" in capsys.readouterr().out
    (tmp_path / "answers.jsonl").write_text('{"id": 1, "prompt": "What?", "answer": "A boat."}\n')
    assert (
        main(["imagine", "--answers", str(tmp_path / "answers.jsonl"), "--out", str(tmp_path / "x"), *options[-7:]])
        == 1
    )
