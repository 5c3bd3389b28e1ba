"""InternLM-XComposer2 against the official numbers (`xc2_internlm2__a`, `xc2_vision__a`), its released files, and what
lies over partial LoRA or comes of it."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import vlm  # first: repairs torchvision
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import cli
from callbacks.stage_transition import write_stage
from tests.conftest import GOLDEN, golden, golden_json
from tests.language.test_layer_inputs import continued
from tests.support.parity import assert_same_scores, assert_same_state
from tests.support.samples import questions, samples
from tests.support.systems import RATE
from tests.support.xcomposer2 import xcomposer2
from tests.systems.test_contract import disturb
from vlm.batch import Row, TokenSequence
from vlm.building.network import empty_weights
from vlm.checkpoints.published.family import find_family, get_family, look_into
from vlm.checkpoints.files.weights import WeightFiles
from vlm.commands.convert import convert
from vlm.errors import UserError
from vlm.language import CausalLM, Decoding, PartialLoRA, PeftAdapter, VisualExpert
from vlm.language.causal_lm import label_logits
from vlm.stages import InitFrom, Stage, Trained
from vlm.systems import XComposer2
from vlm.vision import TimmTower

LANGUAGE, VISION = "xc2_internlm2__a", "xc2_vision__a"
ROWS = 32002  # the test's vocabulary lacks the two marks
STATED = {
    "_name_or_path": "internlm/internlm-xcomposer2-vl-7b",
    "architectures": ["InternLMXComposer2ForCausalLM"],
    "attn_implementation": "eager",
    "bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "img_size": 490,
    "max_length": 4096,
    "max_position_embeddings": 32768,
    "model_type": "internlm2",
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 1.0, "type": "dynamic"},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": False,
}
"""Of the released `config.json` (memory), without its sizes."""
PAPER = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "vocab_size": 92544,
}  # fmt: skip


def published_shapes(
    sizes: Mapping[str, int], *, width: int, mlp: int, depth: int, patch: int, places: int, rank: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released checkpoint, written out from section 3.8 of its facts."""
    dim, inner, kv = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_key_value_heads"]
    qkv = (sizes["num_attention_heads"] + 2 * kv) * dim // sizes["num_attention_heads"]
    tower = "vit.vision_tower.vision_model."
    theirs: dict[str, tuple[int, ...]] = {
        "model.tok_embeddings.weight": (sizes["vocab_size"], dim),
        "model.norm.weight": (dim,),
        "output.weight": (sizes["vocab_size"], dim),
        "vision_proj.0.weight": (dim, width),
        "vision_proj.2.weight": (dim, dim),
        "vision_proj.0.bias": (dim,),
        "vision_proj.2.bias": (dim,),
        f"{tower}embeddings.class_embedding": (width,),
        f"{tower}embeddings.patch_embedding.weight": (width, 3, patch, patch),
        f"{tower}embeddings.position_embedding.weight": (places, width),
    }
    theirs |= {f"{tower}{n}.{k}": (width,) for n in ("pre_layrnorm", "post_layernorm") for k in ("weight", "bias")}
    for i in range(depth):
        layer = f"{tower}encoder.layers.{i}."
        linears = {f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        linears |= {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}
        for name, shape in linears.items():
            theirs |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        theirs |= {f"{layer}layer_norm{n}.{k}": (width,) for n in (1, 2) for k in ("weight", "bias")}
    for i in range(sizes["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        theirs |= {f"{layer}{name}.weight": (dim,) for name in ("attention_norm", "ffn_norm")}
        linears = {"attention.wqkv": (qkv, dim), "attention.wo": (dim, dim)}
        linears |= {f"feed_forward.{name}": (inner, dim) for name in ("w1", "w3")}
        linears["feed_forward.w2"] = (dim, inner)
        for name, (out, into) in linears.items():
            theirs |= {
                f"{layer}{name}.weight": (out, into),
                f"{layer}{name}.Plora_A.weight": (rank, into),
                f"{layer}{name}.Plora_B.weight": (out, rank),
            }
    return theirs


def _sizes(case: str) -> tuple[dict[str, int], dict[str, Any], int]:
    """Sizes of language model and tower around the weights of a golden case, and the rank."""
    language, vision = golden_json(LANGUAGE)["config"], golden_json(VISION)["config"]
    sizes = {
        "hidden_size": language["hidden"] if case == LANGUAGE else vision["out"],
        "intermediate_size": language["mlp"],
        "num_attention_heads": language["heads"] if case == LANGUAGE else 5,
        "num_hidden_layers": language["layers"],
        "num_key_value_heads": language["kv"] if case == LANGUAGE else 1,
        "vocab_size": ROWS,
    }
    tower = {
        "width": vision["hidden"], "mlp": vision["mlp"], "depth": vision["layers"], "patch": vision["patch"],
        "places": vision["new"] ** 2 + 1,
    }  # fmt: skip
    return sizes, tower, language["r"]


def published_folder(folder: Path, case: str = LANGUAGE) -> Path:
    """The golden weights of one half in the released form, beside random ones of the other half."""
    sizes, tower, rank = _sizes(case)
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    shapes = published_shapes(sizes, rank=rank, **tower)
    weights = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    found = {name.removeprefix("weights/"): t for name, t in golden(case).items() if name.startswith("weights/")}
    weights |= {name: tensor for name, tensor in found.items() if tensor.shape == shapes[name]}  # but the vocabulary
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    size = golden_json(VISION)["config"]
    own = {
        "patch_size": tower["patch"],
        "embed_dim": tower["width"],
        "depth": tower["depth"],
        "num_heads": size["heads"],
    }
    own |= {"mlp_ratio": tower["mlp"] / tower["width"]}
    content = STATED | sizes | {"vision": own, "img_size": size["image"], "partial_lora": {"rank": rank}}
    (folder / "config.json").write_text(json.dumps(content))
    model = GOLDEN / "_shared" / "llama_sp_tokenizer.model"
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published_folder(tmp_path_factory.mktemp("published") / "official")


@torch.no_grad()
def test_language_model_and_partial_lora_equal_the_official_numbers(official: Path) -> None:
    """Opened as the files describe it. The official rows are padded, ours lie one after another: 4e-6 seen."""
    tensors, module = golden(LANGUAGE), vlm.load(official)
    language: Any = module.language
    for part, name in ((language.get_input_embeddings(), "model.tok_embeddings"), (language.lm_head, "output")):
        part.weight = torch.nn.Parameter(tensors[f"weights/{name}.weight"])
    real, visual = tensors["inputs/attention_mask"].bool(), tensors["inputs/im_mask"].bool()
    for mask, name in ((visual, "outputs/logits"), (torch.zeros_like(visual), "outputs/logits_mask_off")):
        sequences = [
            TokenSequence(ids[keep], torch.zeros_like(ids[keep]), visual=one[keep].nonzero().squeeze(1))
            for ids, keep, one in zip(tensors["inputs/input_ids"], real, mask, strict=True)
        ]
        logits = label_logits(language, tensors["outputs/inputs_embeds"][real], Row.pack(sequences))
        torch.testing.assert_close(logits, tensors[name][real], atol=3e-5, rtol=0)


@torch.no_grad()
def test_tower_and_connector_equal_the_official_numbers(tmp_path: Path) -> None:
    """The output of the last block without the norm behind it: 2e-6 seen."""
    tensors, module = golden(VISION), vlm.load(published_folder(tmp_path / "official", VISION))
    features = module.vision(tensors["inputs/image"])
    torch.testing.assert_close(features, tensors["outputs/features"], atol=2e-5, rtol=0)
    torch.testing.assert_close(module.connector(features), tensors["outputs/tokens"], atol=2e-5, rtol=0)
    assert module.codec.num_tokens(640, 480) == features.shape[1]
    before, after = (tensors["inputs/position_embedding_before"], tensors["outputs/position_embedding_after"])
    stretched, method = module.vision.adopt("trunk.pos_embed", before[None])
    assert method == "bicubic"
    # the release rounds the stretched table through float16, which is 2.4e-4 at most here
    torch.testing.assert_close(stretched[0], after, atol=1e-3, rtol=0)
    assert torch.equal(stretched[0].half()[:1], after.half()[:1])


def test_published_files_come_back_bit_equal(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "ours", system="xcomposer2", target_layout="ours")
    convert(tmp_path / "ours", tmp_path / "back", system="xcomposer2", target_layout="official")
    before, after = (load_file(folder / "model.safetensors") for folder in (official, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert json.loads((official / "config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())
    assert_same_state(vlm.load(official), vlm.load(tmp_path / "back"))


def test_a_folder_is_known_by_its_tensors_and_settings(official: Path, tmp_path: Path) -> None:
    folder = look_into(official, WeightFiles(official))
    assert find_family(folder).system == "xcomposer2"
    content = json.loads((official / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for file in official.iterdir():
        (other / file.name).symlink_to(file)
    (other / "config.json").unlink()
    for change, message in (
        ({"bias": True}, "bias is true"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"sliding_window": 128}, "sliding_window is 128"),
    ):
        (other / "config.json").write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=message):
            vlm.load(other)
    wide = content | {"img_size": 490, "vision": {**content["vision"], "patch_size": 14}}
    family: Any = get_family("xcomposer2")
    assert family.describe_folder(wide, official)["init_args"]["template"] == "xcomposer2"
    assert family.describe_folder(content, official)["init_args"]["template"] == "xcomposer2_plain"


def test_paper_size_has_the_published_tensors(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "_shared" / "llama_sp_tokenizer.model").read_bytes())
    config, family = STATED | PAPER, get_family("xcomposer2")
    arguments = family.describe_folder(config, tmp_path)["init_args"]  # type: ignore[attr-defined]
    [partial] = family.surgery_of(config)  # type: ignore[attr-defined]
    assert (
        partial["init_args"] == arguments["partial_lora"]["init_args"] == {"rank": 256, "scale": 1.0, "dropout": 0.05}
    )
    module = xcomposer2(
        vision=TimmTower(**arguments["vision"]["init_args"]),
        language=CausalLM(**arguments["language"]["init_args"]),
        partial_lora=PartialLoRA(**partial["init_args"]),
    )
    assert module.codec.num_tokens(640, 480) == 1225
    with empty_weights():
        for name, part in module.build_parts().items():
            module.add_module(name, part)
        PartialLoRA(**partial["init_args"]).apply(module)
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs = published_shapes(PAPER, width=1024, mlp=4096, depth=24, patch=14, places=1226, rank=256)
    table = family.table("official", config)  # type: ignore[attr-defined]
    made = table.check(theirs, side="theirs")
    carried = {name for name in made if table.is_carried(name)}
    assert carried == {"vision.trunk.norm.weight", "vision.trunk.norm.bias"}
    assert {name: shape for name, shape in made.items() if name not in carried} == ours
    assert table.check(made, side="ours") == theirs
    count = {part: sum(math.prod(s) for n, s in ours.items() if part(n)) for part in (_is_partial, _is_language)}
    assert count[_is_partial] == 603_979_776
    assert count[_is_language] == 7_737_708_544  # InternLM2-7B
    assert sum(math.prod(shape) for shape in theirs.values()) == 8_666_840_064


def _is_partial(name: str) -> bool:
    return ".Plora_" in name


def _is_language(name: str) -> bool:
    return name.startswith("language.") and ".Plora_" not in name


# -- partial LoRA as something to train, to lie under and to become


def staged(follows: Path, *operations: Any, train: Any, merge: bool = False, **changes: Any) -> XComposer2:
    """A stage over an artefact or the released files."""
    made = XComposer2(**vlm.load(follows).arguments | changes)
    for operation in operations:
        made.register_surgery(operation)
    made.stage = Stage("test", train, follows=[InitFrom(str(follows), merge=merge)])
    made.configure_model()
    return made.eval()


def assert_near(ours: Iterable[Tensor], theirs: Iterable[Tensor], *, atol: float = 1e-4) -> None:
    """Of two networks that compute the same with weights that were summed elsewhere."""
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=atol, rtol=1e-5)


PRETRAIN = {"vision": Trained(1.0), "connector": Trained(1.0), "language.model.layers.*.Plora_*": Trained(1.0)}


@pytest.fixture(scope="module")
def pretrained(official: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[XComposer2, Path]:
    """A finished stage 1 over the released files."""
    folder = tmp_path_factory.mktemp("pretrained")
    module = staged(official, train=PRETRAIN)
    disturb(module, module.trained_names())
    write_stage(folder / "artefact", module, global_step=1)
    return module, folder / "artefact"


def test_stage_1_holds_partial_lora_and_hands_it_on(pretrained: tuple[XComposer2, Path], tmp_path: Path) -> None:
    module, artefact = pretrained
    stored = json.loads((artefact / "stage.json").read_text())
    assert not any(name.startswith("language") and ".Plora_" not in name for name in stored["tensors"])
    later = staged(artefact, train={"language": Trained(1.0)})
    assert later.surgery == module.surgery
    assert_same_scores(later.score(samples(tmp_path, 3)), module.score(samples(tmp_path, 3)))
    with pytest.raises(UserError, match=r"changed twice by PartialLoRA.*rank: 8 and 3"):
        staged(artefact, train={"language": Trained(1.0)}, partial_lora=PartialLoRA(rank=3, dropout=0.05))
    with pytest.raises(UserError, match=r"nothing to merge \(partial LoRA acts on image tokens alone, so no plain"):
        staged(artefact, train={"connector": RATE}, merge=True)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_lies_over_partial_lora(dora: bool, pretrained: tuple[XComposer2, Path], tmp_path: Path) -> None:
    """It starts as the identity, answers with a cache as without one, and goes back into the published files."""
    base, artefact = pretrained
    lora = PeftAdapter(rank=2, alpha=4, dora=dora)
    module = staged(artefact, lora, train={"adapters": Trained(1.0), "connector": Trained(1.0)})
    assert module.surgery == [*base.surgery, lora]
    assert {n for n, _ in base.named_parameters()} < {n for n, _ in module.named_parameters()}
    pool, asked = samples(tmp_path, 4), questions(tmp_path)
    assert_near(module.score(pool), base.score(pool), atol=5e-6)
    for _ in range(8):
        disturb(module, {name for name, _ in module.named_parameters() if ".lora_" in name})
    decoding = Decoding(max_new_tokens=6)
    answers = module.generate(asked, decoding=decoding)
    assert answers != base.generate(asked, decoding=decoding)
    assert answers == [continued(module, one, 6) for one in asked]
    write_stage(tmp_path / "tuned", module, global_step=1)
    loaded = vlm.load(tmp_path / "tuned")
    assert loaded.surgery == [*base.surgery, lora]
    assert_same_scores(loaded.score(pool), module.score(pool))
    merged = staged(tmp_path / "tuned", train={"connector": RATE}, merge=True)
    assert merged.surgery == base.surgery
    assert_near(merged.eval().score(pool), module.score(pool))
    convert(tmp_path / "tuned", tmp_path / "official", system="xcomposer2", target_layout="official")
    assert_near(vlm.load(tmp_path / "official").score(pool), module.score(pool))


def test_weights_under_partial_lora_are_not_kept_in_4_bits(official: Path) -> None:
    with pytest.raises(UserError, match=r"q_proj has partial LoRA, .* leave `quantize` out"):
        staged(official, PeftAdapter(rank=2, alpha=4, quantize="language"), train={"adapters": RATE})


def test_it_becomes_a_visual_expert_on_request(
    pretrained: tuple[XComposer2, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, artefact = pretrained
    command = ["convert", str(artefact), str(tmp_path / "expert"), "--system", "xcomposer2", "--to", "ours"]
    assert cli.main([*command, "--visual_expert"]) == 0
    assert "no logit of a probe differs" in capsys.readouterr().out
    module = vlm.load(tmp_path / "expert")
    assert module.surgery == [VisualExpert(), *base.surgery[1:]]
    assert not any("Plora" in name for name, _ in module.named_parameters())
    pool, asked = samples(tmp_path, 3), questions(tmp_path)
    assert_near(module.score(pool), base.score(pool))
    decoding = Decoding(max_new_tokens=6)
    assert module.generate(asked, decoding=decoding) == base.generate(asked, decoding=decoding)
    for wrong, message in (
        (["--to", "official"], "only our artefacts hold a visual expert"),
        (["--to", "ours"], "has no partial LoRA"),
    ):
        again = ["convert", str(tmp_path / "expert"), str(tmp_path / "no"), "--system", "xcomposer2", *wrong]
        assert cli.main([*again, "--visual_expert"]) == 2
        assert message in capsys.readouterr().err


def test_a_trained_stage_goes_back_into_the_released_files(official: Path, tmp_path: Path) -> None:
    made = staged(official, train={"language": Trained(1.0)})
    disturb(made, made.trained_names())
    write_stage(tmp_path / "artefact", made, global_step=1)
    convert(tmp_path / "artefact", tmp_path / "back", system="xcomposer2", target_layout="official")
    pool = samples(tmp_path, 3)
    assert_same_scores(vlm.load(tmp_path / "back").score(pool), made.eval().score(pool))
    plain = xcomposer2(partial_lora=None)
    plain.stage = Stage("plain", {"connector": RATE})
    plain.configure_model()
    write_stage(tmp_path / "plain", plain, global_step=1)
    with pytest.raises(UserError, match="has partial LoRA on all linear layers"):
        convert(tmp_path / "plain", tmp_path / "no", system="xcomposer2", target_layout="official")
