"""Mini-Gemini against the official numbers (dvlab-research/MGM@769820c)."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import vlm  # first: repairs torchvision
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from tests.conftest import golden, golden_json
from tests.support.parity import assert_same_scores, assert_same_state
from tests.support.samples import samples
from tests.support.systems import LLAMA, PYRAMID, TOKENIZER, mini_gemini
from vlm.building.network import empty_weights
from vlm.commands.convert import convert
from vlm.commands.export import export
from vlm.checkpoints.tables.llava import OFFICIAL, llava_table
from vlm.connectors import MLP, PatchMining
from vlm.connectors.mining import mine_views, windows
from vlm.errors import UserError
from vlm.functional import splice
from vlm.language import CausalLM
from vlm.prompts import IMAGE
from vlm.sample import Sample
from vlm.stages import Stage, Trained
from vlm.systems import MiniGemini
from vlm.systems.spliced import SplicedCodec
from vlm.vision import ConvNeXtPyramid, TimmTower
from vlm.vision.tiling import low_views

UNI = {"query": "query", "aux": "key", "val": "value"}


def mining_of(tensors: dict[str, Tensor]) -> tuple[PatchMining, torch.nn.Module]:
    """Mining and projector with the weights of a golden case."""
    weight = "weights/model.vlm_uni_{}_projector.{}.{}".format
    dim, high_dim = tensors[weight("aux", 1, "weight")].shape
    mining = PatchMining(dim, high_dim)
    mining.load_state_dict(
        {
            f"{ours}.{layer}.{kind}": tensors[weight(theirs, layer, kind)]
            for theirs, ours in UNI.items()
            for layer in (0, 1)
            for kind in ("weight", "bias")
        }
    )
    projector = MLP().build(dim, len(tensors["weights/model.mm_projector.0.weight"]))
    prefix = "weights/model.mm_projector."
    projector.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    return mining, projector


def rows(image: Tensor) -> Tensor:
    """float[V, A, H, W] -> float[V, H * W, A]."""
    return image.flatten(2).transpose(1, 2)


@torch.no_grad()
def test_mining_equals_the_official_numbers() -> None:
    """2e-6 seen."""
    tensors = golden("mgm_mining__a")
    mining, projector = mining_of(tensors)
    low, high = tensors["inputs/lr"], rows(tensors["inputs/hr"])
    found = mining(low, high)
    torch.testing.assert_close(found, tensors["outputs/mined"], atol=2e-5, rtol=0)
    torch.testing.assert_close(projector(low + found), tensors["outputs/tokens"], atol=2e-5, rtol=0)
    torch.testing.assert_close(mine_views(mining, low[:, None], high, grid=1)[:, 0], found, atol=2e-6, rtol=0)

    crops, high = tensors["inputs/lr_hd"], rows(tensors["inputs/hr_hd"])
    views = torch.cat([crops[:, -1:], crops[:, :-1]], dim=1)  # the official input has the whole last
    tokens = projector((views + mine_views(mining, views, high, grid=2)).flatten(1, 2))
    torch.testing.assert_close(tokens, tensors["outputs/tokens_hd"], atol=2e-5, rtol=0)
    parts = crops[:, :-1]
    tokens = projector((parts + mine_views(mining, parts, high, grid=2)).flatten(1, 2))
    torch.testing.assert_close(tokens, tensors["outputs/tokens_grid_no_global"], atol=2e-5, rtol=0)


def test_mining_is_the_sum_as_it_is_written() -> None:
    """Gradients too: of the parameters, of the features and of the map (a tower that is trained)."""
    torch.manual_seed(5)
    mining = PatchMining(6, 10).double()
    for parameter in mining.parameters():
        torch.nn.init.normal_(parameter)
    low, high = torch.randn(2, 9, 6).double().requires_grad_(), torch.randn(2, 36, 10).double().requires_grad_()
    inputs = [low, high, *mining.parameters()]
    seen = windows(high, 9)
    scores = mining.query(low)[:, :, None] @ mining.key(seen).transpose(-1, -2) / 6**0.5
    plain = (scores.softmax(-1) @ mining.value(seen)).squeeze(2)
    found = mining(low, high)
    torch.testing.assert_close(found, plain, atol=1e-12, rtol=1e-12)
    ours, theirs = (torch.autograd.grad(out.square().sum(), inputs) for out in (found, plain))
    for mine, written in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, written, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_features_stand_where_the_official_code_puts_them() -> None:
    """Which cuts rows at `max_length` afterwards; here a sample over the limit is refused."""
    tensors, config = golden("mgm_mining__a"), golden_json("mgm_mining__a")["config"]
    table = tensors["weights/model.embed_tokens.weight"]
    for row in range(len(tensors["inputs/input_ids"])):
        shown = tensors["inputs/attention_mask"][row].bool()
        ids, labels = (tensors[f"inputs/{name}"][row][shown].tolist() for name in ("input_ids", "labels"))
        features = tensors["outputs/tokens"][row]
        ids, labels, slots = SplicedCodec.reserve(ids, labels, [len(features)] * ids.count(IMAGE))
        embeds = splice(table[torch.tensor(ids)], features[: len(slots)], torch.tensor(slots, dtype=torch.int64))
        end = min(len(ids), config["max_length"])
        kept = tensors["outputs/asm_attention_mask"][row].bool()
        assert int(kept.sum()) == end
        torch.testing.assert_close(embeds[:end], tensors["outputs/asm_embeds"][row][kept], atol=1e-6, rtol=0)
        assert labels[:end].tolist() == tensors["outputs/asm_labels"][row][kept].tolist()


def test_windows_lie_where_their_feature_does() -> None:
    places = torch.arange(36.0)[None, :, None]
    cut = windows(places, 4)[0, :, :, 0]
    assert cut[1].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    with pytest.raises(ValueError, match="36 places cannot be cut into 16"):
        windows(places, 16)


@torch.no_grad()
def test_the_fine_map_equals_the_official_numbers() -> None:
    tensors, meta = golden("mgm_hr_tower__a"), golden_json("mgm_hr_tower__a")
    config = meta["config"]
    options = {"depths": config["depths"], "dims": config["dims"]}
    tower = ConvNeXtPyramid("convnext_large_mlp", image_size=config["hr_size"], options=options).build().eval()
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    tower.load_state_dict({f"trunk.{name.removeprefix('vision_')}": tensor for name, tensor in weights.items()})
    features = tower(tensors["inputs/image_hr"][None])
    assert features.shape[1:] == (tower.facts.num_tokens, tower.facts.dim)
    torch.testing.assert_close(features, rows(tensors["outputs/features"]), atol=3e-5, rtol=0)


def test_low_views_equal_the_official_ones() -> None:
    """The whole of HD is made from the view of twice the size, not from the picture."""
    # 1.4e-6 seen without vector instructions, nothing with them; a grey level is 0.015
    tensors, meta = golden("mgm_hr_tower__a"), golden_json("mgm_hr_tower__a")
    pixels, size = tensors["inputs/image_hr"][None], meta["config"]["lr_size"]
    found = low_views(pixels, size=size)[0, 0]
    torch.testing.assert_close(found, tensors["outputs/lr_plain"], atol=1e-5, rtol=0)
    views = low_views(pixels, size=size, grid=2, whole=True)[0]
    views = torch.cat([views[1:], views[:1]])
    torch.testing.assert_close(views, tensors["outputs/lr_hd_crops_global"], atol=1e-5, rtol=0)
    parts = low_views(pixels, size=size, grid=2)[0]
    torch.testing.assert_close(parts, tensors["outputs/lr_hd_crops_only"], atol=1e-5, rtol=0)


def test_sizes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UserError, match="cannot be shared out among 4 x 4"):
        mini_gemini(vision_high=ConvNeXtPyramid("convnext_atto", 40))
    with pytest.raises(UserError, match="needs parts beside it"):
        mini_gemini(whole=True)
    with pytest.raises(UserError, match="is no ConvNeXt"):
        mini_gemini(vision_high=ConvNeXtPyramid("resnet18", 64))


# -- checkpoints


FAMILIES: dict[str, dict] = {
    "llama": LLAMA,
    "gemma": {**LLAMA, "model_type": "gemma", "head_dim": 8, "pad_token_id": 0},
    "mixtral": {**LLAMA, "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
}


def official_folder(folder: Path, family: str, *, grid: int = 1, tower: bool = True) -> Path:
    """A tiny checkpoint as the official code saves it: the language model by transformers, the rest by hand."""
    torch.manual_seed(3)
    language = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES[family]))
    language.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            image_size=28, patch_size=7, hidden_size=32, intermediate_size=128, num_hidden_layers=3,
            num_attention_heads=4,
        )
    )  # fmt: skip
    prefix = "model.vision_tower.vision_tower.vision_model."
    named = ((name.removeprefix("vision_model."), tensor) for name, tensor in clip.state_dict().items())
    tensors |= {prefix + name: tensor for name, tensor in named}
    if tower:
        trunk = ConvNeXtPyramid("convnext_large_mlp", 32, options=PYRAMID).build().trunk
        tensors |= {f"model.vision_tower_aux.vision_{name}": t for name, t in trunk.state_dict().items()}
    for name, width in {"query": 32, "aux": 56, "val": 56}.items():
        own = f"model.vlm_uni_{name}_projector."
        tensors |= {f"{own}0.weight": torch.randn(width), f"{own}0.bias": torch.randn(width)}
        tensors |= {f"{own}1.weight": 0.3 * torch.randn(32, width), f"{own}1.bias": torch.randn(32)}
    for layer in (0, 2):
        name = f"model.mm_projector.{layer}."
        tensors |= {f"{name}weight": 0.3 * torch.randn(32, 32), f"{name}bias": torch.randn(32)}
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters", {}).get("rope_theta", 10000.0)  # as transformers 4 writes it
    config |= {
        "model_type": "mgm" if family == "llama" else f"mgm_{family}",
        "image_size_aux": 32 * grid,
        "image_grid": grid,
        "image_global": grid > 1,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_vision_tower_aux": "nowhere",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(TOKENIZER.path, folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize(("family", "grid"), [("llama", 1), ("llama", 2), ("gemma", 1), ("mixtral", 1)])
def test_converted_checkpoints_are_bit_equal_and_compute_the_same(family: str, grid: int, tmp_path: Path) -> None:
    source = official_folder(tmp_path / "official", family, grid=grid)
    convert(source, tmp_path / "ours", system="mini_gemini", target_layout="ours")
    convert(tmp_path / "ours", tmp_path / "back", system="mini_gemini", target_layout="official")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())

    opened, converted = vlm.load(source), vlm.load(tmp_path / "ours")
    assert (opened.system, opened.grid, opened.whole) == ("mini_gemini", grid, grid > 1)
    assert opened.codec.num_tokens(40, 30) == 16 * (5 if grid == 2 else 1)
    assert opened.scale_features == (family == "gemma")
    assert opened.codec.template.name == {
        "llama": "mini_gemini_vicuna_v1", "gemma": "mini_gemini_gemma", "mixtral": "mini_gemini_mistral_instruct"
    }[family]  # fmt: skip
    pool = samples(tmp_path, 3)
    scores = opened.score(pool)
    assert_same_state(converted, opened)
    assert_same_scores(converted.score(pool), scores)
    for sample, found in zip(pool, scores, strict=True):
        torch.testing.assert_close(found, by_hand(source, opened, sample), atol=2e-5, rtol=1e-4)
    with pytest.raises(UserError, match="has the patch info mining, but llava_1_5"):
        convert(source, tmp_path / "x", system="llava_1_5", target_layout="ours")
    with pytest.raises(UserError, match="mini_gemini: has no class of its own"):
        export(tmp_path / "ours", tmp_path / "x")
    with pytest.raises(UserError, match="no class or layout 'hf' is published"):
        convert(source, tmp_path / "x", system="mini_gemini", target_layout="hf")


@torch.no_grad()
def by_hand(folder: Path, module: MiniGemini, sample: Sample) -> Tensor:
    """Log-probabilities of the label tokens: transformers' own language model and CLIP, the rest written out."""
    tensors = load_file(folder / "model.safetensors")
    family = json.loads((folder / "config.json").read_text())["model_type"].removeprefix("mgm").strip("_") or "llama"
    language = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES[family])).eval()
    own = ("model.vision_tower", "model.vlm_uni", "model.mm_projector")
    bare = folder / "bare"
    bare.mkdir(exist_ok=True)
    language.save_pretrained(bare)
    save_file({n: t for n, t in tensors.items() if not n.startswith(own)}, bare / "model.safetensors", {"format": "pt"})
    language = AutoModelForCausalLM.from_pretrained(bare).eval()
    batch = module.codec.collate([module.codec.encode(sample)], counts={"images": float(len(sample.images))})
    row = batch.text
    embeds = language.get_input_embeddings()(row.ids)
    if sample.images:
        features = features_by_hand(tensors, batch.views["image"].pixels, grid=module.grid, whole=module.whole)
        scale = 32**0.5 if family == "gemma" else 1.0
        embeds[row.slots["image"]] = features.flatten(0, 1) * scale
    logits = language(inputs_embeds=embeds[None]).logits[0, row.label_positions]
    return logits.log_softmax(-1).gather(1, row.targets[:, None]).squeeze(1)


