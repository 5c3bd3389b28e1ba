"""Who reads weights: what a part takes of other files, what may start new, what is left out, what is made to fit."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    CLIPVisionModel,
)

import vlm
from callbacks.stage_transition import write_stage
from tests.conftest import golden
from tests.support.blip2 import OPT
from tests.support.systems import LLAMA, RATE, TOWER, llava_1_5
from tests.support.xcomposer import EVA, xcomposer
from tests.systems.test_contract import disturb
from vlm.building.network import allocate, empty_weights, initialisers, load_or_init
from vlm.building.weight_sources import base_source
from vlm.checkpoints.files.source import WeightSource
from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.tables.base import BaseWeights, read_with_table
from vlm.checkpoints.tables.rules import rename
from vlm.checkpoints.tables.table import Table
from vlm.connectors import Connector, QFormer
from vlm.errors import UserError
from vlm.language import CausalLM, Med
from vlm.module import VisionLanguageModule
from vlm.stages import InitFrom, Stage, matches
from vlm.vision import TimmTower

BERT: Any = {"dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 48, "vocab_size": 51}

# -- another architecture's weights: BERT's in a stack of queries with cross-attention


@dataclass(frozen=True)
class BertQueries(Connector):
    """Queries over BERT's layers, of which one looks at the image by a layer that BERT does not have."""

    weights: str | None = None
    rest: ClassVar[str] = "cross.*"

    def build(self, in_dim: int, out_dim: int) -> nn.Module:
        network = nn.Sequential(nn.Linear(in_dim, 32), nn.Linear(32, 32), nn.Linear(32, out_dim))
        return nn.ModuleDict(dict(zip(("cross", "query", "out"), network, strict=True)))

    def read_base(self, network: nn.Module, files: WeightFiles) -> BaseWeights:
        bert = "bert." if any(key.startswith("bert.") for key in files.keys()) else ""  # noqa: SIM118
        used = rename(f"{bert}encoder.layer.0.attention.self.query.{{p}}", "query.{p}")
        dropped = (f"{bert}encoder.{{rest}}", f"{bert}embeddings.{{rest}}", f"{bert}pooler.{{rest}}", "cls.{rest}")
        table = Table(layout="BERT", rules=(used, *(rename(name, None) for name in dropped)))
        return read_with_table(table, files, fresh=(self.rest, "out"))


def _bert(folder: Path, kind: type) -> str:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    kind(BertConfig(vocab_size=50, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM], ids=["with a pooler", "with a prefix and a head"])
def test_a_description_reads_its_layout(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _bert(tmp_path / "bert", kind)
    module = llava_1_5(connector=BertQueries(folder))
    module.configure_model()
    stored = load_file(tmp_path / "bert" / "model.safetensors")
    (weight,) = [tensor for name, tensor in stored.items() if name.endswith("layer.0.attention.self.query.weight")]
    assert torch.equal(module.connector["query"].weight, weight)
    report = module.load_report
    assert {name for name in report.new if name.startswith("connector")} == {
        f"connector.{layer}.{kind}" for layer in ("cross", "out") for kind in ("weight", "bias")
    }
    assert len(report.dropped) == len(stored) - 2  # everything but the query's weight and bias
    assert "dropped on purpose: connector." in report.render()
    assert report.sources == {f"base weights of connector ({folder})": 2}
    monkeypatch.setattr(BertQueries, "rest", "nothing")
    with pytest.raises(UserError, match=r"connector\.cross\.bias.*: in the network but not in the checkpoint"):
        llava_1_5(connector=BertQueries(folder)).configure_model()


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM], ids=["without a head", "with a head"])
@pytest.mark.parametrize("description", [QFormer(text=True, head=True, **BERT), Med(**BERT)], ids=["q_former", "med"])
def test_bert_becomes_a_q_former_or_a_med(description: Any, kind: type, tmp_path: Path) -> None:
    """BERT's layers come into every role they have; cross-attention and queries start new, one mark is added."""
    folder = _bert(tmp_path / "bert", kind)
    stored = {name.removeprefix("bert."): t for name, t in load_file(tmp_path / "bert" / "model.safetensors").items()}
    with empty_weights():
        network = description.build(16)
    module = nn.ModuleDict({"part": network})
    allocate(module, torch.device("cpu"))
    source = base_source("part", dataclasses.replace(description, weights=folder), network)
    draws = initialisers({"part": network}, {"part": description})
    report, _ = load_or_init(module, [source], seed=0, initialisers=draws)
    theirs = stored["encoder.layer.1.intermediate.dense.weight"]
    layer = network.layers[1]
    for mlp in (layer.mlp, layer.query_mlp) if isinstance(description, QFormer) else (layer.mlp,):
        assert torch.equal(mlp.fc1.weight, theirs)
    query = stored["encoder.layer.0.attention.self.query.weight"]
    attentions = [network.layers[0].attention]
    attentions += [] if isinstance(description, QFormer) else [network.layers[0].decoder_attention]
    assert all(torch.equal(attention.query.weight, query) for attention in attentions)
    words = network.embeddings.words.weight
    assert torch.equal(words[:50], stored["embeddings.word_embeddings.weight"])
    assert report.resized["part.embeddings.words.weight"][:2] == ((50, 32), (51, 32))
    fresh = {name.split(".", 1)[1] for name in report.new}
    has_head = kind is BertForMaskedLM
    begun = ("queries", "feature_norm.", "head.")
    assert all("cross_attention" in name or name.startswith(begun) for name in fresh)
    assert has_head != any(name.startswith("head.dense") for name in fresh)
    assert any("pooler" in name for name in report.dropped) != has_head
    assert not {name for name in report.new if not any(matches(p, name) for p in source.fresh)}


