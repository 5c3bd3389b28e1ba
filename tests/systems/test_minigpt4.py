"""MiniGPT-4: texts and labels token by token, what the layers see, the published file there and back."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import cli
from tests.conftest import GOLDEN
from tests.support.minigpt4 import LLAMA, QUERIES, TOKENIZER, minigpt4, minigpt4_llama_2
from tests.support.samples import picture
from vlm.batch import IGNORE
from vlm.building.network import empty_weights
from vlm.checkpoints.published.family import PublishedFolder, get_family
from vlm.checkpoints.tables.bert import qformer_rules
from vlm.checkpoints.tables.table import Table
from vlm.commands.convert import convert
from vlm.connectors import JoinedLinear, Linear, QFormer
from vlm.errors import UserError
from vlm.prompts import get_template
from vlm.prompts.template import IMAGE
from vlm.recipes import TrainingStage, find_recipe, load_recipe
from vlm.recipes.configs import stage_options
from vlm.sample import ImagePart, Message, Sample, TextPart
from vlm.systems import MiniGPT4
from vlm.vision import TimmTower

CASE = GOLDEN / "minigpt4_wrap__a"
NUM_TOKENS = 4


def rows(name: str) -> list[dict]:
    return json.loads((CASE / name).read_text())


def said(role: str, text: str, *, image: bool = False) -> Message:
    return Message(role, (*([ImagePart()] if image else []), *([TextPart(text)] if text else [])))


def widened(ids: list[int], *, row: int = 0) -> list[int]:
    """The published index map: token t of an image is -(1000 * (row + 1) + t)."""
    slots = [-(1000 * (row + 1) + at) for at in range(NUM_TOKENS)]
    return [token for one in ids for token in (slots if one == IMAGE else [one])]


@pytest.mark.parametrize("row", rows("train.json"), ids=lambda row: f"{row['name']} {row['code_version'][:5]}")
def test_training_rows_are_the_published_ones(row: dict) -> None:
    """But for padding, which is not there, and differs between HEAD and the first release."""
    name = "minigpt4" if row["prompts"] else "minigpt4_caption"
    template = dataclasses.replace(get_template(name), max_answer=row["max_txt_len"])
    asked = "".join(row["chosen_prompt"]).partition("</Img> ")[2].partition(" ###Assistant")[0]
    for at, answer in enumerate(row["answers"]):
        messages = [said("user", asked, image=True), said("assistant", answer)]
        ids, labels = template.tokenize(messages, TOKENIZER)
        length = sum(row["attention_mask"][at])
        assert widened(ids, row=at) == row["ids"][at][:length]
        trained = [token for token in row["labels"][at] if token != IGNORE]
        assert [token for token in labels if token != IGNORE] == trained
        assert labels[-len(trained) :] == trained


@pytest.mark.parametrize("row", rows("chat.json"), ids=lambda row: f"{row['conv']} {len(row['script'])}")
def test_chat_prompts_are_the_published_ones(row: dict) -> None:
    template = get_template("minigpt4" if row["conv"] == "vicuna0" else "minigpt4_llama_2")
    messages, image = [], False
    for kind, text in row["script"]:
        if kind == "image":
            image = True
            continue
        messages.append(said("user" if kind == "ask" else "assistant", text, image=image))
        image = False
    ids, _ = template.tokenize(messages, TOKENIZER, generate=True)
    assert widened(ids) == [-1000 - (-token - 1000) if token < -999 else token for token in row["ids"]]


def test_long_answers_are_cut_as_published_and_counted(tmp_path: Path) -> None:
    module = minigpt4(max_answer=6, template="minigpt4")
    file = picture(tmp_path, "a", (30, 40), 1)

    def encode(answer: str):
        messages = (said("user", "Describe it.", image=True), said("assistant", answer))
        return module.codec.encode(Sample(id="1", messages=messages, images=(file,)))

    whole, cut = encode("A bus."), encode("A red bus stands in a long street.")
    assert (whole.counts["lm"], whole.counts.get("cut_answers", 0)) == (4, 0)
    assert (cut.counts["lm"], cut.counts["cut_answers"]) == (6, 1)
    assert module.codec.encode(cut.sample, generate=True).text[0].ids.tolist()[0] == 1
    with pytest.raises(UserError, match="v1 is not MiniGPT-4's"):
        minigpt4(template="v1").codec  # noqa: B018


def test_stage_1_cleans_captions_as_published() -> None:
    template = get_template("minigpt4_caption")
    for case in rows("../caption_cleaning__a/captions.json"):
        cleaned = said("assistant", case["minigpt4_pre_caption_50"])
        if cleaned.content and case["text"].strip():
            asked = said("user", "", image=True)
            found = template.tokenize([asked, said("assistant", case["text"])], TOKENIZER)
            assert found == dataclasses.replace(template, max_words=None).tokenize([asked, cleaned], TOKENIZER)


def test_four_patches_are_a_token() -> None:
    torch.manual_seed(0)
    network = JoinedLinear().build(8, 5)
    features = torch.randn(2, 16, 8)
    joined = F.layer_norm(features, (8,)).reshape(2, 4, 32)
    torch.testing.assert_close(network(features), joined @ network.weight.T + network.bias)
    with pytest.raises(UserError, match="49 features of a view do not make tokens of 4"):
        JoinedLinear().num_tokens(49)


def test_published_counts_at_paper_size() -> None:
    tower = {"name": "eva_giant_patch14_clip_224", "layer": -2}
    small = {"language": minigpt4().arguments["language"], "tokenizer": TOKENIZER}
    for connector, qformer, token, trained in (
        (Linear(), QFormer(), True, 768 * 32 + 32),
        (JoinedLinear(), None, False, 5632 * 32 + 32),
    ):
        with empty_weights():
            module = MiniGPT4(
                vision=TimmTower(**tower, class_token=token), connector=connector, qformer=qformer, **small
            )
            parts = module.build_parts()
        assert sum(p.numel() for p in parts["connector"].parameters()) == trained
        assert module.codec.tower.num_tokens == (32 if token else 64)
        assert sum(p.numel() for p in parts["vision"].parameters()) == 985_894_528  # 39 blocks, no bias of keys


def published_qformer(folder: Path) -> dict[str, torch.Tensor]:
    """A Q-Former as LAVIS' stage 2 leaves it, with a projection for T5 beside it."""
    torch.manual_seed(1)
    network = QFormer(**QUERIES).build(32)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    table = Table("LAVIS", qformer_rules(ours="", text=False), sparse=("layers.{i}.cross_attention.{rest}",))
    theirs = table.from_ours(network.state_dict(), {})
    theirs |= {"t5_proj.weight": torch.zeros(3, 16), "t5_proj.bias": torch.zeros(3)}
    torch.save({"model": theirs}, folder / "blip2_pretrained_flant5xxl.pth")
    return network.state_dict()


