"""LLaVA: its first release's ids and labels, the linear connector against transformers, and what is its own."""

import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import vlm
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from callbacks import StageTransition
from tests.conftest import GOLDEN, golden_json
from tests.support.parity import assert_same_scores, assert_same_state, check_logits_loss_and_gradients
from tests.support.samples import samples
from tests.support.systems import LLAMA, RATE, TOKENIZER, build, llava
from tests.checkpoints.test_convert import clip_tensors, official_folder
from tests.systems.test_llava_1_5 import PARTS, hf_llava
from tests.support.training import ListSource, trainer
from vlm.building.network import empty_weights
from vlm.checkpoints.artefact import read_artefact
from vlm.commands.convert import convert
from vlm.checkpoints.tables.llava import OFFICIAL, llava_table
from vlm.checkpoints.files.weights import WeightFiles
from vlm.codec import step_counts
from vlm.connectors import Linear
from vlm.data import BatchSpec, InstructionData
from vlm.errors import UserError
from vlm.language import CausalLM, Decoding, NewTokens
from vlm.functional import token_loss
from vlm.prompts import IMAGE, LlamaTokenizer, get_template
from vlm.sample import ImagePart, Message, TextPart
from vlm.schedules import Schedule
from vlm.stages import InitFrom, Stage, Trained
from vlm.systems import LLaVA
from vlm.vision import TimmTower

LLAMA_MODEL = str(GOLDEN / "_shared" / "llama_sp_tokenizer.model")
MARKS = ("<im_patch>", "<im_start>", "<im_end>")
CASE = "llava_first_release__a"


def _tokenizer(*, marked: bool) -> LlamaTokenizer:
    return LlamaTokenizer(LLAMA_MODEL, pad_token="[PAD]", added_tokens=MARKS if marked else MARKS[:1])


def _message(role: str, text: str) -> Message:
    content: list[Any] = []
    for number, piece in enumerate(text.split("<image>")):
        content += [ImagePart()] if number else []
        content += [TextPart(piece)] if piece else []
    return Message({"human": "user", "gpt": "assistant"}[role], tuple(content))


def _widened(ids: list[int], *, patch: int, times: int) -> list[int]:
    return [token for i in ids for token in ([patch] * times if i == IMAGE else [i])]


def _template(row: dict[str, Any]) -> Any:
    return get_template("v0_first_marked" if row["im_start_end"] else "v0_first")


@pytest.mark.parametrize("row", golden_json(CASE, "training.json"), ids=lambda r: f"{r['name']}-{r['im_start_end']}")
def test_first_release_ids_and_labels(row: dict[str, Any]) -> None:
    messages = [_message(turn["from"], turn["value"]) for turn in row["conversation"]]
    tokenizer = _tokenizer(marked=row["im_start_end"])
    ids, labels = _template(row).tokenize(messages, tokenizer)
    assert _widened(ids, patch=row["im_patch_id"], times=row["image_tokens"]) == row["input_ids"]
    wide = [label for i, label in zip(ids, labels, strict=True) for label in [label] * (3 if i == IMAGE else 1)]
    assert wide == row["labels"]


@pytest.mark.parametrize(
    "row", golden_json(CASE, "inference.json"), ids=lambda r: f"{r['question']}-{r['im_start_end']}"
)
@pytest.mark.parametrize("front", [True, False])
def test_first_release_asks_with_the_picture_behind_the_question(row: dict[str, Any], front: bool) -> None:
    text = row["question"]
    if row["has_image"]:
        text = f"<image>\n{text}" if front else f"{text}\n<image>"
    tokenizer = _tokenizer(marked=row["im_start_end"])
    ids, _ = _template(row).tokenize([_message("human", text)], tokenizer, generate=True)
    assert _widened(ids, patch=tokenizer.token_id("<im_patch>"), times=3) == row["input_ids"]


# -- tokens that the base weights do not know

MARKED = LlamaTokenizer(LLAMA_MODEL, pad_token="[PAD]", added_tokens=MARKS)
ALIGN = {"connector": Trained(lr=1e-2), "language.model.embed_tokens.added": Trained(lr=1e-2)}