# -- tables of positions


def _tower(image_size: int, weights: str | None = None, **changes: Any) -> TimmTower:
    options = {**TOWER, "img_size": image_size, **changes}
    return TimmTower("vit_large_patch14_clip_quickgelu_336", layer=-2, weights=weights, options=options)


def test_a_tower_comes_out_of_a_folder_of_blip_2(tmp_path: Path) -> None:
    """The published tower has the blocks that are computed and a zero bias of keys; what lies behind it stays there."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
    reader = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = Blip2Config(
        vision_config=size | {"num_hidden_layers": 2},
        qformer_config=reader | {"encoder_hidden_size": 32},
        text_config=OPT,
        num_query_tokens=4,
    )
    theirs = Blip2ForConditionalGeneration(config).eval()
    for name, parameter in theirs.vision_model.named_parameters():
        nn.init.normal_(parameter, std=0.2)
        if name.endswith("qkv.bias"):
            parameter.data[32:64] = 0
    theirs.save_pretrained(tmp_path / "blip2")
    tower = TimmTower(
        "eva_giant_patch14_clip_224", layer=-2, class_token=True, options=EVA, weights=str(tmp_path / "blip2")
    )
    module = xcomposer(vision=tower)
    module.configure_model()
    module.eval()
    pixels = torch.randn(2, 3, 28, 28)
    theirs.vision_model.post_layernorm = nn.Identity()  # the norm behind the tower is the Q-Former's
    with torch.no_grad():
        expected = theirs.vision_model(pixels).last_hidden_state
        ours = module.vision(pixels)
    # 0 measured on features up to 8.9; another order of sums is allowed
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
    other = xcomposer(vision=dataclasses.replace(tower, options=EVA | {"num_heads": 2}))
    with pytest.raises(UserError, match=r"config\.json: vision_config.num_attention_heads .* is 4, and only 2 is"):
        other.configure_model()


def test_positions_are_stretched_by_the_published_rule() -> None:
    tensors = golden("blip_pos_embed_interp__a")
    table, expected = tensors["inputs/pos_embed"], tensors["outputs/pos_embed"]
    tower = _tower(7 * 7, embed_dim=12, num_heads=2).build()
    assert tower.trunk.pos_embed.shape == expected.shape
    stretched, method = tower.adopt("trunk.pos_embed", table)
    assert method == "bicubic"
    assert torch.equal(stretched[:, 0], table[:, 0])
    # float64 here and float32 there: 1.7e-6 seen
    torch.testing.assert_close(stretched, expected, atol=5e-6, rtol=0)
    assert tower.adopt("trunk.pos_embed", expected) is None
    assert tower.adopt("trunk.cls_token", table) is None


def test_a_tower_of_another_resolution(tmp_path: Path) -> None:
    """From base weights, frozen, and from a stage that trained it; whoever loads the artefact stretches them alike."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=7, **sizes)).save_pretrained(tmp_path / "clip")
    small = llava_1_5(vision=_tower(28, str(tmp_path / "clip")))
    small.stage = Stage("small", {"vision": RATE, "connector": RATE})
    small.configure_model()
    assert small.load_report.resized == {}
    disturb(small, small.trained_names())
    write_stage(tmp_path / "small", small, global_step=1)

    large = llava_1_5(vision=_tower(42, str(tmp_path / "clip")))
    large.stage = Stage("large", {"connector": RATE})
    large.configure_model()
    name = "vision.trunk.pos_embed"
    assert large.load_report.resized == {name: ((1, 17, 32), (1, 37, 32), "bicubic")}
    assert f"resized: {name} 1x17x32 -> 1x37x32, bicubic" in large.load_report.render()
    write_stage(tmp_path / "large", large, global_step=1)
    assert torch.equal(vlm.load(tmp_path / "large").vision.trunk.pos_embed, large.vision.trunk.pos_embed)

    later = llava_1_5(vision=_tower(42, str(tmp_path / "clip")))
    later.stage = Stage("later", {"connector": RATE}, follows=[InitFrom(str(tmp_path / "small"))])
    later.configure_model()
    stretched, _ = later.vision.adopt("trunk.pos_embed", small.vision.trunk.pos_embed.detach())
    assert torch.equal(later.vision.trunk.pos_embed, stretched)


