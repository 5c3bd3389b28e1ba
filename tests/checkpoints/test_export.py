"""`vlm export`: what transformers opens computes the same, from the same text and pictures."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import vlm
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextForConditionalGeneration,
)

import cli
from callbacks.stage_transition import write_stage
from tests.support.samples import picture
from tests.support.systems import LLAMA, TOKENIZER, TOWER, llava_1_5, llava_next
from vlm.levels import look_up
from vlm.batch import Batch
from vlm.commands.export import export
from vlm.checkpoints.published.hf_processor import OTHER_PIXELS, _image_processor, sizes_cut_otherwise
from vlm.codec import step_counts
from vlm.connectors import MLP, Linear
from vlm.errors import UserError
from vlm.language import CausalLM, Decoding
from vlm.sample import ImageFile, ImagePart, Message, Sample, TextPart
from vlm.stages import InitFrom, Stage, Trained
from vlm.vision import TimmTower
from vlm.vision.preprocess import ImageTransform
from vlm.vision.tiling import AnyRes


def finished(folder: Path, system=llava_1_5, **changes) -> Path:
    """The last of two stages: the tower is frozen in both, the connector comes out of the first where it is not."""
    last = changes.pop("last", ("connector", "language"))
    follows: list[InitFrom] = []
    for name, parts in {"1_align": ("connector",), "2_finetune": last}.items():
        module = system(**changes)
        module.stage = Stage(name, {part: Trained(lr=1.0) for part in parts}, follows=follows)
        module.configure_model()
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        write_stage(folder / name / "artefact", module, global_step=1)
        follows = [InitFrom(str(folder / name / "artefact"), {"connector": "connector"})]
    return folder


def conversations(folder: Path) -> list[Sample]:
    """None, one and several pictures; one and two turns; ends with the user."""
    answer = Message("assistant", (TextPart("A small red ball."),))
    turns = {
        "one": [Message("user", (ImagePart(), TextPart("\nWhat is it?")))],
        "none": [Message("user", (TextPart("Hello, what is 1 + 2?"),))],
        "bare": [Message("user", (ImagePart(),))],
        "two": [Message("user", (ImagePart(), TextPart("and"), ImagePart(), TextPart(" differ?")))],
        "turns": [Message("user", (ImagePart(), TextPart("Say it."))), answer, Message("user", (TextPart("And?"),))],
    }
    made = []
    for at, (name, messages) in enumerate(turns.items()):
        count = sum(isinstance(part, ImagePart) for message in messages for part in message.content)
        images = tuple(picture(folder, f"{name}{k}", (60 + 31 * at, 45 + 20 * k), at + k) for k in range(count))
        made.append(Sample(name, tuple(messages), images))
    return made


def as_chat(sample: Sample) -> list[dict]:
    def content(message: Message) -> list[dict]:
        return [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
            for part in message.content
        ]

    return [{"role": message.role, "content": content(message)} for message in sample.messages]


def views_of(inputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """float[V, 3, H, W]: the views without what fills up those of a picture with fewer tiles."""
    if inputs["pixel_values"].ndim == 4:
        return inputs["pixel_values"]
    counts = batch.views["image"].image_of_view.bincount().tolist()
    return torch.cat([pixels[:count] for pixels, count in zip(inputs["pixel_values"], counts, strict=True)])


CASES = {
    "legacy": {"image": "pad"},
    "not legacy": {"image": "crop", "tokenizer": replace(TOKENIZER, legacy=False)},
    "squash, tied mistral": {
        "image": "squash",
        "language": CausalLM(config={**LLAMA, "model_type": "mistral", "tie_word_embeddings": True}),
    },
    "other prompt, all blocks": {
        "template": "llava_llama_2",
        "vision": TimmTower("vit_large_patch14_clip_quickgelu_336", layer=-1, options=TOWER),
        "tokenizer": replace(TOKENIZER, legacy=False, pad_token="<pad>"),
        "language": CausalLM(config={**LLAMA, "vocab_size": 32070}),
    },
    "class token": {"vision": TimmTower("vit_large_patch14_clip_336", layer=-2, class_token=True, options=TOWER)},
    "connector alone": {"last": ("connector",), "template": "plain"},
    "tiles": {"system": llava_next, "last": ("vision", "connector", "newline", "language")},
    "tiles, mistral": {
        "system": llava_next,
        "language": CausalLM(config={**LLAMA, "model_type": "mistral", "sliding_window": None}),
        "last": ("newline", "connector"),
        "template": "mistral_instruct",
        "grids": [[3, 1], [1, 2], [2, 2], [1, 1]],
    },
    "tiles to come": {"system": llava_next, "grids": None, "last": ("connector",), "template": "plain"},
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_from_the_same_input(case: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", **CASES[case])
    assert cli.main(["export", str(run), str(tmp_path / "hf")]) == 0
    module = vlm.load(run)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil", local_files_only=True)
    usual = AutoProcessor.from_pretrained(tmp_path / "hf", local_files_only=True)
    module_class = LlavaNextForConditionalGeneration if hasattr(module, "newline") else LlavaForConditionalGeneration
    model = module_class.from_pretrained(tmp_path / "hf", local_files_only=True).eval()
    assert model.get_input_embeddings().weight.shape[0] % 64 == 0
    for sample in conversations(tmp_path):
        item = module.codec.encode(sample, generate=True)
        batch = module.codec.collate([item], counts=step_counts([item]))
        images = [image.read(sample) for image in sample.images]
        text = processor.apply_chat_template(as_chat(sample), add_generation_prompt=True)
        theirs = processor(text=text, images=images or None, return_tensors="pt")
        ids = batch.text.ids.clone()
        ids[batch.text.slots["image"]] = model.config.image_token_id
        assert theirs["input_ids"][0].tolist() == ids.tolist()
        if images:
            torch.testing.assert_close(views_of(theirs, batch), batch.views["image"].pixels, atol=1e-6, rtol=0)
            # torchvision rounds bicubic weights otherwise: 2 grey levels are 0.03
            near = views_of(usual(text=text, images=images, return_tensors="pt"), batch)
            torch.testing.assert_close(near, batch.views["image"].pixels, atol=0.03, rtol=0)
        with torch.no_grad():
            logits = model(**theirs, use_cache=False).logits[0, :, : module.language.config.vocab_size]
            ours = module.language(
                inputs_embeds=module.embed_row(batch)[None],
                position_ids=batch.text.positions[None],
                cu_seqlens=batch.text.cu_seqlens,
                max_len=batch.text.max_len,
                use_cache=False,
            ).logits[0]
        # float32 noise between eager CLIP attention and timm's fused one
        torch.testing.assert_close(logits, ours, atol=2e-5, rtol=1e-5)
        answer = module.generate([sample], decoding=Decoding(max_new_tokens=4))
        generated = model.generate(**theirs, max_new_tokens=4)[0, theirs["input_ids"].shape[1] :]
        assert [module.codec.decode(generated.tolist())] == answer
        assert vlm.load(tmp_path / "hf").generate([sample], decoding=Decoding(max_new_tokens=4)) == answer


SHADES = np.linspace(0, 255, 32 * 32).reshape(32, 32).astype(np.uint8)
SHOWN = {
    "grey": Image.fromarray(SHADES),
    "black and white": Image.fromarray(SHADES).convert("1"),
    "palette": Image.fromarray(SHADES).convert("P"),
    "four colours of ink": Image.fromarray(SHADES).convert("CMYK"),
    "transparent": Image.merge("RGBA", [Image.fromarray(SHADES)] * 3 + [Image.fromarray(SHADES.T)]),
    "transparent grey": Image.merge("LA", [Image.fromarray(SHADES), Image.fromarray(SHADES.T)]),
    "palette with a hole": Image.fromarray(SHADES).convert("P"),
    "16 bits": Image.fromarray(SHADES.astype(np.uint16) * 257),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_the_images_that_a_processor_sees_otherwise_are_the_named_ones(kind: str, tmp_path: Path) -> None:
    file = tmp_path / ("a.tif" if kind == "four colours of ink" else "a.png")
    SHOWN[kind].save(file, **({"transparency": 100} if kind == "palette with a hole" else {}))
    transform = ImageTransform(size=32, mode="pad")
    settings = _image_processor(transform, None)
    processor = LlavaImageProcessorPil(**{k: v for k, v in settings.items() if not k.endswith(("_class", "_type"))})
    sample = Sample("a", (), (ImageFile(file.name, file),))
    ours = look_up(transform(sample.images[0].read(sample)), transform.table)
    theirs = torch.as_tensor(processor(images=Image.open(file), return_tensors="pt")["pixel_values"][0])
    named = "transparent" in kind or "hole" in kind or "16 bits" in kind
    if not named:
        torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)
        return
    assert (theirs - ours).abs().max() > 1
    eight = Image.fromarray(SHADES) if kind == "16 bits" else Image.open(file).convert("RGBA").convert("RGB")
    cured = torch.as_tensor(processor(images=eight, return_tensors="pt")["pixel_values"][0])
    torch.testing.assert_close(cured, ours, atol=1e-6, rtol=0)


def test_the_sizes_that_transformers_unpads_otherwise_are_named(tmp_path: Path) -> None:
    """Against transformers' own count at the published size, for every picture up to 200 x 200."""
    note, pixels = export(finished(tmp_path / "run", system=llava_next), tmp_path / "hf").notes
    assert pixels == OTHER_PIXELS
    assert "features there that they do not get here (47x188, 49x588" in note
    tiles = AnyRes(336, 24)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", local_files_only=True)
    processor.patch_size = 14
    processor.image_processor.image_grid_pinpoints = [[336 * rows, 336 * columns] for columns, rows in tiles.grids]
    sizes = [(width, height) for width in range(1, 201) for height in range(1, 201)]
    counts = [processor._get_number_of_features(h, w, 336, 336) - 1 for w, h in sizes]  # the CLS token
    differ = [size for size, count in zip(sizes, counts, strict=True) if count != tiles.num_tokens(*size)]
    assert differ == sizes_cut_otherwise(tiles, largest=200) == [(55, 176), (88, 55), (88, 99), (176, 110), (176, 198)]


def test_a_bfloat16_folder_says_so(tmp_path: Path) -> None:
    export(finished(tmp_path / "run"), tmp_path / "hf", dtype="bfloat16")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with pytest.raises(UserError, match="exists already"):
        export(tmp_path / "run", tmp_path / "hf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"connector": Linear()}, "always has a two-layer projector"),
        ({"connector": MLP(depth=3)}, "exactly two layers"),
        ({"system": llava_next, "merge": "flat"}, "merged 'flat'"),
        ({"vision": TimmTower("vit_large_patch14_clip_quickgelu_336", final_norm=True, options=TOWER)}, "final_norm"),
        (
            {"vision": TimmTower("vit_base_patch16_siglip_224", options={"img_size": 28, "patch_size": 7, "depth": 2})},
            "it is no CLIP",
        ),
    ],
)
def test_what_hugging_face_has_no_class_for_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", **changes)
    with pytest.raises(UserError, match=message):
        export(run, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