def test_the_frozen_qformer_comes_from_blip_2(tmp_path: Path) -> None:
    wanted = published_qformer(tmp_path)
    description = QFormer(**QUERIES, weights=str(tmp_path / "blip2_pretrained_flant5xxl.pth"))
    module = minigpt4(qformer=description)
    module.configure_model()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in module.qformer.state_dict().items())


def test_published_file_there_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"llama_proj.weight": torch.randn(32, 768), "llama_proj.bias": torch.randn(32)}
    source = tmp_path / "prerained_minigpt4_7b.pth"
    torch.save({"model": tensors}, source)
    assert get_family("minigpt4").claims(PublishedFolder(str(source), frozenset(tensors)))
    with pytest.raises(UserError, match=r"the linear layer alone; say with --vision which folder has eva_vit_g.pth"):
        convert(source, tmp_path / "no", system="minigpt4", target_layout="ours")
    convert(source, tmp_path / "ours", system="minigpt4", target_layout="ours", vision="eva", base="vicuna")
    convert(tmp_path / "ours", tmp_path / "again", system="minigpt4", target_layout="official")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_both_variants_see_the_same_pictures_differently(tmp_path: Path) -> None:
    for make in (minigpt4, minigpt4_llama_2):
        module = make()
        module.configure_model()
        asked = [
            Sample(
                id=str(at),
                messages=(said("user", "What?", image=True), said("assistant", "A bus.")),
                images=(picture(tmp_path, str(at), (30, 40), at),),
            )
            for at in (1, 2)
        ]
        items = [module.codec.encode(sample) for sample in asked]
        batch = module.codec.collate(items, counts=items[0].counts)
        features = module.encode_images(batch)
        assert features.shape == (2, 4, LLAMA["hidden_size"])
        assert not torch.allclose(features[0], features[1])


@pytest.mark.parametrize("demo", [False, True])
def test_the_variant_of_llama_2_is_a_recipe(demo: bool) -> None:
    """It takes nothing from a Q-Former's training, and its second stage the connector of its first."""
    recipe = find_recipe("configs/minigpt4/llama_2")
    first, second = load_recipe(recipe).nodes
    assert isinstance(first, TrainingStage)
    assert isinstance(second, TrainingStage)
    assert first.follows == ()
    assert [dict(follow.parts) for follow in second.follows] == [{"connector": "connector"}]
    options = stage_options(argparse.Namespace(recipe=str(recipe), stage="2_finetune", demo=demo))
    arguments = cli._describe(options).module.arguments
    assert (arguments["qformer"], arguments["template"]) == (None, "minigpt4_llama_2")
    assert arguments["connector"] == JoinedLinear(num=7 if demo else 4)
