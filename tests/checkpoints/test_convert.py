import vlm  # noqa: F401  (first: repairs torchvision)

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.parity import assert_same_scores
from vlm.checkpoints.artefact import read_artefact, write_artefact
from vlm.commands.convert import convert, main
from vlm.checkpoints.tables.llava import HF, HF_MEMORY, HF_SAVED, OFFICIAL, llava_table
from vlm.checkpoints.files.locate import CARRIED
from vlm.checkpoints.tables.rules import Axes, Fused, Rows, rename
from vlm.checkpoints.tables.table import Table
from vlm.checkpoints.files.identity import fingerprint_of, hash_tensor
from vlm.checkpoints.files.weights import WeightFiles
from vlm.errors import UserError

VOCAB = 100
GOLDEN = Path(__file__).parents[1] / "golden"


def tiny_config():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=12,  # two digits, so that sorting by text would show
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        rms_norm_eps=1e-5,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCAB, image_seq_length=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model as transformers saves it, in bfloat16 with a norm in float32."""
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(tiny_config()).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("hf_saved")
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_text("a tokenizer")
    return folder


@pytest.fixture(scope="module")
def hub(saved, tmp_path_factory):
    """The same in the layout of the hub, with the buffer that old files hold."""
    folder = tmp_path_factory.mktemp("hf")
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(saved / "model.safetensors").items()
    }
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    tensors["language_model.model.norm.weight"] = tensors["language_model.model.norm.weight"].float()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((saved / "config.json").read_text())
    return folder


def official_folder(folder, *, tower=True, connector="mlp2x_gelu", dtype=torch.float16, vocab=VOCAB):
    """A tiny checkpoint under the published official names, written out here by hand."""
    torch.manual_seed(1)

    def tensor(*shape):
        return torch.randn(*shape).to(dtype)

    tensors = {
        "model.embed_tokens.weight": tensor(vocab, 24),
        "lm_head.weight": tensor(vocab, 24),
        "model.norm.weight": tensor(24),
    }
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj.weight": (24, 24),
            "self_attn.k_proj.weight": (12, 24),
            "self_attn.v_proj.weight": (12, 24),
            "self_attn.o_proj.weight": (24, 24),
            "mlp.gate_proj.weight": (40, 24),
            "mlp.up_proj.weight": (40, 24),
            "mlp.down_proj.weight": (24, 40),
            "input_layernorm.weight": (24,),
            "post_attention_layernorm.weight": (24,),
        }.items():
            tensors[prefix + name] = tensor(*shape)
        tensors[prefix + "self_attn.rotary_emb.inv_freq"] = torch.randn(3)
    projector = {"": (24, 16)} if connector == "linear" else {"0.": (24, 16), "2.": (24, 24)}
    for name, shape in projector.items():
        tensors[f"model.mm_projector.{name}weight"] = tensor(*shape)
        tensors[f"model.mm_projector.{name}bias"] = tensor(shape[0])
    if tower:
        tensors |= clip_tensors("model.vision_tower.vision_tower.vision_model.", tensor)
    folder.mkdir(parents=True)
    halves = {"pytorch_model-00001-of-00002.bin": {}, "pytorch_model-00002-of-00002.bin": {}}
    for number, (name, value) in enumerate(tensors.items()):
        halves[f"pytorch_model-0000{1 + number % 2}-of-00002.bin"][name] = value
    for file, half in halves.items():
        torch.save(half, folder / file)
    weight_map = {name: file for file, half in halves.items() for name in half}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab,
        "max_position_embeddings": 64,
        "mm_projector_type": connector,
        "mm_vision_select_layer": -2,
        "model_type": "llava",
        "tokenizer_padding_side": "right",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def clip_tensors(prefix, tensor, blocks=4):
    tensors = {
        "embeddings.class_embedding": tensor(16),
        "embeddings.patch_embedding.weight": tensor(16, 3, 14, 14),
        "embeddings.position_embedding.weight": tensor(5, 16),
    }
    shapes = {"pre_layrnorm": (16,), "post_layernorm": (16,)}
    for block in range(blocks):
        name = f"encoder.layers.{block}."
        shapes |= {f"{name}self_attn.{part}": (16, 16) for part in ("q_proj", "k_proj", "v_proj", "out_proj")}
        shapes |= {f"{name}layer_norm1": (16,), f"{name}layer_norm2": (16,)}
        shapes |= {f"{name}mlp.fc1": (24, 16), f"{name}mlp.fc2": (16, 24)}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = tensor(*shape)
        tensors[f"{name}.bias"] = tensor(shape[0])
    return {prefix + name: value for name, value in tensors.items()}


def same(one, other):
    assert sorted(one) == sorted(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


def contents(folder):
    return dict(WeightFiles(folder).items())


# --- rules


def test_rules_both_ways():
    table = Table(
        layout="test",
        rules=(
            Fused(theirs=("l.{i}.q.{p}", "l.{i}.k.{p}"), ours=("blocks.{i}.qk.{p}",)),
            Axes(theirs=("patch",), ours=("vision.patch",), form="I O -> O 1 I"),
            Rows(theirs=("embed",), ours=("embed", "embed[3:]"), rows=3, published_rows=8),
            rename("junk.{rest}", None),
        ),
        unused=("blocks.{i>=1}.{rest}", "embed[3:]"),
    )
    theirs = {f"l.{i}.{part}.{kind}": torch.randn(2, 3) for i in (0, 1) for part in "qk" for kind in ("weight", "bias")}
    theirs |= {"patch": torch.randn(4, 5), "embed": torch.randn(4, 2)}
    ours, carried = table.to_ours([*theirs.items(), ("junk.a.b", torch.zeros(1))])
    assert sorted(ours) == ["blocks.0.qk.bias", "blocks.0.qk.weight", "embed", "vision.patch"]
    assert sorted(carried) == ["blocks.1.qk.bias", "blocks.1.qk.weight", "embed[3:]"]
    assert torch.equal(ours["vision.patch"], theirs["patch"].T[:, None])
    assert torch.equal(ours["blocks.0.qk.bias"], torch.cat([theirs["l.0.q.bias"], theirs["l.0.k.bias"]]))
    same(table.from_ours(ours, carried), theirs)
    made = table.from_ours(ours, {name: tensor for name, tensor in carried.items() if name != "embed[3:]"})["embed"]
    assert made.shape == (8, 2)
    torch.testing.assert_close(made[3:], ours["embed"].mean(0).expand(5, 2))


def test_leftovers_are_listed(tmp_path):
    tensors = official_folder(tmp_path / "official")
    table = llava_table(OFFICIAL, connector="mlp2x_gelu", num_blocks=3, vocab_rows=VOCAB)
    ours, carried = table.to_ours(tensors.items())
    extra = {f"model.extra.{number}": torch.zeros(1) for number in range(7)}
    shown = ", ".join(f"model.extra.{number}" for number in range(5))
    with pytest.raises(UserError, match=rf"^{shown}, \.\.\. \(7 in all\): no place in the LLaVA official layout"):
        table.to_ours({**tensors, **extra}.items())
    with pytest.raises(UserError, match=r"^connector\.4\.weight: no place in the LLaVA official layout"):
        table.from_ours(ours | {"connector.4.weight": torch.zeros(1)}, carried)
    tower = OFFICIAL.vision + "encoder.layers.2.self_attn.k_proj.bias"
    for lost, message in {
        "lm_head.weight": "^lm_head.weight: missing",
        "model.layers.1.mlp.up_proj.weight": r"^model\.layers\.1\.mlp\.up_proj\.weight: missing",
        "model.layers.0.input_layernorm.weight": r"^model\.layers\.0\.input_layernorm\.weight: missing",
        "model.mm_projector.2.bias": r"^model\.mm_projector\.2\.bias: missing",
        tower: rf"^{tower}".replace(".", r"\."),
        OFFICIAL.vision + "pre_layrnorm.weight": r"pre_layrnorm\.\{p\}",
    }.items():
        kept = {name: tensor for name, tensor in tensors.items() if name != lost}
        if "pre_layrnorm" in lost:  # both of the rule
            kept.pop(lost.replace("weight", "bias"))
        with pytest.raises(UserError, match=message):
            table.to_ours(kept.items())
        shapes = {name: tuple(tensor.shape) for name, tensor in kept.items()}
        with pytest.raises(UserError, match=message):
            table.check(shapes, side="theirs")
    with pytest.raises(UserError, match="has 128 rows, but the vocabulary has 200"):
        llava_table(HF, connector="mlp2x_gelu", num_blocks=3, vocab_rows=200).to_ours(
            [("language_model.model.embed_tokens.weight", torch.zeros(128, 2))]
        )
    with pytest.raises(UserError, match="two-layer projector"):
        llava_table(HF, connector="linear", num_blocks=3, vocab_rows=VOCAB)


def test_all_hugging_face_layouts_give_the_same(saved):
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(saved, dtype=torch.bfloat16)
    memory = model.state_dict()
    files = load_file(saved / "model.safetensors")
    options = {"connector": "mlp2x_gelu", "num_blocks": 3, "vocab_rows": VOCAB}
    results = [
        llava_table(HF_MEMORY, **options).to_ours(memory.items()),
        llava_table(HF_SAVED, **options).to_ours(files.items()),
    ]
    same(results[0][0], results[1][0])
    same(results[0][1], results[1][1])
    same(llava_table(HF_MEMORY, **options).from_ours(*results[1]), memory)
    same(llava_table(HF_SAVED, **options).from_ours(*results[0]), files)


def test_tower_computes_the_same_in_timm(saved):
    import timm
    from transformers import CLIPVisionModel

    reference = CLIPVisionModel(tiny_config().vision_config).eval()
    for parameter in reference.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    tensors = {f"vision_tower.{name}": tensor for name, tensor in reference.state_dict().items()}
    files = {
        name: t.float() for name, t in load_file(saved / "model.safetensors").items() if "vision_tower" not in name
    }
    table = llava_table(HF_SAVED, connector="mlp2x_gelu", num_blocks=3, vocab_rows=VOCAB)
    ours, _ = table.to_ours({**files, **tensors}.items())
    trunk = timm.create_model(
        "vit_large_patch14_clip_quickgelu_336",
        img_size=28, embed_dim=16, depth=3, num_heads=2, mlp_ratio=1.5, num_classes=0,
    ).eval()  # fmt: skip
    trunk.norm = torch.nn.Identity()
    state = {name.removeprefix("vision.trunk."): t for name, t in ours.items() if name.startswith("vision.")}
    trunk.load_state_dict(state)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = reference(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(trunk.forward_features(pixels), expected, atol=2e-5, rtol=1e-5)


# --- whole folders


@pytest.mark.parametrize("tower", [True, False])
@pytest.mark.parametrize("connector", ["mlp2x_gelu", "linear"])
def test_official_round_trip(tmp_path, tower, connector):
    system = {"linear": "llava", "mlp2x_gelu": "llava_1_5"}[connector]
    tensors = official_folder(tmp_path / "official", tower=tower, connector=connector)
    convert(tmp_path / "official", tmp_path / "ours", system=system, target_layout="ours")
    artefact = read_artefact(tmp_path / "ours", system=system)
    artefact.verify()
    if tower:
        assert {name.split(".")[3] for name in artefact.carried if "blocks" in name} == {"3"}
        assert "vision.trunk.norm.weight" in artefact.carried
    else:
        assert "vision" in artefact.meta["frozen"]
    convert(tmp_path / "ours", tmp_path / "again", system=system, target_layout="official")
    same(contents(tmp_path / "again"), tensors)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("official", "again")]
    assert configs[0] == configs[1]
    assert not (tmp_path / "again" / CARRIED).exists()
    if connector == "linear":
        with pytest.raises(UserError, match="two-layer projector"):
            convert(tmp_path / "ours", tmp_path / "hf", system=system, target_layout="hf", vision=tmp_path)


def test_a_delta_over_llama(tmp_path, capsys):
    """What `apply_delta` of the official code computes, in float16; three vocabulary rows are new."""
    delta = official_folder(tmp_path / "delta", tower=False, connector="linear")
    base = {name: torch.randn_like(tensor) for name, tensor in delta.items() if "mm_projector" not in name}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = base[name][: VOCAB - 3]
    expected = {name: tensor.clone() for name, tensor in delta.items()}
    for name, tensor in base.items():
        expected[name][: len(tensor)] += tensor
    save_file(base, tmp_path / "base.safetensors")
    arguments = [str(tmp_path / "delta"), str(tmp_path / "whole"), "--system", "llava", "--to", "official"]
    assert main([*arguments, "--base", str(tmp_path / "base.safetensors")]) == 0
    same(contents(tmp_path / "whole"), expected)

    # files of a newer LLaMA list no buffers; the delta's own say nothing
    plain = {name: tensor for name, tensor in base.items() if "inv_freq" not in name}
    save_file(plain, tmp_path / "plain.safetensors")
    convert(
        tmp_path / "delta", tmp_path / "ours", system="llava", target_layout="ours", base=tmp_path / "plain.safetensors"
    )
    convert(tmp_path / "ours", tmp_path / "again", system="llava", target_layout="official")
    same(contents(tmp_path / "again"), {name: t for name, t in expected.items() if "inv_freq" not in name})

    for name, change, message in (
        ("model.norm.weight", None, "lacks model.norm.weight of the delta"),
        ("model.more.weight", torch.ones(2), "lacks model.more.weight of the base"),
        ("lm_head.weight", torch.ones(VOCAB + 1, 24), r"lm_head.weight has shape \(100, 24\), the base .* \(101, 24\)"),
    ):
        wrong = {k: t for k, t in {**plain, name: change}.items() if t is not None}
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(UserError, match=message):
            main([*arguments[:1], str(tmp_path / "new"), *arguments[2:], "--base", str(tmp_path / "wrong.safetensors")])
    with pytest.raises(UserError, match="only published weights are deltas"):
        convert(tmp_path / "ours", tmp_path / "new", system="llava", target_layout="official", base=tmp_path / "base")
    assert not (tmp_path / "new").exists()


def test_hf_round_trip_also_through_official(tmp_path, hub, saved):
    for source in (hub, saved):
        steps = [source]
        for target in ("ours", "hf", "official", "ours", "hf"):
            steps.append(tmp_path / f"{source.name}-{len(steps)}-{target}")
            convert(steps[-2], steps[-1], system="llava_1_5", target_layout=target)
        same(contents(steps[2]), contents(source))
        assert json.loads((steps[2] / "config.json").read_text()) == json.loads((source / "config.json").read_text())
        official = contents(steps[3])
        assert official["model.embed_tokens.weight"].shape == (VOCAB, 24)
        assert len(contents(steps[3] / CARRIED)) == 2  # the rows above the vocabulary
        # the way through official ends in the layout of the hub
        expected = contents(source)
        if source is saved:
            expected = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in expected.items()}
        same(contents(steps[5]), expected)
    assert (steps[-1] / "tokenizer.model").read_text() == "a tokenizer"


def test_official_loads_in_transformers(tmp_path):
    from transformers import LlavaForConditionalGeneration

    tensors = official_folder(tmp_path / "official", dtype=torch.float32)
    convert(tmp_path / "official", tmp_path / "ours", system="llava_1_5", target_layout="ours")
    report = convert(tmp_path / "ours", tmp_path / "hf", system="llava_1_5", target_layout="hf")
    assert len(report.new) == 2
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["unexpected_keys"]
    head = model.lm_head.weight
    assert len(head) == 128
    torch.testing.assert_close(head[VOCAB:], head[:VOCAB].mean(0).expand(28, -1))
    tower = model.model.vision_tower.state_dict()
    same(tower, {name: tensors[f"{OFFICIAL.vision}{name}"] for name in tower})
    config = model.config
    assert (config.text_config.num_key_value_heads, config.text_config.rms_norm_eps) == (2, 1e-5)
    assert (config.image_token_index, config.image_seq_length, config.vision_feature_layer) == (VOCAB, 4, -2)
    assert config.vision_config.hidden_act == "quick_gelu"
    ids = torch.tensor([[1, *[VOCAB] * 4, 7, 8]])
    logits = model(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28)).logits
    assert torch.isfinite(logits).all()


def test_tower_without_its_unused_end(tmp_path):
    """A tower that came from timm carries nothing; the class then reads its last block instead of the one before."""
    from transformers import LlavaForConditionalGeneration

    official_folder(tmp_path / "official", dtype=torch.float32)
    convert(tmp_path / "official", tmp_path / "ours", system="llava_1_5", target_layout="ours")
    ours = read_artefact(tmp_path / "ours")
    write_artefact(tmp_path / "bare", tensors=ours.items(), meta=ours.meta)
    logits = []
    torch.manual_seed(3)
    inputs = {"input_ids": torch.tensor([[1, *[VOCAB] * 4, 7, 8]]), "pixel_values": torch.randn(1, 3, 28, 28)}
    for source in ("ours", "bare"):
        convert(tmp_path / source, tmp_path / f"{source}_hf", system="llava_1_5", target_layout="hf")
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path / f"{source}_hf")
        logits.append(model(**inputs).logits)
    assert len(model.model.vision_tower.encoder.layers) == 3
    assert_same_scores(logits[:1], logits[1:])


def test_separate_tower_and_frozen_parts(tmp_path):
    tensors = official_folder(tmp_path / "official", tower=False)
    torch.manual_seed(2)
    tower = clip_tensors("vision_model.", lambda *shape: torch.randn(*shape))
    (tmp_path / "clip").mkdir()
    save_file(
        {**tower, "logit_scale": torch.zeros(1), "text_model.x": torch.zeros(1)}, tmp_path / "clip/model.safetensors"
    )
    vision_config = {"num_attention_heads": 2, "hidden_size": 16}
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"vision_config": vision_config}))
    with pytest.raises(UserError, match="--vision"):
        convert(tmp_path / "official", tmp_path / "hf", system="llava_1_5", target_layout="hf")
    convert(
        tmp_path / "official", tmp_path / "full", system="llava_1_5", target_layout="ours", vision=tmp_path / "clip"
    )
    full = read_artefact(tmp_path / "full")
    # a trained stage stores what it trained and names the rest
    frozen = {
        part: {
            "source": str(tmp_path / source),
            "fingerprint": fingerprint_of({n: hash_tensor(t) for n, t in full.items() if n.startswith(f"{part}.")}),
        }
        for part, source in {"vision": "clip", "language": "full"}.items()
    }
    trained = {name: tensor + 1 for name, tensor in full.items() if name.startswith("connector.")}
    meta = {
        "system": "llava_1_5",
        "stage": "1_align",
        "global_step": 3,
        "model": full.meta["model"],
        "frozen": frozen,
        "follows": [{"path": str(tmp_path / "full"), "fingerprint": full.fingerprint}],
    }
    write_artefact(tmp_path / "stage", tensors=trained.items(), meta=meta)
    convert(tmp_path / "stage", tmp_path / "hf", system="llava_1_5", target_layout="hf")
    written = contents(tmp_path / "hf")
    for name, tensor in tower.items():
        assert torch.equal(written[f"vision_tower.{name}"], tensor)
    assert torch.equal(written["language_model.lm_head.weight"][:VOCAB], tensors["lm_head.weight"])
    assert torch.equal(written["multi_modal_projector.linear_2.bias"], tensors["model.mm_projector.2.bias"] + 1)
    assert json.loads((tmp_path / "hf/config.json").read_text())["vision_config"]["num_attention_heads"] == 2
    frozen["vision"]["fingerprint"] = "0" * 32
    write_artefact(tmp_path / "stage", tensors=trained.items(), meta=meta)
    with pytest.raises(UserError, match="the vision in it is not the one"):
        convert(tmp_path / "stage", tmp_path / "hf2", system="llava_1_5", target_layout="hf")
    assert not (tmp_path / "hf2").exists()


def test_command(tmp_path, capsys):
    official_folder(tmp_path / "official")
    arguments = [str(tmp_path / "official"), str(tmp_path / "ours"), "--to", "ours"]
    with pytest.raises(UserError, match="has the projector mlp2x_gelu, but llava has linear"):
        main([*arguments, "--system", "llava"])
    assert main([*arguments, "--system", "llava_1_5"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["part", "loaded", "carried"]
    with pytest.raises(UserError, match="exists already"):
        main([*arguments, "--system", "llava_1_5"])
    config = tmp_path / "official" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    arguments[1] = str(tmp_path / "other")
    with pytest.raises(UserError, match="num_hidden_layers 4, the tensors say 3"):
        main([*arguments, "--system", "llava_1_5"])
    code = "import sys, vlm.commands.convert; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- paper size


@pytest.fixture(scope="module")
def paper_size():
    """Names and shapes of LLaVA-1.5 7B as transformers makes it, on the meta device."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def num_parameters(shapes):
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def test_paper_size(paper_size):
    import timm
    from transformers import LlamaConfig, LlamaForCausalLM

    assert num_parameters(paper_size) == 7_063_427_072
    options = {"connector": "mlp2x_gelu", "num_blocks": 23, "vocab_rows": 32000}
    table = llava_table(HF_MEMORY, **options)
    derived = table.check(paper_size, side="theirs")
    carried = {name: shape for name, shape in derived.items() if table.is_carried(name)}
    ours = {name: shape for name, shape in derived.items() if name not in carried}

    with torch.device("meta"):
        trunk = timm.create_model("vit_large_patch14_clip_quickgelu_336", num_classes=0)
        trunk.blocks = trunk.blocks[:23]
        trunk.norm = torch.nn.Identity()
        network = torch.nn.ModuleDict(
            {
                "vision": torch.nn.ModuleDict({"trunk": trunk}),
                "connector": torch.nn.Sequential(
                    torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 4096)
                ),
                "language": LlamaForCausalLM(LlamaConfig(vocab_size=32000)),
            }
        )
    assert ours == {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert {name.split(".")[3] for name in carried if "blocks" in name} == {"23"}
    assert sorted(name for name in carried if "blocks" not in name) == [
        "language.lm_head.weight[32000:]",
        "language.model.embed_tokens.weight[32000:]",
        "vision.trunk.norm.bias",
        "vision.trunk.norm.weight",
    ]
    assert table.check(derived, side="ours") == paper_size
    # the official files: a vocabulary of 32000, with and without the tower
    placed = {name: shape for name, shape in derived.items() if not name.endswith("[32000:]")}
    official = llava_table(OFFICIAL, **options).check(placed, side="ours")
    assert num_parameters(official) == 7_062_902_784
    tower = {name: shape for name, shape in official.items() if "vision_tower" in name}
    assert num_parameters(tower) == 303_507_456
    assert num_parameters(official) - num_parameters(tower) == 6_759_395_328
    assert llava_table(OFFICIAL, **options).check(official, side="theirs") == placed
    # what the class does itself when the rows have to be made
    assert llava_table(HF_MEMORY, **options).check(placed, side="ours") == paper_size
