"""LLaVA-NeXT against transformers' LlavaNext."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import vlm
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from tests.conftest import GOLDEN
from tests.support.parity import check_logits_loss_and_gradients
from tests.support.samples import samples
from tests.support.systems import LLAMA, llava_next
from tests.commands.test_check_data import box, chat, write
from vlm.batch import Views
from vlm.building.network import empty_weights
from vlm.commands.convert import convert
from vlm.checkpoints.tables.llava import LAYOUTS, llava_table
from vlm.checkpoints.published.llava_config import read_config
from vlm.checkpoints.published.llava_family import LLaVANextFamily
from vlm.checkpoints.published.llava_reading import OpenedLlava
from vlm.commands.check_data.parts import parts_of
from vlm.data import BatchSpec, ChatJson, InstructionData
from vlm.errors import UserError
from vlm.language import CausalLM
from vlm.drawing.panels import as_text
from vlm.commands.show_data import look_at
from vlm.stages import Stage, Trained
from vlm.vision import TimmTower
from vlm.vision.preprocess import RandomCropFlip
from vlm.vision.tiling import NEXT_GRIDS


def hf_llava_next(family: str, changes: dict, *, width: int = 32, heads: int = 4) -> LlavaNextForConditionalGeneration:
    vision = CLIPVisionConfig(
        image_size=28,
        patch_size=7,
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    config = LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config={**LLAMA, **changes, "model_type": family, "vocab_size": 32064},
        image_token_index=32000,
        image_grid_pinpoints=[[28 * rows, 28 * columns] for columns, rows in NEXT_GRIDS],
    )
    return LlavaNextForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("mistral", {"sliding_window": None})])
def test_logits_loss_and_gradients_equal_transformers(family: str, changes: dict, tmp_path: Path) -> None:
    """On pictures for which the official rule and that of transformers choose the same grid and cut the same rows."""
    reference = hf_llava_next(family, changes)
    torch.nn.init.normal_(reference.model.image_newline)
    table = llava_table(LAYOUTS["hf_memory"], connector="mlp2x_gelu", num_blocks=2, vocab_rows=32000, newline=True)
    module = llava_next(language=CausalLM(config={**LLAMA, **changes, "model_type": family}))
    views = check_logits_loss_and_gradients(
        module,
        reference,
        tmp_path,
        parts=("vision", "connector", "newline", "language"),
        published=reference.state_dict(),
        to_ours=lambda items: table.to_ours(items)[0],
        inputs=padded_views,
    )
    assert len(set(views.grid)) > 1, "pictures of different shapes, or half of it is not tested"


def padded_views(views: Views, images: Sequence[int]) -> dict[str, torch.Tensor]:
    """As the class takes them: every picture with as many views as the one with most."""
    shown = [views.pixels[views.image_of_view == image] for image in images]
    most = max(len(pixels) for pixels in shown)
    padded = [torch.cat([pixels, pixels.new_zeros(most - len(pixels), *pixels.shape[1:])]) for pixels in shown]
    sizes = [views.size[image] for image in images]
    return {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor([(h, w) for w, h in sizes])}


def test_converted_checkpoints_are_bit_equal_and_compute_the_same(tmp_path: Path) -> None:
    torch.manual_seed(2)
    reference = hf_llava_next("llama", {}, width=128, heads=2)
    torch.nn.init.normal_(reference.model.image_newline)
    reference.save_pretrained(tmp_path / "hf")
    shutil.copyfile(GOLDEN / "_shared" / "llama_sp_tokenizer.model", tmp_path / "hf" / "tokenizer.model")
    for source, name, target in (("hf", "ours", "ours"), ("ours", "official", "official"),
                                 ("official", "again", "ours"), ("again", "back", "hf")):  # fmt: skip
        convert(tmp_path / source, tmp_path / name, system="llava_next", target_layout=target)
    before, after = (
        # as on the hub, the tower has one level more than in what transformers 5 saves
        {key.replace(".vision_model.", "."): tensor for key, tensor in tensors.items()}
        for tensors in (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "official" / "config.json").read_text())
    assert config["image_grid_pinpoints"] == [[28 * columns, 28 * rows] for columns, rows in NEXT_GRIDS]
    assert "model.image_newline" in load_file(tmp_path / "official" / "model.safetensors")

    module = vlm.load(tmp_path / "official")
    assert module.system == "llava_next"
    assert module.codec.tiles.grids == NEXT_GRIDS
    sample = samples(tmp_path, 1)[0]
    batch = module.codec.collate([module.codec.encode(sample)], counts={"images": 1.0})
    ids = batch.text.ids.clone()
    ids[batch.text.slots["image"]] = 32000
    [(width, height)] = batch.views["image"].size
    back = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        theirs = back(
            input_ids=ids[None],
            pixel_values=batch.views["image"].pixels[None],
            image_sizes=torch.tensor([(height, width)]),
        ).logits[0, batch.text.label_positions, :32000]
        torch.testing.assert_close(module.label_logits(batch), theirs, atol=2e-5, rtol=1e-4)
    with pytest.raises(UserError, match="has the image_newline, but llava_1_5 has none"):
        convert(tmp_path / "hf", tmp_path / "x", system="llava_1_5", target_layout="ours")


PUBLISHED = {  # text_config of the Hugging Face folders; parameters with the vocabulary padded as there
    "vicuna 7B": ({"vocab_size": 32064}, 7_063_431_168),
    "vicuna 13B": (
        {"vocab_size": 32064, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
         "num_attention_heads": 40, "num_key_value_heads": 40},
        13_351_499_776,
    ),
    "mistral 7B": (
        {"model_type": "mistral", "vocab_size": 32064, "intermediate_size": 14336, "num_key_value_heads": 8,
         "sliding_window": None, "rope_theta": 1e6},
        7_566_747_648,
    ),
    "yi 34B": (
        {"vocab_size": 64064, "hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60,
         "num_attention_heads": 56, "num_key_value_heads": 8, "rope_theta": 5e6},
        34_752_083_968,
    ),
    "llama 3 8B": (
        {"vocab_size": 128320, "intermediate_size": 14336, "num_key_value_heads": 8, "rope_theta": 5e5},
        8_355_276_800,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_paper_size_has_the_published_number_of_parameters(name: str) -> None:
    text, count = PUBLISHED[name]
    text = {"model_type": "llama", "rms_norm_eps": 1e-5, **text}
    rows = text["vocab_size"] - 64
    module = llava_next(
        vision=TimmTower("vit_large_patch14_clip_quickgelu_336", layer=-2),
        language=CausalLM(config=text | {"vocab_size": rows}),
    )
    with empty_weights():
        parts = module.build_parts()
        reference = LlavaNextForConditionalGeneration(
            LlavaNextConfig(
                text_config=text,
                vision_config={"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
                               "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
                               "image_size": 336},
            )
        )  # fmt: skip
    table = llava_table(LAYOUTS["hf_memory"], connector="mlp2x_gelu", num_blocks=23, vocab_rows=rows, newline=True)
    theirs = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    expected = table.check(theirs, side="theirs")
    ours = {f"{part}.{n}": tuple(p.shape) for part, network in parts.items() for n, p in network.named_parameters()}
    carried = {name: shape for name, shape in expected.items() if table.is_carried(name)}
    assert ours | carried == expected
    assert sum(math.prod(shape) for shape in theirs.values()) == count


@pytest.mark.parametrize(
    ("name", "kind", "template"),
    [
        ("vicuna 7B", "llava_llama", "v1"),
        ("vicuna 13B", "llava_llama", "v1"),
        ("mistral 7B", "llava_mistral", "mistral_instruct"),
        ("yi 34B", "llava_llama", "chatml_direct"),
        ("llama 3 8B", "llava_llama", "llava_llama_3"),
    ],
)
@pytest.mark.parametrize("layout", ["official", "hf"])
def test_a_released_folder_is_talked_to_as_it_was_trained(
    layout: str, name: str, kind: str, template: str, tmp_path: Path
) -> None:
    text, _ = PUBLISHED[name]
    pinpoints = [[336 * columns, 336 * rows] for columns, rows in NEXT_GRIDS]
    anyres = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    rows = text["vocab_size"] - 64
    content = {
        "official": text | anyres | {"model_type": kind, "vocab_size": rows, "image_grid_pinpoints": pinpoints},
        "hf": {"model_type": "llava_next", "text_config": text, "vision_config": {}, "image_token_index": rows,
               "image_grid_pinpoints": pinpoints},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(content[layout]))
    config = read_config(tmp_path, LAYOUTS[layout], connector="mlp2x_gelu")
    opened = OpenedLlava({}, lambda: (), "llava_next", config, tmp_path, {})
    shutil.copyfile(GOLDEN / "_shared" / "llama_sp_tokenizer.model", tmp_path / "tokenizer.model")
    found = LLaVANextFamily().describe(opened)
    assert (found["class_path"], found["init_args"]["template"]) == ("vlm.systems.LLaVANext", template)


def test_one_view_is_llava_1_5(tmp_path: Path) -> None:
    """Stage 1 has neither tiles nor a newline."""
    module = llava_next(grids=None)
    module.stage = Stage("1_align", {"connector": Trained(lr=1.0)})
    module.configure_model()
    assert not any(name.startswith("newline") for name, _ in module.named_parameters())
    [encoded] = [module.codec.encode(sample) for sample in samples(tmp_path)[:1]]
    assert len(encoded.text[0].slots["image"]) == 16


def test_boxes_count_from_the_padded_square_and_are_drawn_on_the_squashed_whole(tmp_path: Path) -> None:
    """A red field on blue, named by a typed box and by the text that LLaVA's files spell it with."""
    pixels = np.full((60, 160, 3), (0, 0, 255), dtype=np.uint8)
    pixels[20:50, 40:120] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    text = "[0.25, 0.44, 0.75, 0.62]"  # 50 rows are added above and below: (20 + 50) / 160 and (50 + 50) / 160
    typed = chat("typed", box(0.25, 1 / 3, 0.75, 5 / 6))
    data = InstructionData(
        [ChatJson(write(tmp_path / "x.jsonl", [typed, chat("written", answer=text)]))], batch=BatchSpec(1)
    )
    codec = llava_next().codec
    (part,) = parts_of(data, codec)
    for index in (0, 1):
        look = look_at(part, index, epoch=0)
        assert text in as_text(look.item.sample.messages)
        whole, *tiles = look.pictures
        ((_, drawn),) = whole.boxes
        assert drawn == pytest.approx((0.25, 1 / 3, 0.75, 5 / 6), abs=0.02)  # two decimals of the longer side
        assert not any(tile.boxes for tile in tiles)
        seen = np.asarray(whole.image.convert("RGB"))
        red = (seen[..., 0] > 128) & (seen[..., 2] < 128)
        rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
        found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 28
        assert found == pytest.approx(drawn, abs=1.5 / 28)
    view = codec.view(160, 60)
    ((x0, y0, x1, y1),) = (view.in_picture(found) for found in codec.find_boxes(text, size=view.size))
    assert (160 * x0, 60 * y0, 160 * x1, 60 * y1) == pytest.approx((40, 20, 120, 50), abs=1)


def test_a_random_cut_is_refused() -> None:
    with pytest.raises(UserError, match="takes other tokens than its file tells"):
        llava_next(augment=RandomCropFlip(28))