def features_by_hand(tensors: dict[str, Tensor], pixels: Tensor, *, grid: int, whole: bool) -> Tensor:
    """One place at a time, as the paper writes it."""
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            image_size=28, patch_size=7, hidden_size=32, intermediate_size=128, num_hidden_layers=3,
            num_attention_heads=4,
        )
    ).eval()  # fmt: skip
    prefix = "model.vision_tower.vision_tower.vision_model."
    level = "vision_model." if any(name.startswith("vision_model.") for name in clip.state_dict()) else ""
    clip.load_state_dict({level + n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    trunk = timm.create_model("convnext_large_mlp", num_classes=0, **PYRAMID).eval()
    aux = {n.removeprefix("model.vision_tower_aux.vision_"): t for n, t in tensors.items() if "tower_aux" in n}
    assert not trunk.load_state_dict(aux, strict=False).unexpected_keys
    maps = trunk.forward_intermediates(pixels, intermediates_only=True, indices=[0, 1, 2, 3])
    side = maps[0].shape[-1]
    fine = torch.cat([F.interpolate(m, size=(side, side), mode="bilinear") for m in maps], dim=1)

    def layer(name: str, x: Tensor) -> Tensor:
        own = f"model.vlm_uni_{name}_projector."
        x = F.layer_norm(x, x.shape[-1:], tensors[own + "0.weight"], tensors[own + "0.bias"])
        return F.linear(x, tensors[own + "1.weight"], tensors[own + "1.bias"])

    def tokens(low_pixels: Tensor, fine: Tensor) -> Tensor:
        low = clip(low_pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        width, found = fine.shape[-1] // 4, []
        for place in range(16):
            y, x = place // 4 * width, place % 4 * width
            window = fine[:, :, y : y + width, x : x + width].flatten(2).transpose(1, 2)
            scores = layer("aux", window) @ layer("query", low[:, place, :, None].transpose(1, 2)).transpose(1, 2)
            found.append((scores / 32**0.5).softmax(1).transpose(1, 2) @ layer("val", window))
        mined = low + torch.cat(found, dim=1)
        hidden = F.gelu(F.linear(mined, *(tensors[f"model.mm_projector.0.{k}"] for k in ("weight", "bias"))))
        return F.linear(hidden, *(tensors[f"model.mm_projector.2.{k}"] for k in ("weight", "bias")))

    large = F.interpolate(pixels, size=(28 * grid, 28 * grid), mode="bilinear")
    made = []
    if whole:
        made.append(
            tokens(
                F.interpolate(large, size=(28, 28), mode="bilinear"),
                F.interpolate(fine, scale_factor=1 / grid, mode="bilinear"),
            )
        )
    half = side // grid
    for y in range(grid):
        for x in range(grid):
            part = large[:, :, 28 * y : 28 * y + 28, 28 * x : 28 * x + 28]
            made.append(tokens(part, fine[:, :, half * y : half * y + half, half * x : half * x + half]))
    return torch.cat(made, dim=1)


# -- base weights and paper size


def test_base_weights_of_openclip_timm_and_mixtral(tmp_path: Path) -> None:
    trunk = timm.create_model("convnext_large_mlp", num_classes=5, **PYRAMID)
    weights = {name: torch.randn_like(tensor) for name, tensor in trunk.state_dict().items()}
    save_file(weights, tmp_path / "timm.safetensors")
    text = {"logit_scale": torch.ones(1), "visual.head.proj.weight": torch.ones(2, 2)}
    save_file({f"visual.trunk.{n}": t for n, t in weights.items()} | text, tmp_path / "open_clip.safetensors")
    mixtral = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES["mixtral"]))
    mixtral.save_pretrained(tmp_path / "mixtral")
    for file in ("timm", "open_clip"):
        tower = ConvNeXtPyramid("convnext_large_mlp", 32, str(tmp_path / f"{file}.safetensors"), PYRAMID)
        module = mini_gemini(vision_high=tower, language=CausalLM(str(tmp_path / "mixtral")))
        module.configure_model()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in module.vision_high.trunk.state_dict().items())
        theirs = mixtral.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in module.language.state_dict().items())


