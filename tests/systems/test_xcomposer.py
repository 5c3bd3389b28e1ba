"""InternLM-XComposer against the official numbers (`xcomposer1_model__a`), its released files and its adapter."""

import json
import math
from pathlib import Path
from typing import Any

import vlm  # first: repairs torchvision
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from callbacks.stage_transition import write_stage
from tests.conftest import GOLDEN, golden, golden_json
from tests.support.parity import assert_same_scores, assert_same_state
from tests.support.samples import samples
from tests.support.systems import names
from tests.support.xcomposer import LORA, xcomposer
from vlm.batch import IGNORE, Row, TokenSequence, next_token_targets
from vlm.building.network import empty_weights
from vlm.checkpoints.published.family import get_family
from vlm.commands.convert import convert
from vlm.connectors import QFormer
from vlm.errors import UserError
from vlm.functional import splice, token_loss
from vlm.language import CausalLM, PeftAdapter
from vlm.language.causal_lm import label_logits
from vlm.stages import InitFrom, Stage, Trained
from vlm.systems import XComposer
from vlm.vision import TimmTower

CASE = "xcomposer1_model__a"
ADAPTER = names(
    "language.model.layers.{0,1}.self_attn.{q,v}_proj.lora_{A,B}.default.weight",
    "language.model.layers.{0,1}.mlp.{up,down}_proj.lora_{A,B}.default.weight",
)
ROWS = 32002
STATED = {
    "_name_or_path": "chat",
    "architectures": ["InternLMXComposerForCausalLM"],
    "bias": True,
    "device": "cuda",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "intern_converted_llm": True,
    "internlm_lora": {
        "freeze": False, "learn_param": ["q", "v", "ffn"], "lora_alpha": 256, "lora_dropout": 0.05, "lora_r": 256,
    },
    "kqvo_bias": True,
    "max_position_embeddings": 2048,
    "model_type": "InternLMXComposer",
    "num_quant": 32,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip
"""Of the released `config.json`, without its sizes."""


def published_folder(folder: Path, *, mixed: bool = False, added: bool = False) -> Path:
    """The golden weights in the released form, under a vocabulary that a tokenizer fits in.

    Args:
        mixed: the language model and the linear layers of the tower in half precision, as released.
        added: with the two tokens of the -vl release.
    """
    size = golden_json(CASE)["config"]
    folder.mkdir()
    weights = {name.removeprefix("weights/"): t for name, t in golden(CASE).items() if name.startswith("weights/")}
    rows = ROWS + 2 * added
    for name in ("internlm_model.model.embed_tokens.weight", "internlm_model.lm_head.weight"):
        weights[name] = 0.02 * torch.randn(rows, size["hidden"])
    weights["flag_image_end"] = torch.full((1, 1, size["hidden"]), 0.25)  # zero as released, but they are read
    for name in [name for name in weights if mixed and "lora" not in name]:
        linear = name.startswith("visual_encoder.blocks") and weights[name].ndim == 2
        if linear or name.startswith("internlm_model"):
            weights[name] = weights[name].half()
    weights["internlm_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    weights["internlm_model.model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    weights["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    lora = STATED["internlm_lora"] | {"lora_r": size["r"], "lora_alpha": size["alpha"]}  # type: ignore[operator]
    content = STATED | {
        "internlm_lora": lora,
        "lora_cfg": lora,
        "hidden_size": size["hidden"],
        "intermediate_size": size["mlp"],
        "num_attention_heads": size["heads"],
        "num_hidden_layers": size["layers"],
        "num_query_token": size["nq"],
        "vocab_size": rows,
        "vision": {
            "img_size": size["img"], "patch_size": size["patch"], "embed_dim": size["vw"], "depth": size["vdepth"] + 1,
            "num_heads": size["vheads"], "mlp_ratio": size["vmlp_ratio"],
        },
        "perceive_sampler": {
            "dim": size["qh"], "num_layers": size["ql"], "num_heads": size["qheads"], "mlp_dim": size["qi"],
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content))
    model = GOLDEN / "_shared" / "llama_sp_tokenizer.model"
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    if added:
        (folder / "added_tokens.json").write_text('{"<ITG_TOKEN>": 32002, "<SOI_TOKEN>": 32003}')
    return folder


@torch.no_grad()
def test_the_whole_model_equals_the_official_numbers(tmp_path: Path) -> None:
    """Each stage of it: 3e-6 seen. The official rows are padded, ours lie one after another."""
    tensors, size = golden(CASE), golden_json(CASE)["config"]
    opened = published_folder(tmp_path / "official")
    module = vlm.load(opened)
    theirs = load_file(opened / "model.safetensors")
    near = {"atol": 2e-5, "rtol": 0.0}
    features = module.vision(tensors["inputs/image"])
    torch.testing.assert_close(features, tensors["outputs/vit"], **near)
    torch.testing.assert_close(module.qformer.feature_norm(features), tensors["outputs/ln_vision"], **near)
    queries = module.qformer.embeddings(queries=module.qformer.queries)
    torch.testing.assert_close(queries.expand(2, -1, -1), tensors["outputs/qformer_embedding"], **near)
    found = module.qformer(features)
    torch.testing.assert_close(found, tensors["outputs/qformer"], **near)
    assert torch.equal(module.connector.end, theirs["flag_image_end"])
    module.connector.end.zero_()
    image = module.connector(found)
    torch.testing.assert_close(image, tensors["outputs/image_tokens"], **near)
    assert image.shape[1] == size["nq"] + 2 == module.codec.num_tokens(640, 480)

    language: Any = module.language
    for part in (language.get_input_embeddings(), language.get_output_embeddings()):
        name = "lm_head" if part is language.lm_head else "model.embed_tokens"
        part.weight = torch.nn.Parameter(tensors[f"weights/internlm_model.{name}.weight"])
    prefix, text = tensors["inputs/prefix_ids"], tensors["inputs/text_ids"]
    sequences, wanted = [], []
    for row, mask in enumerate(tensors["inputs/attention_mask"].bool()):
        ids = torch.cat([prefix[row], torch.zeros(image.shape[1], dtype=torch.int64), text[row]])[mask]
        slots = len(prefix[row]) + torch.arange(image.shape[1])
        labels = tensors["inputs/labels"][row][mask]
        sequences.append(TokenSequence(ids, next_token_targets(labels), slots={"image": slots}))
        wanted.append(tensors["outputs/logits"][row][mask])
    packed = Row.pack(sequences, ["image"])
    embeds = splice(language.get_input_embeddings()(packed.ids), image.flatten(0, 1), packed.slots["image"])
    logits = label_logits(language, embeds, packed)
    assert len(logits) == int((tensors["inputs/labels"][:, 1:] != IGNORE).sum())
    torch.testing.assert_close(logits, torch.cat(wanted)[packed.label_positions], atol=3e-5, rtol=0)
    loss = token_loss(logits, packed.targets, packed.weights) / len(packed.targets)
    torch.testing.assert_close(loss, tensors["outputs/loss"], atol=1e-5, rtol=0)

    ids = tensors["inputs/only_text_ids"][0]
    row = Row.pack([TokenSequence(ids, ids, slots={"image": torch.zeros(0, dtype=torch.int64)})], ["image"])
    logits = label_logits(language, language.get_input_embeddings()(ids), row)  # the adapter acts here as well
    torch.testing.assert_close(logits, tensors["outputs/only_text_logits"][0], atol=3e-5, rtol=0)


@pytest.mark.parametrize("added", [False, True], ids=["7b", "vl_7b"])
def test_published_files_come_back_bit_equal(tmp_path: Path, added: bool) -> None:
    source = published_folder(tmp_path / "official", mixed=True, added=added)
    convert(source, tmp_path / "ours", system="xcomposer", target_layout="ours")
    convert(tmp_path / "ours", tmp_path / "back", system="xcomposer", target_layout="official")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() - after.keys() == {name for name in before if "inv_freq" in name}
    assert [n for n in after if before[n].dtype != after[n].dtype or not torch.equal(before[n], after[n])] == []
    assert {tensor.dtype for tensor in after.values()} == {torch.float16, torch.float32, torch.int64}
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())
    module = vlm.load(tmp_path / "back")
    assert module.codec.template.name == ("xcomposer_vl" if added else "xcomposer")
    assert module.codec.tokenizer.token_id("<TOKENS_UNUSED_1>") == 32001


def test_pytorch_files_open_too(tmp_path: Path) -> None:
    source = published_folder(tmp_path / "official")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    half = len(tensors) // 2
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    where = {name: names[at >= half] for at, name in enumerate(tensors)}
    for file in names:
        torch.save({name: t for name, t in tensors.items() if where[name] == file}, source / file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    module = vlm.load(source)
    assert torch.equal(module.connector.weight, tensors["internlm_proj.weight"])


def test_a_stage_goes_on_with_the_adapter_and_back(tmp_path: Path) -> None:
    """The released adapter is trained on, never a second one beside it, and written back unmerged."""
    source = published_folder(tmp_path / "official")
    convert(source, tmp_path / "ours", system="xcomposer", target_layout="ours")
    module = vlm.load(source)
    pool = samples(tmp_path, 3)

    def stage(rank: int | None) -> XComposer:
        made = XComposer(**module.arguments)
        if rank is not None:
            made.register_surgery(PeftAdapter(rank=rank, alpha=rank, dropout=0.05, **LORA))
        train = {"adapters": Trained(1.0), "qformer": Trained(1.0), "connector": Trained(1.0)}
        made.stage = Stage("3_instruct", train, follows=[InitFrom(str(tmp_path / "ours"))])
        return made

    with pytest.raises(UserError, match=r"changed twice by PeftAdapter.*rank: 4 and 2"):
        stage(2).configure_model()
    trained = stage(4)  # the same settings: the callback of the stage names what is there already
    trained.configure_model()
    assert_same_scores(trained.eval().score(pool), module.score(pool))
    changed = trained.trained_names()
    assert {name for name in changed if name.startswith("language.")} == ADAPTER
    sampler = {"feature_norm", "queries", "embeddings", "layers"}
    assert {name.split(".")[1] for name in changed if name.startswith("qformer.")} == sampler
    assert {name for name in changed if name.startswith(("vision", "connector"))} == names("connector.{weight,bias}")
    for name in changed:
        trained.get_parameter(name).data += 0.05 * torch.randn_like(trained.get_parameter(name))
    write_stage(tmp_path / "run/artefact", trained, global_step=1)
    convert(tmp_path / "run/artefact", tmp_path / "back", system="xcomposer", target_layout="official")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    different = {name for name in after if not torch.equal(before[name], after[name])}
    kinds = ("lora_", "Qformer.", "ln_vision", "query_tokens", "internlm_proj")
    assert different
    assert [name for name in different if not any(kind in name for kind in kinds)] == []
    again = vlm.load(tmp_path / "back")
    assert_same_state(trained, again)
    assert_same_scores(trained.eval().score(pool), again.score(pool))


def test_a_new_adapter_changes_nothing_at_first(tmp_path: Path) -> None:
    plain, adapted = xcomposer(), xcomposer()
    adapted.register_surgery(PeftAdapter(rank=2, alpha=2.0, **LORA))
    pool = samples(tmp_path, 2)
    for module in (plain, adapted):
        module.configure_model()
        module.eval()
    assert any("lora_A" in name for name, _ in adapted.named_parameters())
    assert_same_scores(adapted.score(pool), plain.score(pool))


def paper_shapes(rows: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released checkpoint, written out from section 2.6 of its facts."""
    vision, model = "visual_encoder.", "internlm_model.model."
    theirs: dict[str, tuple[int, ...]] = {
        vision + "cls_token": (1, 1, 1408),
        vision + "pos_embed": (1, 257, 1408),
        vision + "patch_embed.proj.weight": (1408, 3, 14, 14),
        vision + "patch_embed.proj.bias": (1408,),
        "query_tokens": (1, 64, 768),
        "flag_image_start": (1, 1, 4096),
        "flag_image_end": (1, 1, 4096),
        "internlm_proj.weight": (4096, 768),
        "internlm_proj.bias": (4096,),
        model + "embed_tokens.weight": (rows, 4096),
        model + "norm.weight": (4096,),
        "internlm_model.lm_head.weight": (rows, 4096),
    }
    for i in range(39):
        block = f"{vision}blocks.{i}."
        linears = {"attn.proj": (1408, 1408), "mlp.fc1": (6144, 1408), "mlp.fc2": (1408, 6144)}
        for name, shape in linears.items():
            theirs |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        theirs |= {f"{block}norm{n}.{kind}": (1408,) for n in (1, 2) for kind in ("weight", "bias")}
        theirs |= {f"{block}attn.{name}_bias": (1408,) for name in "qv"}
        theirs[f"{block}attn.qkv.weight"] = (4224, 1408)
    for i in range(12):
        layer = f"Qformer.bert.encoder.layer.{i}."
        found = {"attention.self.query": 768, "attention.self.key": 768, "attention.self.value": 768}
        found |= {"attention.output.dense": 768}
        if i % 2 == 0:
            cross = {"self.query": 768, "self.key": 1408, "self.value": 1408, "output.dense": 768}
            found |= {f"crossattention.{name}": width for name, width in cross.items()}
        for name, width in found.items():
            theirs |= {f"{layer}{name}.weight": (768, width), f"{layer}{name}.bias": (768,)}
        norms = ["attention.output", *(["crossattention.output"] if i % 2 == 0 else []), "output_query"]
        theirs |= {f"{layer}{name}.LayerNorm.{kind}": (768,) for name in norms for kind in ("weight", "bias")}
        for name, shape in {"intermediate_query": (3072, 768), "output_query": (768, 3072)}.items():
            theirs |= {f"{layer}{name}.dense.weight": shape, f"{layer}{name}.dense.bias": shape[:1]}
    for name, width in {"ln_vision": 1408, "Qformer.bert.embeddings.LayerNorm": 768}.items():
        theirs |= {f"{name}.{kind}": (width,) for kind in ("weight", "bias")}
    for i in range(32):
        layer = f"{model}layers.{i}."
        theirs |= {f"{layer}self_attn.{name}_proj.weight": (4096, 4096) for name in "qkvo"}
        theirs |= {f"{layer}self_attn.{name}_proj.bias": (4096,) for name in "qkvo"}
        theirs |= {f"{layer}{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
        for name, (out, into) in {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}.items():
            theirs[f"{layer}mlp.{name}_proj.weight"] = (out, into)
        adapted = {"self_attn.q": (4096, 4096), "self_attn.v": (4096, 4096)}
        adapted |= {"mlp.up": (11008, 4096), "mlp.down": (4096, 11008)}
        for name, (out, into) in adapted.items():
            theirs |= {
                f"{layer}{name}_proj.lora_A.weight": (256, into),
                f"{layer}{name}_proj.lora_B.weight": (out, 256),
            }
    return theirs


@pytest.mark.parametrize(("rows", "count"), [(103168, 8_797_872_000), (103170, 8_797_888_384)])
def test_paper_size_has_the_published_tensors(tmp_path: Path, rows: int, count: int) -> None:
    """As the folder's own `config.json` describes the network."""
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "_shared" / "llama_sp_tokenizer.model").read_bytes())
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}
    config = STATED | sizes | {"num_query_token": 64, "vocab_size": rows}
    family = get_family("xcomposer")
    arguments = family.describe_folder(config, tmp_path)["init_args"]  # type: ignore[attr-defined]
    module = xcomposer(
        vision=TimmTower(**arguments["vision"]["init_args"]),
        qformer=QFormer(**arguments["qformer"]["init_args"]),
        language=CausalLM(**arguments["language"]["init_args"]),
    )
    assert module.codec.num_tokens(640, 480) == 66
    with empty_weights():
        for name, part in module.build_parts().items():
            module.add_module(name, part)
        [lora] = family.surgery_of(config)  # type: ignore[attr-defined]
        PeftAdapter(**lora["init_args"]).apply(module)
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs = paper_shapes(rows)
    table = family.table("official", config)  # type: ignore[attr-defined]
    assert table.check(theirs, side="theirs") == ours
    assert table.check(ours, side="ours") == theirs
    assert sum(math.prod(shape) for shape in ours.values()) == count
    assert sum(math.prod(shape) for name, shape in theirs.items() if "lora" in name) == 381_681_664
    flags: dict[str, Tensor] = dict(module.named_buffers())
    assert flags["connector.start"].numel() + flags["connector.end"].numel() == 8_192


def test_files_that_say_something_else_are_refused(tmp_path: Path) -> None:
    source = published_folder(tmp_path / "official")
    content = json.loads((source / "config.json").read_text())
    for change, message in (
        ({"kqvo_bias": False}, "kqvo_bias is false"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is"),
        ({"internlm_lora": content["internlm_lora"] | {"learn_param": ["gate"]}}, "internlm_lora has 'gate'"),
    ):
        (source / "config.json").write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=message):
            vlm.load(source)