def _marked(train: dict[str, Trained], **changes: Any) -> LLaVA:
    module = llava(tokenizer=MARKED, template="v0_first_marked", **changes)
    module.stage = Stage("test", train)
    module.configure_model()
    return module


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_equal_a_resized_model(tied: bool, tmp_path: Path) -> None:
    """transformers' own Llama with 32,004 rows, the last four the mean of the others."""
    config = LLAMA | {"tie_word_embeddings": tied}
    module = _marked({part: Trained(lr=1.0) for part in PARTS}, language=CausalLM(config=config))
    assert module.language.config.vocab_size == 32004
    big = AutoModelForCausalLM.from_config(LlamaConfig(**config | {"vocab_size": 32004}))
    state = dict(module.language.state_dict())
    for table in ("model.embed_tokens", "lm_head"):
        old, new = state[f"{table}.weight"], state.pop(f"{table}.added.weight")
        assert old.shape == (32000, 32)
        assert torch.equal(new, old.mean(0).expand(4, -1))
        state[f"{table}.weight"] = torch.cat([old, new])
    big.load_state_dict(state)
    items = [module.codec.encode(sample) for sample in samples(tmp_path)]
    batch = module.codec.collate(items, counts=step_counts(items))
    assert {32002, 32003} <= set(batch.text.ids.tolist())
    ours = module.label_logits(batch)
    loss = token_loss(ours, batch.text.targets, batch.text.weights)
    loss.backward()
    features = module.image_features(batch).detach()
    embeds = big.get_input_embeddings()(batch.text.ids).index_copy(0, batch.text.slots["image"], features)
    theirs = torch.cat(
        [
            big(inputs_embeds=embeds[None, start:end], use_cache=False).logits[0]
            for start, end in itertools.pairwise(batch.text.cu_seqlens.tolist())
        ]
    )[batch.text.label_positions]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    token_loss(theirs, batch.text.targets, batch.text.weights).backward()
    for table in ("model.embed_tokens", "lm_head"):
        layer = module.language.get_submodule(table)
        found = torch.cat([layer.weight.grad, layer.added.weight.grad])
        torch.testing.assert_close(found, big.get_parameter(f"{table}.weight").grad, atol=2e-5, rtol=2e-4)


def test_stage_1_learns_the_connector_and_two_rows_alone(tmp_path: Path) -> None:
    module = _marked(ALIGN)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    transition = StageTransition("1_align", ALIGN, schedule=Schedule("constant"))
    run = trainer(tmp_path, max_epochs=3, callbacks=[transition])
    run.fit(module, InstructionData([ListSource(samples(tmp_path, 4))], batch=BatchSpec(4)))
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    added = "language.model.embed_tokens.added.weight"
    assert changed == {"connector.weight", "connector.bias", added}
    rows = (module.get_parameter(added) != before[added]).any(1)
    assert rows.tolist() == [False, False, True, True]  # [PAD] and <im_patch> are no input

    loaded = vlm.load(tmp_path / "artefact")
    assert loaded.surgery == [NewTokens()]
    pool = samples(tmp_path, 4)
    assert_same_state(loaded, module)
    assert_same_scores(loaded.score(pool), module.score(pool))
    assert loaded.generate(pool[:2], decoding=Decoding(max_new_tokens=3))
    # stage 2 takes both and starts the rows of the head as before
    later = llava(tokenizer=MARKED, template="v0_first_marked")
    parts = {"connector": "connector", "language.model.embed_tokens.added": "language.model.embed_tokens.added"}
    later.stage = Stage(
        "2_chat", {"connector": RATE, "language": RATE}, follows=[InitFrom(str(tmp_path / "artefact"), parts)]
    )
    later.configure_model()
    assert_same_state(later, module)
    assert_same_scores(later.score(pool), module.score(pool))