def test_the_demo_has_the_tower_that_its_files_describe() -> None:
    root = Path(__file__).parents[2]
    overlay = yaml.safe_load((root / "configs/mini_gemini/demo/model.yaml").read_text())
    arguments = overlay["model"]["init_args"]["vision_high"]["init_args"]
    tower = ConvNeXtPyramid("convnext_large_mlp", **arguments).build()
    stored = load_file(root / arguments["weights"] / "model.safetensors")
    assert {name: t.shape for name, t in stored.items()} == {n: t.shape for n, t in tower.trunk.state_dict().items()}
    assert tower.facts.grid == 28


def test_new_tokens_of_gemma_are_scaled_as_the_others() -> None:
    tokenizer = dataclasses.replace(TOKENIZER, added_tokens=("<a>",))
    plain, grown = (
        mini_gemini(language=CausalLM(config=FAMILIES["gemma"]), tokenizer=t) for t in (TOKENIZER, tokenizer)
    )
    for module in (plain, grown):
        module.configure_model()
    ids = torch.tensor([5, 9])
    old, new = (module.language.get_input_embeddings() for module in (plain, grown))
    assert torch.equal(old(ids), new(ids))
    torch.testing.assert_close(new(torch.tensor([32000]))[0], new.added.weight[0] * 32**0.5)


