"""InternLM-XComposer2-4KHD: its released files, how many tokens an image takes, and pages of 4K."""

import dataclasses
import json
import math
from pathlib import Path

import vlm  # first: repairs torchvision
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import GOLDEN
from tests.support.parity import assert_same_state
from tests.support.samples import samples
from tests.support.xcomposer2 import CLIP
from tests.support.xcomposer2_4khd import xcomposer2_4khd
from tests.systems.test_xcomposer2 import LANGUAGE, PAPER, STATED
from tests.systems.test_xcomposer2 import published_folder as without_separators
from tests.systems.test_xcomposer2 import published_shapes as shapes_without_separators
from vlm.building.network import empty_weights
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.published.family import find_family, get_family, look_into
from vlm.codec import step_counts
from vlm.commands.convert import convert
from vlm.errors import SampleError, UserError
from vlm.language import CausalLM, Decoding, PartialLoRA
from vlm.sample import parse_sample
from vlm.stages import Stage, Trained
from vlm.systems import XComposer2HD4K
from vlm.vision import TimmTower

TINY = {"img_size": 24, "patch_size": 1, "embed_dim": 16, "depth": 1, "num_heads": 1}
"""A tower whose tiles have as many patches as the published ones."""


def with_separators(shapes: dict[str, tuple[int, ...]], *, width: int) -> dict[str, tuple[int, ...]]:
    dim = shapes["vision_proj.0.weight"][0]
    return shapes | {
        "vision_proj.0.weight": (dim, 4 * width),
        "plora_glb_GN": (1, 1, 4 * width),
        "plora_sub_GN": (1, 1, 1, 4 * width),
    }


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the released form, tiles of 4 x 4 patches."""
    folder = without_separators(tmp_path_factory.mktemp("published") / "official", LANGUAGE)
    content = json.loads((folder / "config.json").read_text())
    vision = content["vision"]
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    tower = "vit.vision_tower.vision_model."
    wanted = with_separators(shapes, width=vision["embed_dim"])
    wanted[f"{tower}embeddings.position_embedding.weight"] = (17, vision["embed_dim"])
    made = {n: torch.randn(s, generator=generator) / 9 for n, s in wanted.items() if shapes.get(n) != s}
    save_file(tensors | made, folder / "model.safetensors", {"format": "pt"})
    vision = vision | {"img_size": 4 * vision["patch_size"]}
    (folder / "config.json").write_text(json.dumps(content | {"vision": vision, "max_length": 16384}))
    return folder


def test_published_files_come_back_bit_equal(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "ours", system="xcomposer2_4khd", target_layout="ours")
    convert(tmp_path / "ours", tmp_path / "back", system="xcomposer2_4khd", target_layout="official")
    before, after = (load_file(folder / "model.safetensors") for folder in (official, tmp_path / "back"))
    carried = tmp_path / "back" / "carried.safetensors"
    after |= load_file(carried) if carried.exists() else {}
    assert [n for n in after if not torch.equal(before[n], after[n])] == []
    assert {n for n in before.keys() - after.keys() if "post_layernorm" not in n} == set()
    assert json.loads((official / "config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())
    module = vlm.load(official)
    assert_same_state(module, vlm.load(tmp_path / "back"))
    assert isinstance(module, XComposer2HD4K)
    assert (module.arguments["hd_num"], module.codec.max_tokens, module.codec.template.name) == (
        55,
        16384,
        "xcomposer2",
    )
    assert torch.equal(module.separators.row_end, before["plora_sub_GN"].flatten())


def test_a_folder_is_known_by_its_tensors(official: Path, tmp_path: Path) -> None:
    """Both have partial LoRA and the same `config.json`, the second one has no separators."""
    plain = without_separators(tmp_path / "plain", LANGUAGE)
    for folder, system in ((official, "xcomposer2_4khd"), (plain, "xcomposer2")):
        assert find_family(look_into(folder, WeightFiles(folder))).system == system


def test_a_stage_of_ours_goes_into_the_released_form(tmp_path: Path) -> None:
    module = xcomposer2_4khd(seed=3)
    module.stage = Stage("1_pretrain", {"separators": Trained(1.0)})
    module.configure_model()
    config = get_family("xcomposer2_4khd").config(module, "official")  # type: ignore[attr-defined]
    assert (config["hd_num"], config["vision"]["img_size"]) == (4, 28)
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "_shared" / "llama_sp_tokenizer.model").read_bytes())
    described = get_family("xcomposer2_4khd").describe_folder(config, tmp_path)  # type: ignore[attr-defined]
    arguments = described["init_args"]
    assert arguments["hd_num"] == 4
    assert arguments["vision"]["init_args"]["options"]["img_size"] == 28


def test_paper_size_has_the_published_tensors(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "_shared" / "llama_sp_tokenizer.model").read_bytes())
    config, family = STATED | PAPER | {"max_length": 16384}, get_family("xcomposer2_4khd")
    arguments = family.describe_folder(config, tmp_path)["init_args"]  # type: ignore[attr-defined]
    partial = PartialLoRA(**arguments["partial_lora"]["init_args"])
    module = xcomposer2_4khd(
        vision=TimmTower(**arguments["vision"]["init_args"]),
        language=CausalLM(**arguments["language"]["init_args"]),
        partial_lora=partial,
        hd_num=arguments["hd_num"],
    )
    assert [module.codec.num_tokens(*size) for size in ((336, 336), (3840, 1600), (100, 5500))] == [7297, 8137, 8737]
    with empty_weights():
        for name, part in module.build_parts().items():
            module.add_module(name, part)
        partial.apply(module)
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    sizes = {"width": 1024, "mlp": 4096, "depth": 24, "patch": 14}
    theirs = with_separators(shapes_without_separators(PAPER, **sizes, places=577, rank=256), width=1024)
    table = family.table("official", config)  # type: ignore[attr-defined]
    made = table.check(theirs, side="theirs")
    carried = {name for name in made if table.is_carried(name)}
    assert carried == {"vision.trunk.norm.weight", "vision.trunk.norm.bias"}
    assert {name: shape for name, shape in made.items() if name not in carried} == ours
    assert table.check(made, side="ours") == theirs
    assert sum(math.prod(shape) for shape in theirs.values()) == 8_678_766_592


# -- how many tiles


def asked(folder: Path, size: tuple[int, int], *, resolution: str | None = None, images: int = 1) -> vlm.sample.Sample:
    file = folder / f"{size[0]}x{size[1]}.png"
    Image.new("RGB", size, (90, 120, 200)).save(file)
    parts = [{"type": "image"}] * images + [{"type": "text", "text": "What is it?"}]
    record = {
        "id": "page",
        "images": [file.name] * images,
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": "A page."}]},
        ],
    }
    return dataclasses.replace(parse_sample(record, source="pages", image_root=folder), resolution=resolution)


def test_the_resolution_of_a_data_set(tmp_path: Path) -> None:
    """Tiles of 28 px: an image of 60 x 40 has 3 x 2 of them as it is, 6 x 4 of the 25 that it may have."""
    codec = xcomposer2_4khd(hd_num=9, max_tokens=1024).codec
    tokens = {word: 6 + 1 + 2 * rows * (2 * columns + 1) for word, columns, rows in (("9", 3, 2), ("25", 6, 4))}
    assert codec.image_tokens(asked(tmp_path, (60, 40)), seed=1) == [tokens["9"]]
    assert codec.image_tokens(asked(tmp_path, (60, 40), resolution="hd_25"), seed=1) == [tokens["25"]]
    drawn = asked(tmp_path, (60, 40), resolution="random_hd_25")
    found = [codec.image_tokens(drawn, seed=seed)[0] for seed in range(200)]
    assert {min(found), max(found)} == set(tokens.values())
    assert len(set(found)) == 4  # and 4 x 3 and 5 x 4 between them
    assert [codec.image_tokens(drawn, seed=seed)[0] for seed in range(200)] == found
    assert codec.image_tokens(drawn) == [tokens["25"]]  # in evaluation
    small = asked(tmp_path, (600, 400), resolution="random_hd_4")
    assert codec.image_tokens(small, seed=5) == codec.image_tokens(small, seed=6)  # larger than it may be
    for seed in range(20):
        item = codec.encode(drawn, seed=seed)
        batch = codec.collate([item, item], counts=step_counts([item, item]))
        views = batch.views["image"]
        assert views.layout is not None
        assert len(views.layout) == len(batch.text.slots["image"]) == 2 * found[seed]
        assert views.layout.max() == 4 * len(views.pixels) + 1
        assert views.grid[0] == codec.tiles_of(drawn, (60, 40), seed=seed).grid(60, 40)


def test_what_cannot_be_shown_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hd_num must be at least 1, found 0"):
        xcomposer2_4khd(hd_num=0)
    with pytest.raises(UserError, match="the 3 x 3 patches of a tile are not 2 x 2 to a token"):
        xcomposer2_4khd(vision=TimmTower("vit_large_patch14_clip_quickgelu_336", options=CLIP | {"img_size": 21}))
    codec = xcomposer2_4khd().codec
    with pytest.raises(SampleError, match=r"pages: sample 'page': an image of 1 x 900 pixels is too thin"):
        codec.encode(asked(tmp_path, (1, 900)))
    published = TimmTower("vit_large_patch14_clip_quickgelu_336", layer=-1)
    codec = xcomposer2_4khd(vision=published, hd_num=55, max_tokens=16384).codec
    assert len(codec.encode(asked(tmp_path, (768, 320))).text[0].slots["image"]) == 8137
    with pytest.raises(SampleError, match=r"tokens \(24411 of them for 3 images\), over the limit of 16384"):
        codec.encode(asked(tmp_path, (768, 320), images=3))


@pytest.mark.parametrize(("size", "tokens"), [((3840, 1600), 8137), ((100, 5500), 8737)])
def test_pages_of_4k(size: tuple[int, int], tokens: int, tmp_path: Path) -> None:
    """A training step and an answer at the published number of tokens, of a narrow network over small tiles."""
    language = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1,
    }  # fmt: skip
    module = xcomposer2_4khd(
        vision=TimmTower("vit_large_patch14_clip_quickgelu_336", layer=-1, options=TINY),
        language=CausalLM(config=language),
        hd_num=55,
        max_tokens=16384,
    )
    module.stage = Stage("2_sft", dict.fromkeys(("vision", "connector", "separators", "language"), Trained(1e-3)))
    module.configure_model()
    sample = asked(tmp_path, size)
    item = module.codec.encode(sample)
    batch = module.codec.collate([item], counts=step_counts([item]))
    assert len(batch.text.slots["image"]) == len(batch.text.visual) == tokens
    loss = module.losses(batch)["lm"]
    loss.backward()
    assert loss.isfinite()
    for parameter in (module.separators.row_end, module.separators.between, module.vision.trunk.pos_embed):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert len(module.eval().generate([sample], decoding=Decoding(max_new_tokens=2))) == 1


def test_the_small_system_is_asked_like_any_other(tmp_path: Path) -> None:
    module = xcomposer2_4khd()
    module.stage = Stage("2_sft", {"separators": Trained(1.0)})
    module.configure_model()
    pool = samples(tmp_path, 4)
    module.eval()
    before = module.score(pool)
    with torch.no_grad():
        module.separators.row_end.fill_(3.0)
    after = module.score(pool)
    changed = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert changed == [bool(sample.images) for sample in pool]