def test_base_weights_keep_their_shape(tmp_path: Path) -> None:
    plain = build("llava")
    plain.language.save_pretrained(tmp_path)
    module = _marked(ALIGN, language=CausalLM(path=str(tmp_path)), seed=5)
    table = module.language.get_input_embeddings()
    assert torch.equal(table.weight, plain.language.get_input_embeddings().weight)
    assert torch.equal(table.added.weight, table.weight.mean(0).expand(4, -1))

    wide = llava(tokenizer=MARKED, language=CausalLM(config=LLAMA | {"vocab_size": 32004}))
    wide.configure_model()
    assert type(wide.language.get_input_embeddings()) is torch.nn.Embedding


# -- parity


def reference_llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    reference = hf_llava("llama", {})
    reference.model.multi_modal_projector = nn.Linear(32, 32)
    return reference


def official_name(name: str) -> str:
    """The official name of a tensor that transformers has in memory."""
    for theirs, official in {
        "model.language_model.": OFFICIAL.language,
        "model.vision_tower.": OFFICIAL.vision,
        "model.multi_modal_projector.": OFFICIAL.connector,
    }.items():
        if name.startswith(theirs):
            return official + name.removeprefix(theirs)
    return name


def test_logits_loss_and_gradients_equal_transformers(tmp_path: Path) -> None:
    reference = reference_llava()
    table = llava_table(OFFICIAL, connector="linear", num_blocks=2, vocab_rows=32000)

    def to_ours(items: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        named = ((official_name(name), t[:32000] if len(t) == 32064 else t) for name, t in items)
        return table.to_ours(named)[0]

    published = reference.state_dict()
    check_logits_loss_and_gradients(llava(), reference, tmp_path, parts=PARTS, published=published, to_ours=to_ours)


CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
}
SIZES = {
    "7b": {},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}


@pytest.mark.parametrize(("size", "num_parameters"), [("7b", 7_045_793_792), ("13b", 13_324_292_096)])
def test_paper_size_has_the_published_tensors(size: str, num_parameters: int) -> None:
    """Names and shapes of the official files: LLaMA's own, a projector of one layer, and CLIP's tower."""
    config = {"model_type": "llama", "vocab_size": 32000, **SIZES[size]}
    module = LLaVA(
        vision=TimmTower("vit_large_patch14_clip_quickgelu_224", layer=-2),
        connector=Linear(),
        language=CausalLM(config=config),
        tokenizer=TOKENIZER,
        template="v0_first",
        image="crop",
    )
    with empty_weights():
        parts = module.build_parts()
    with torch.device("meta"):
        language = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"}))
        tower = CLIPVisionModel(CLIPVisionConfig(**CLIP_L))
    width = language.config.hidden_size
    published = {name: tuple(p.shape) for name, p in language.named_parameters()}
    published |= {"model.mm_projector.weight": (width, 1024), "model.mm_projector.bias": (width,)}
    published |= {  # older transformers have another level in between
        OFFICIAL.vision + name.removeprefix("vision_model."): tuple(p.shape) for name, p in tower.named_parameters()
    }
    assert sum(torch.Size(shape).numel() for shape in published.values()) == num_parameters
    ours = {f"{part}.{n}": tuple(p.shape) for part, network in parts.items() for n, p in network.named_parameters()}
    table = llava_table(OFFICIAL, connector="linear", num_blocks=23, vocab_rows=32000)
    derived = table.check(published, side="theirs")
    assert ours == {name: shape for name, shape in derived.items() if not table.is_carried(name)}
    assert module.codec.num_tokens(640, 480) == 256


# -- published files