def test_paths_are_dropped_in_training_alone() -> None:
    """As the published training loop leaves the frozen ConvNeXt: `stage.modes` says so."""
    options = PYRAMID | {"drop_path_rate": 0.5}
    module = mini_gemini(vision_high=ConvNeXtPyramid("convnext_large_mlp", 32, options=options))
    module.stage = Stage("1_align", {"connector": Trained(lr=1.0)}, modes={"vision_high": "train"})
    module.configure_model()
    pixels = torch.randn(2, 3, 32, 32)
    assert module.vision_high.training
    assert not module.vision.training
    assert not torch.equal(module.vision_high(pixels), module.vision_high(pixels))
    module.eval()
    assert torch.equal(module.vision_high(pixels), module.vision_high(pixels))


LANGUAGE_MODELS = {  # of the released models, from the config.json of each
    "vicuna_7b": ({"model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-5}, 6_738_415_616),
    "gemma_2b": (
        {"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
         "num_attention_heads": 8, "num_key_value_heads": 1},
        2_506_172_416,
    ),
    "mixtral_8x7b": ({"model_type": "mixtral", "intermediate_size": 14336, "num_key_value_heads": 8}, 46_702_792_704),
}  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_paper_size_has_the_published_tensors(name: str) -> None:
    """Names of CLIP, of the ConvNeXt and of the language model are of their own releases, the rest written out."""
    config, published = LANGUAGE_MODELS[name]
    module = mini_gemini(
        vision=TimmTower("vit_large_patch14_clip_quickgelu_336", layer=-2),
        vision_high=ConvNeXtPyramid("convnext_large_mlp", 768),
        language=CausalLM(config=config),
    )
    assert (module.high.dim, module.high.grid, module.codec.num_tokens(640, 480)) == (2880, 192, 576)
    with empty_weights():
        parts = module.build_parts()
    ours = {f"{part}.{n}": tuple(p.shape) for part, network in parts.items() for n, p in network.named_parameters()}
    language = published_language(parts["language"])
    theirs = language | published_pictures(width=parts["language"].config.hidden_size)
    table = llava_table(
        OFFICIAL,
        connector="mlp2x_gelu",
        num_blocks=23,
        vocab_rows=parts["language"].config.vocab_size,
        tied=bool(parts["language"].config.tie_word_embeddings),
        mining=True,
        num_experts=getattr(parts["language"].config, "num_local_experts", 0),
    )
    expected = table.check(theirs, side="theirs")
    carried = {name: shape for name, shape in expected.items() if table.is_carried(name)}
    assert ours | carried == expected
    assert table.check(expected, side="ours") == theirs
    assert sum(math.prod(shape) for shape in language.values()) == published
    assert sum(math.prod(s) for n, s in ours.items() if n.startswith("vision_high.")) == 196_227_264
    assert sum(math.prod(s) for n, s in ours.items() if n.startswith("mining.")) == 6_963_456


def published_language(language: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(parameter.shape) for name, parameter in language.named_parameters()}
    for name in [name for name in shapes if ".mlp.experts." in name or ".mlp.gate.weight" in name]:
        shape, layer = shapes.pop(name), name.split("mlp.")[0] + "block_sparse_moe."
        if name.endswith("gate.weight"):
            shapes[f"{layer}gate.weight"] = shape
        for expert in range(shape[0]) if ".experts." in name else ():
            for which in ("w1", "w3") if "gate_up" in name else ("w2",):
                rows = shape[1] // 2 if "gate_up" in name else shape[1]
                shapes[f"{layer}experts.{expert}.{which}.weight"] = (rows, shape[2])
    return shapes


def published_pictures(*, width: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
                image_size=336,
            )
        )  # fmt: skip
        trunk = timm.create_model("convnext_large_mlp", num_classes=0)
    bare = {name.removeprefix("vision_model."): p for name, p in clip.named_parameters()}
    shapes = {f"model.vision_tower.vision_tower.vision_model.{name}": tuple(p.shape) for name, p in bare.items()}
    kept = {name: p for name, p in trunk.named_parameters() if name.startswith(("stem.", "stages."))}
    shapes |= {f"model.vision_tower_aux.vision_{name}": tuple(p.shape) for name, p in kept.items()}
    for name, dim in {"query": 1024, "aux": 2880, "val": 2880}.items():
        own = f"model.vlm_uni_{name}_projector."
        shapes |= {f"{own}0.weight": (dim,), f"{own}0.bias": (dim,), f"{own}1.weight": (1024, dim)}
        shapes |= {f"{own}1.bias": (1024,)}
    shapes |= {"model.mm_projector.0.weight": (width, 1024), "model.mm_projector.2.weight": (width, width)}
    return shapes | {f"model.mm_projector.{layer}.bias": (width,) for layer in (0, 2)}
