"""The first stage of BLIP-2 against the published code's numbers, on one process and on two."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import vlm  # first: repairs torchvision
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from transformers import Blip2ForImageTextRetrieval

from callbacks.stage_transition import write_stage
from tests.conftest import golden, golden_json
from tests.support.blip2 import EVA, READER, blip2
from tests.support.blip2_qformer import TEXT, blip2_qformer
from tests.support.blip_tasks import VOCABULARY
from tests.support.ranks import run_ranks
from tests.support.samples import pairs
from tests.support.training import ListSource, trainer, weights

from vlm.checkpoints.files.locate import CARRIED
from vlm.checkpoints.published.blip2 import BLIP2Family
from vlm.codec import step_counts
from vlm.commands.convert import convert
from vlm.data import BatchSpec, PretrainingData
from vlm.errors import SampleError, UserError
from vlm.evaluation.retrieval_table import similarities
from vlm.recipes.catalogue import find_recipe
from vlm.recipes.reading import load_recipe
from vlm.stages import AdamW, InitFrom, Stage, Trained
from vlm.batch import IGNORE, Batch, Row, SampleInfo, TokenSequence
from vlm.checkpoints.tables.blip2 import qformer_table
from vlm.connectors import QFormer
from vlm.prompts import BertTokenizer
from vlm.systems import BLIP2QFormer
from vlm.systems import pairs as pair_code
from vlm.systems.pairs import IMAGE_ID
from vlm.vision import TimmTower

TOWER = TimmTower(
    "eva_giant_patch14_clip_224",
    layer=-2,
    class_token=True,
    options={"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2},
)


def published(case: str, folder: Path) -> tuple[BLIP2QFormer, dict[str, Tensor]]:
    """A network with the official weights of a case; its tower is not part of it."""
    tensors, meta = golden(case), golden_json(case)
    config = meta["config"]
    words = [word for word in meta["bert_vocab"] if word not in ("[DEC]",)]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    tower = dict(TOWER.options) | {"embed_dim": config["encoder_width"]}
    module = BLIP2QFormer(
        vision=TimmTower(TOWER.name, layer=-2, class_token=True, options=tower),
        qformer=QFormer(
            dim=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            mlp_dim=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            num_queries=config["num_query_tokens"],
            text=True,
            head=True,
        ),
        tokenizer=BertTokenizer(str(folder), added_tokens=("[DEC]",)),
        dim=config["embed_dim"],
        same_image="image_id" in case,
        max_tokens=config["max_txt_len"],
    )
    module.configure_model()
    weights = {n.removeprefix("weights/"): t for n, t in tensors.items() if n.startswith("weights/")}
    ours, carried = qformer_table("official").to_ours(weights.items())
    missing = module.load_state_dict(ours, strict=False).missing_keys
    assert all(name.startswith("vision.") for name in missing)
    back = qformer_table("official").from_ours(
        {n: t for n, t in module.state_dict().items() if not n.startswith("vision.")}, carried
    )
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith("vision."))
    return module.eval(), tensors


def pack(inputs: dict[str, Tensor], *, rank: int = 0) -> Batch:
    sequences = []
    for owner, (row, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)):
        ids = row[mask]
        sequences.append(TokenSequence(ids, torch.cat([ids[1:], ids.new_full((1,), IGNORE)]), owner=owner))
    size = len(sequences)
    text = Row.pack(sequences)
    counts = {"itc": float(size), "itm": 3.0 * size, "lm": float((text.targets != IGNORE).sum())}
    ids = inputs.get("image_id", torch.arange(size) + rank * size).flatten()
    infos = tuple(SampleInfo(str(at), "golden") for at in range(size))
    return Batch(text, {}, {}, infos, counts, labels={IMAGE_ID: ids}, negatives="step", pack=rank)


def check(
    module: BLIP2QFormer, tensors: dict[str, Tensor], patch: pytest.MonkeyPatch, *, at: str = "", rank: int = 0
) -> dict[str, Tensor]:
    """Losses, similarities and what negatives are drawn by; gives the gradients of each loss under official names."""
    inputs = {n.removeprefix(f"inputs/{at}"): t for n, t in tensors.items() if n.startswith(f"inputs/{at}")}
    batch, drawn, compared = pack(inputs, rank=rank), [], []

    def recorded(weights: Tensor, chance: Tensor) -> Tensor:
        drawn.append(weights)
        return inputs["neg_text_for_image" if len(drawn) == 1 else "neg_image_for_text"]

    def compare(*arguments: Any) -> Any:
        compared.extend(BLIP2QFormer.compare(module, *arguments))
        return tuple(compared)

    patch.setattr(pair_code, "draw", recorded)
    patch.setattr(module, "encode_images", lambda batch: inputs["image_features"])
    patch.setattr(module, "compare", compare)
    losses = module.losses(batch)
    close = {"atol": 1e-5, "rtol": 1e-5}
    for name, similar, chances in zip(("i2t", "t2i"), compared, drawn, strict=True):
        # divided by the temperature: 1.1e-5 seen on scores of size 14
        torch.testing.assert_close(similar, tensors[f"outputs/{at}sim_{name}"], atol=3e-5, rtol=1e-5)
        torch.testing.assert_close(chances, tensors[f"outputs/{at}multinomial_weights_{name}"], **close)
    gradients: dict[str, Tensor] = {}
    for name in ("itc", "itm", "lm"):
        loss = losses[name] / batch.counts[name]
        torch.testing.assert_close(loss, tensors[f"outputs/{at}loss_{name}"], **close)
        module.zero_grad()
        loss.backward(retain_graph=True)
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
        named = {n: t for n, t in found.items() if not n.startswith("vision.")}
        theirs = qformer_table("official").from_ours(named, {})
        gradients |= {f"{name}/{key}": value for key, value in theirs.items()}
    matched = module.pair_logits(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["image_features"])
    torch.testing.assert_close(matched[:, 1], tensors[f"outputs/{at}compute_itm_eval"], **close)
    return gradients


def assert_gradients(found: dict[str, Tensor], tensors: dict[str, Tensor], prefix: str) -> None:
    expected = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    assert len(expected) == 26
    for name, gradient in expected.items():
        # one token is nearly constant, and its norm amplifies float32 noise in both codes: 3e-6 of the largest seen
        bound = 1e-6 + 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, atol=bound, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", ["blip2_stage1__a", "blip2_stage1_image_id__a"])
def test_a_step_is_the_published_one(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, tensors = published(case, tmp_path)
    assert_gradients(check(module, tensors, monkeypatch), tensors, "outputs/grad_")


def _two_ranks(folder: str) -> None:
    rank = distributed.get_rank()
    own = Path(folder) / str(rank)
    own.mkdir()
    module, tensors = published("blip2_stage1_world2__a", own)
    with pytest.MonkeyPatch.context() as patch:
        found = check(module, tensors, patch, at=f"rank{rank}/", rank=rank)
    # features of another rank are normalised where they are used, not where they come from: the sum over ranks is equal
    here = {name: value for name, value in found.items() if name.startswith("itm/ln_vision")}
    local = {name: value for name, value in found.items() if name not in here}
    prefix = f"outputs/rank{rank}/grad_"
    for name in (n.removeprefix(prefix) for n in tensors if n.startswith(prefix)):
        expected = tensors[prefix + name]
        if name in here:
            distributed.all_reduce(here[name])
            expected = expected + tensors[f"outputs/rank{1 - rank}/grad_{name}"]
        bound = 1e-6 + 1e-5 * expected.abs().max().item()
        torch.testing.assert_close((local | here)[name], expected, atol=bound, rtol=1e-4)


def test_two_ranks_are_the_published_ones(tmp_path: Path) -> None:
    """Without a gradient into what other ranks have in the contrast, and with one into the images of wrong pairs."""
    run_ranks(_two_ranks, 2, str(tmp_path))


# -- weights


def trained(folder: Path, **changes: Any) -> BLIP2QFormer:
    module = blip2_qformer(vision=TOWER, max_words=50, max_tokens=32, **changes)
    module.stage = Stage("x", {part: Trained(lr=1e-3) for part in ("qformer", "projections", "heads")})
    module.configure_model()
    with torch.no_grad():
        module.heads.temperature.fill_(0.05)
    write_stage(folder, module, global_step=1)
    return module.eval()


def test_files_of_trained_tensors_there_and_back(tmp_path: Path) -> None:
    module = trained(tmp_path / "x")
    convert(tmp_path / "x", tmp_path / "official", system="blip2", target_layout="official_stage_1")
    written = load_file(tmp_path / "official" / "model.safetensors")
    expected = {n.removeprefix("weights/") for n in golden("blip2_stage1__a") if n.startswith("weights/")}
    assert {n for n in written if ".layer." not in n} == {n for n in expected if ".layer." not in n} - {
        "Qformer.bert.embeddings.position_ids"
    }
    (tmp_path / "eva").mkdir()
    save_file(module.vision.trunk.state_dict(), tmp_path / "eva" / "model.safetensors")
    with pytest.raises(UserError, match=r"--vision where eva_vit_g.pth lies and with --base"):
        convert(tmp_path / "official", tmp_path / "y", system="blip2", target_layout="ours")
    family = BLIP2Family()
    opened = family.open(tmp_path / "official", vision=tmp_path / "eva", base=VOCABULARY)
    found = dict(opened.stream())
    own = {n: t for n, t in module.state_dict().items() if not n.startswith("vision.")}
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)
    assert opened.model["init_args"]["qformer"]["init_args"]["vocab_size"] == 104


def test_transformers_class_there_and_back(tmp_path: Path) -> None:
    """Bit-equal but for what it lacks, and the same numbers."""
    head = dataclasses.replace(blip2_qformer().arguments["qformer"], head=False)
    module = trained(tmp_path / "x", qformer=head)
    convert(tmp_path / "x", tmp_path / "hf", system="blip2", target_layout="hf_retrieval")
    kept = vlm.load(tmp_path / "hf").state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in module.state_dict().items())
    (tmp_path / "hf" / CARRIED).unlink()
    again = vlm.load(tmp_path / "hf")
    own = module.state_dict()
    assert again.state_dict().keys() == own.keys()
    differ = [n for n, tensor in again.state_dict().items() if not torch.equal(tensor, own[n])]
    assert differ == ["heads.temperature"]  # which the class does not have, and retrieval does not ask for
    assert again.heads.temperature.item() == pytest.approx(0.07)
    model, info = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    [sample] = pairs(tmp_path, 1)
    item = module.codec.encode(sample)
    batch = module.codec.collate([item], counts=step_counts([item]))
    pixels, ids = batch.views["image"].pixels, batch.text.ids[None]
    with torch.no_grad():  # at most 7e-6 apart was seen
        said = module.embeddings(batch)
        cosine = model.eval()(pixels, ids, use_image_text_matching_head=False).logits_per_image
        match = model(pixels, ids, attention_mask=torch.ones_like(ids), use_image_text_matching_head=True)
        torch.testing.assert_close(similarities(said.image, said.text), cosine, atol=2e-5, rtol=1e-5)
        matched = module.match_logits(said.image_state, said.text_state)
        torch.testing.assert_close(matched, match.logits_per_image, atol=2e-5, rtol=1e-5)


def test_a_stage_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"qformer.text: false"):
        blip2_qformer(qformer=QFormer(dim=16, num_layers=2, num_heads=4, mlp_dim=32))
    module = trained(tmp_path / "x")
    with pytest.raises(UserError, match=r"BLIP2QFormer has no place in the layout hf; use --to hf_retrieval or"):
        convert(tmp_path / "x", tmp_path / "hf", system="blip2", target_layout="hf")
    silent = dataclasses.replace(pairs(tmp_path, 1)[0], messages=pairs(tmp_path, 1)[0].messages[:1])
    with pytest.raises(SampleError, match="has no text to compare its image with"):
        module.codec.encode(silent)
    [asked, told] = pairs(tmp_path, 1)[0].messages
    weighted = dataclasses.replace(silent, messages=(asked, dataclasses.replace(told, weight=0.5)))
    with pytest.raises(SampleError, match=r"its text has weight 0\.5, but pairs are compared with each other"):
        module.codec.encode(weighted)


def test_the_second_stage_takes_the_side_of_the_queries(tmp_path: Path) -> None:
    """As the recipe hands it on: what reads and writes texts is left behind, and nothing of the Q-Former starts new."""
    first = blip2_qformer(vision=EVA)
    first.stage = Stage("1_qformer", {part: Trained(lr=1e-3) for part in ("qformer", "projections", "heads")})
    first.configure_model()
    write_stage(tmp_path / "1", first, global_step=1)
    [second] = [stage for stage in load_recipe(find_recipe("blip2")).nodes if stage.name == "2_opt"]
    [followed] = second.follows
    follow = InitFrom(str(tmp_path / "1"), followed.parts, leave_out=followed.leave_out)
    module = blip2(vision=EVA, qformer=QFormer(**READER | {"dim": TEXT["dim"]}))
    module.stage = Stage("2_opt", {part: Trained(lr=1e-3) for part in ("qformer", "connector")}, follows=[follow])
    module.configure_model()
    given = first.qformer.state_dict()
    taken = module.qformer.state_dict()
    assert all(torch.equal(taken[name], given[name]) for name in taken)
    assert not any(name.startswith("qformer") for name in module.load_report.new)
    left = {f"qformer.{name}" for name in given.keys() - taken.keys()}
    assert left == {name for name in module.load_report.dropped if name.startswith("qformer")}


# -- any devices


def _fit(folder: str, how: str | None) -> dict[str, Tensor]:
    """Three steps of eight pairs that are compared with each other, two of which show one image."""
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    pool = [dataclasses.replace(pair, group=str(at // 2)) for at, pair in enumerate(pairs(Path(folder), 8))]
    module = blip2_qformer(same_image=True)
    parts = ("vision", "qformer", "projections", "heads")
    module.stage = Stage("x", {part: Trained(lr=1e-2) for part in parts}, optimizer=AdamW(eps=1e-3))
    strategy = {"fsdp": "32-true"} if how == "fsdp" else {"strategy": how or "auto"}
    run = trainer(Path(folder), world=world, max_epochs=3, **strategy)
    run.fit(module, PretrainingData([ListSource(pool)], batch=BatchSpec(8, negatives="step")))
    return weights(module)


def _ranks(folder: str) -> list[dict[str, Tensor]]:
    return [_fit(folder, how) for how in ("ddp", "fsdp")]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_all_samples_of_a_step_are_compared_on_any_devices(world: int, tmp_path: Path) -> None:
    """Ranks with one pack each take the step that one process with the whole batch takes."""
    alone, start = _fit(str(tmp_path), None), blip2_qformer(same_image=True)
    start.configure_model()
    begun = start.state_dict()
    moved = max((alone[name] - begun[name]).abs().max().item() for name in alone)
    assert moved > 1e-2
    for rank in run_ranks(_ranks, world, str(tmp_path)):
        for found in rank:
            far = {name: (found[name] - tensor).abs().max().item() for name, tensor in alone.items()}
            assert max(far.values()) < 1e-5, max(far.items(), key=lambda pair: pair[1])