def _delta(folder: Path, *, marked: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(differences, base) in `folder`/delta and `folder`/base; the base has four rows less."""
    delta = official_folder(folder / "delta", tower=False, connector="linear")
    base = {name: torch.randn_like(t) for name, t in delta.items() if "mm_projector" not in name}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = base[name][:-4].clone()
    (folder / "base").mkdir()
    torch.save(base, folder / "base" / "pytorch_model.bin")
    if marked:
        file = folder / "delta" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"mm_use_im_start_end": True}))
        ids = {"<im_end>": 99, "[PAD]": 96, "<im_start>": 98, "<im_patch>": 97}
        (folder / "delta" / "added_tokens.json").write_text(json.dumps(ids))
    return delta, base


@pytest.mark.parametrize("target", ["official", "ours"])
def test_a_delta_with_its_base_is_the_model(target: str, tmp_path: Path) -> None:
    delta, base = _delta(tmp_path, marked=True)
    convert(tmp_path / "delta", tmp_path / "out", system="llava", target_layout=target, base=tmp_path / "base")
    if target == "ours":
        arguments = read_artefact(tmp_path / "out").meta["model"]["init_args"]
        assert arguments["template"] == "v0_first_marked"
        assert arguments["tokenizer"]["init_args"] == {
            "path": ".",
            "pad_token": "[PAD]",
            "added_tokens": ["<im_patch>", "<im_start>", "<im_end>"],
        }
        convert(tmp_path / "out", tmp_path / "again", system="llava", target_layout="official")
    found = dict(WeightFiles(tmp_path / ("again" if target == "ours" else "out")).items())
    assert found.keys() == delta.keys()
    for name, tensor in delta.items():
        rows = len(base[name]) if name in base else 0
        expected = torch.cat([tensor[:rows] + base[name], tensor[rows:]]) if rows else tensor
        assert torch.equal(found[name], expected), name


def test_a_published_model_says_nothing_of_its_template(tmp_path: Path) -> None:
    """The later models with a linear projector speak `v1`, and their config is that of the earlier ones."""
    _delta(tmp_path, marked=False)
    arguments: dict[str, Any] = {"system": "llava", "base": tmp_path / "base"}
    for template, expected in {None: "v0", "v1": "v1"}.items():
        convert(tmp_path / "delta", tmp_path / expected, target_layout="ours", template=template, **arguments)
        assert read_artefact(tmp_path / expected).meta["model"]["init_args"]["template"] == expected
    for target, template, message in (("ours", "v9", "unknown template 'v9'"), ("official", "v1", "use --to ours")):
        with pytest.raises(UserError, match=message):
            convert(tmp_path / "delta", tmp_path / "out", target_layout=target, template=template, **arguments)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "missing; it names the marks around an image"),
        ({"[PAD]": 96}, "must name <im_start> and <im_end>"),
        ({"<im_start>": 96, "<im_end>": 98}, "without a gap"),
    ],
)
def test_marks_that_nobody_names_are_refused(ids: dict[str, int] | None, message: str, tmp_path: Path) -> None:
    _delta(tmp_path, marked=True)
    file = tmp_path / "delta" / "added_tokens.json"
    file.unlink() if ids is None else file.write_text(json.dumps(ids))
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "delta", tmp_path / "out", system="llava", target_layout="ours", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_a_published_model_of_the_first_release_answers(tmp_path: Path) -> None:
    """Its tables have the rows of the new tokens: nothing is added to them."""
    delta, _ = _delta(tmp_path, marked=False)
    wide = {n: torch.randn(32004, 24) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    tower = clip_tensors("model.vision_tower.vision_tower.vision_model.", lambda *shape: torch.randn(shape))
    tensors = {name: t.float() for name, t in delta.items()} | wide | tower
    folder = tmp_path / "published"
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    config = json.loads((tmp_path / "delta" / "config.json").read_text())
    config |= {"vocab_size": 32004, "mm_use_im_start_end": True, "max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(LLAMA_MODEL, folder / "tokenizer.model")
    (folder / "added_tokens.json").write_text(
        json.dumps({"[PAD]": 32000, "<im_patch>": 32001, "<im_start>": 32002, "<im_end>": 32003})
    )
    module = vlm.load(folder)
    assert type(module.language.lm_head) is nn.Linear
    sample = samples(tmp_path, 1)[0]
    item = module.codec.encode(sample, generate=True)
    ids, slots = item.text[0].ids.tolist(), item.text[0].slots["image"].tolist()
    assert (ids[slots[0] - 1], ids[slots[-1] + 1]) == (32002, 32003)
    convert(folder, tmp_path / "ours", system="llava", target_layout="ours")
    again = vlm.load(tmp_path / "ours")
    assert_same_state(again, module)
    assert_same_scores(again.score([sample]), module.score([sample]))
    assert again.generate([sample], decoding=Decoding(max_new_tokens=2))