class Quantised(nn.Linear):
    """Keeps whole numbers and one scale, where its ancestor made them from what a file has."""

    def __init__(self) -> None:
        super().__init__(4, 3, bias=False)
        self.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
        self.scale = 0.0


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"layer": Quantised(), "plain": nn.Linear(4, 3, bias=False)})

    def adopt(self, name: str, value: Tensor) -> tuple[Tensor, str] | None:
        if name != "inner.layer.weight":
            return None
        self.inner["layer"].scale = value.abs().max().item() / 127
        return (value / self.inner["layer"].scale).round().to(torch.int8), "int8"


def test_the_nearest_ancestor_adopts_a_tensor() -> None:
    module = nn.ModuleDict({"part": Holder()})
    values = {f"part.inner.{name}.weight": torch.randn(3, 4) for name in ("layer", "plain")}
    source = WeightSource("file", frozenset(values), lambda: iter(values.items()))
    report, hashes = load_or_init(module, [source], seed=0, initialisers={})
    layer = module["part"].inner["layer"]
    assert report.loaded == ["part.inner.plain.weight"]
    assert report.resized == {"part.inner.layer.weight": ((3, 4), (3, 4), "int8")}
    assert set(hashes) == {"part.inner.layer.weight"}
    error = (layer.weight * layer.scale - values["part.inner.layer.weight"]).abs().max().item()
    assert 0 < error <= layer.scale / 2 * 1.001


# -- what follows


def _follow(folder: Path, language: CausalLM, **options: Any) -> VisionLanguageModule:
    module = llava_1_5(language=language)
    follow = InitFrom(str(folder), {"connector": "connector", "language": "language"}, **options)
    module.stage = Stage("next", {"connector": RATE, "language": RATE}, follows=[follow])
    module.configure_model()
    return module


def test_a_followed_part_comes_whole_but_for_what_is_listed(tmp_path: Path) -> None:
    language = CausalLM(config=LLAMA)
    first = llava_1_5(language=language)
    first.stage = Stage("first", {"connector": RATE, "language": RATE})
    first.configure_model()
    disturb(first, first.trained_names())
    write_stage(tmp_path / "1", first, global_step=1)

    deeper = CausalLM(config=LLAMA | {"num_hidden_layers": 3})
    with pytest.raises(UserError, match=r"artefact first .*language\.model\.layers\.2.*: in the network but"):
        _follow(tmp_path / "1", deeper)
    grown = _follow(tmp_path / "1", deeper, fresh=["language.model.layers.2"])
    assert {name for name in grown.load_report.new if name.startswith("language")} == {
        name for name, _ in grown.named_parameters() if name.startswith("language.model.layers.2.")
    }
    with pytest.raises(UserError, match=r"fresh 'language\.model\.layers\.3' fits nothing that starts new"):
        _follow(tmp_path / "1", deeper, fresh=["language.model.layers.2", "language.model.layers.3"])
    with pytest.raises(UserError, match="no place in the network"):
        _follow(tmp_path / "1", CausalLM(config=LLAMA | {"num_hidden_layers": 1}))

    shallow = CausalLM(config=LLAMA | {"num_hidden_layers": 1})
    left = _follow(
        tmp_path / "1",
        shallow,
        leave_out=["language.model.layers.1", "language.model.norm*"],
        fresh=["language.model.norm"],
    )
    assert all(".layers.1." in name or name.endswith("model.norm.weight") for name in left.load_report.dropped)
    assert len(left.load_report.dropped) == 10
    assert left.language.model.norm.weight.eq(1).all()
    assert torch.equal(left.language.lm_head.weight, first.language.lm_head.weight)
    with pytest.raises(UserError, match=r"holds nothing that leave_out 'language\.text' fits"):
        _follow(tmp_path / "1", language, leave_out=["language.text"])
    # a stage after that drops the same, and loads no more than there was
    left.requires_grad_(False)
    left.connector.requires_grad_(True)
    with torch.no_grad():
        left.language.model.norm.weight += 1
    write_stage(tmp_path / "2", left, global_step=1)
    third = llava_1_5(language=shallow)
    third.stage = Stage("third", {"connector": RATE}, follows=[InitFrom(str(tmp_path / "2"))])
    third.configure_model()
    assert third.load_report.dropped == left.load_report.dropped
    assert third.language.model.norm.weight.eq(1).all()


def test_base_weights_that_lack_something_are_refused(tmp_path: Path) -> None:
    module = llava_1_5()
    module.configure_model()
    module.language.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        tensors = {name: tensor for name, tensor in load_file(file).items() if name != "model.norm.weight"}
        save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, file)
    with pytest.raises(UserError, match=r"base weights of language .*model\.norm\.weight: in the network but not"):
        llava_1_5(language=CausalLM(path=str(tmp_path))).configure_model()
