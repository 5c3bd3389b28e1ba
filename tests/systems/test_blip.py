"""BLIP's pre-training and retrieval against the published code's numbers and rules, and transformers' class."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import vlm  # first: repairs torchvision
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed
from transformers import BlipConfig, BlipForImageTextRetrieval

import cli
from callbacks.stage_transition import write_stage
from tests.conftest import golden, golden_json
from tests.support.blip import blip
from tests.support.blip_tasks import TOKENIZER, blip_vqa
from tests.support.ranks import run_ranks
from tests.support.samples import pairs, picture
from vlm.batch import IGNORE, Batch, Row, SampleInfo, TokenSequence, Views
from vlm.building.build import assemble
from vlm.building.network import empty_weights
from vlm.checkpoints.files.locate import CARRIED
from vlm.checkpoints.published.family import get_family
from vlm.checkpoints.tables.blip import pair_table
from vlm.codec import step_counts
from vlm.commands.convert import convert
from vlm.errors import SampleError, UserError
from vlm.in_batch import draw_uniform
from vlm.language import Med
from vlm.prompts import BertTokenizer
from vlm.sample import Message, TextPart
from vlm.stages import Stage, Trained
from vlm.systems import BLIP
from vlm.systems import blip as code
from vlm.systems.blip_base import IMAGES
from vlm.systems import pairs as pair_code
from vlm.systems.pairs import IMAGE_ID, draw
from vlm.vision import TimmTower

ROOT = Path(__file__).parents[2]
CASE = "blip_pretrain_step__a"
TERMS = {"itc": "ita", "itm": "itm", "lm": "lm"}


def to_ours(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    table = pair_table("official", writes=True, same_image=False)
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return table.to_ours(found.items())[0]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[BLIP, Batch, dict[str, Tensor]]:
    """The published network and its four pairs."""
    tensors, meta = golden(CASE), golden_json(CASE)
    config, med, vit = meta["config"], meta["config"]["med"], meta["config"]["vit"]
    folder = tmp_path_factory.mktemp("bert")
    words = [word for word in meta["bert_vocab"] if word not in ("[DEC]", "[ENC]")]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    options = {"img_size": vit["img"], "patch_size": vit["patch"], "embed_dim": vit["vit_width"]}
    options |= {"depth": vit["vit_depth"], "num_heads": vit["vit_heads"]}
    module = BLIP(
        vision=TimmTower("vit_base_patch16_224", class_token=True, final_norm=True, options=options),
        language=Med(
            dim=med["hidden_size"],
            num_layers=med["num_hidden_layers"],
            num_heads=med["num_attention_heads"],
            mlp_dim=med["intermediate_size"],
            vocab_size=med["vocab_size"],
            max_positions=med["max_position_embeddings"],
        ),
        tokenizer=BertTokenizer(str(folder)),
        dim=config["embed_dim"],
        queue=config["queue_size"],
        momentum=config["momentum"],
        alpha=config["alpha"],
        max_tokens=config["max_text_tokens"],
    )
    module.configure_model()
    module.load_state_dict(to_ours(tensors, "weights/"), strict=False)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    sequences = []
    for owner, (row, mask) in enumerate(
        zip(tensors["inputs/input_ids"], tensors["inputs/attention_mask"].bool(), strict=True)
    ):
        ids = row[mask]
        sequences.append(TokenSequence(ids, torch.cat([ids[1:], ids.new_full((1,), IGNORE)]), owner=owner))
    pixels = tensors["inputs/image"]
    size = len(pixels)
    each = torch.arange(size)
    views = Views(pixels, each, each, ((1, 1),) * size, ((16, 16),) * size)
    text = Row.pack(sequences)
    counts = {"itc": float(size), "itm": 3.0 * size, "lm": float(len(text.targets))}
    infos = tuple(SampleInfo(str(at), "golden") for at in range(size))
    labels = {IMAGES: each[:, None], IMAGE_ID: each}
    return module.eval(), Batch(text, {}, {"image": views}, infos, counts, labels=labels), tensors


def test_a_step_is_the_published_one(published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, similarities, what negatives are drawn by, gradients of each loss, and all that moves."""
    module, batch, tensors = published
    meta = golden_json(CASE)
    drawn: list[Tensor] = []

    def recorded(weights: Tensor, chance: Tensor) -> Tensor:
        drawn.append(weights)
        return tensors["inputs/neg_text_for_image" if len(drawn) == 1 else "inputs/neg_image_for_text"]

    def spied(*arguments: Any, **keywords: Any) -> Any:
        found.append(contrast(*arguments, **keywords))
        return found[-1]

    contrast, found = code.contrast, []
    monkeypatch.setattr(pair_code, "draw", recorded)
    monkeypatch.setattr(code, "contrast", spied)
    module.on_step_start()
    module.training = True  # its parts are not, so nothing is dropped
    losses = module.losses(batch)
    module.training = False
    close = {"atol": 1e-5, "rtol": 1e-5}
    for name, theirs in TERMS.items():
        torch.testing.assert_close(losses[name] / batch.counts[name], tensors[f"outputs/loss_{theirs}"], **close)
    torch.testing.assert_close(found[0].image_to_text, tensors["outputs/sim_i2t"], **close)
    torch.testing.assert_close(found[0].text_to_image, tensors["outputs/sim_t2i"], **close)
    torch.testing.assert_close(drawn[0], tensors["outputs/multinomial_weights_i2t"], **close)
    torch.testing.assert_close(drawn[1], tensors["outputs/multinomial_weights_t2i"], **close)

    table, checked = pair_table("official", writes=True, same_image=False), 0
    weights = {name.removeprefix("weights/"): tensor for name, tensor in tensors.items() if name.startswith("weights/")}
    for name, theirs in TERMS.items():
        module.zero_grad()
        (losses[name] / batch.counts[name]).backward(retain_graph=True)
        ours = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
        carried = dict(module.state_dict())
        gradients = table.from_ours(carried | ours, {})
        prefix = f"outputs/grad_{theirs}/"
        for key in (key for key in tensors if key.startswith(prefix)):
            torch.testing.assert_close(gradients[key.removeprefix(prefix)], tensors[key], atol=1e-6, rtol=1e-4)
            checked += 1
    assert checked == 20
    assert weights.keys() - gradients.keys() <= {name for name in weights if name.endswith("position_ids")}

    module.queue.push(*module.features[0])
    moved = table.from_ours(dict(module.state_dict()), {})
    after = {n.removeprefix("outputs/after/"): t for n, t in tensors.items() if n.startswith("outputs/after/")}
    assert len(after) == meta.get("changed", 93)
    for name, expected in after.items():
        torch.testing.assert_close(moved[name], expected, atol=1e-6, rtol=1e-6)


# -- fine-tuning for retrieval


def test_all_texts_of_an_image_are_right_for_it(tmp_path: Path) -> None:
    """Soft targets over the pack and the queue, by plain loops; no text of the same image is drawn as a wrong one."""
    module = blip(same_image=True, language={"decoder": False}, dropout=0.0, queue=8)
    module.configure_model()
    samples = [dataclasses.replace(sample, group=f"g{at // 2}") for at, sample in enumerate(pairs(tmp_path, 4))]
    items = [module.codec.encode(sample, seed=at) for at, sample in enumerate(samples)]
    batch = module.codec.collate(items, counts=step_counts(items))
    ids = batch.labels[IMAGE_ID]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    module.queue.ids[0, 3] = ids[2]
    features = torch.nn.functional.normalize(torch.randn(4, 4, 16), dim=-1)
    image, text, image_m, text_m = features
    found = code.contrast(
        (image, text), (image_m, text_m), queue=module.queue, temperature=torch.tensor(0.1), alpha=0.4, ids=ids,
        real=batch.real,
    )  # fmt: skip
    known = [*ids.tolist(), *module.queue.ids[0].tolist()]
    for at in range(4):
        total = torch.zeros(())
        right = [place for place, other in enumerate(known) if other == ids[at]]
        assert len(right) == (2 if at < 2 else 3)
        for own, own_m, others in (
            (image, image_m, torch.cat([text_m.T, module.queue.text], 1)),
            (text, text_m, torch.cat([image_m.T, module.queue.image], 1)),
        ):
            soft = (own_m[at] @ others / 0.1).softmax(0)
            logs = (own[at] @ others / 0.1).log_softmax(0)
            for place in range(12):
                target = 0.4 * soft[place] + 0.6 * (place in right) / len(right)
                total = total - target * logs[place] / 2
        torch.testing.assert_close(found.losses[at], total, atol=1e-5, rtol=1e-5)
    wrong = module.wrong_weights(batch, found, image, text)
    for weights, own, other in zip(wrong, (image, text), (text, image), strict=True):
        expected = (own @ other.T / module.heads.temperature).softmax(1)
        expected[:2, :2] = expected[2:, 2:] = 0
        torch.testing.assert_close(weights, expected)
        chosen = torch.stack([draw(weights, torch.full((4,), chance)) for chance in (0.0, 0.3, 0.9999999)])
        assert (weights.expand(3, -1, -1).gather(2, chosen[:, :, None]) > 0).all()


def finding(folder: Path, rank: int) -> tuple[BLIP, Batch]:
    """A pack of retrieval whose wrong pairs come from all packs; each image has texts in both of two packs."""
    module = blip(same_image=True, language={"decoder": False}, dropout=0.0, queue=8)
    module.configure_model()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith("momentum"))
    samples = [dataclasses.replace(sample, group=f"g{at % 3}") for at, sample in enumerate(pairs(folder, 8))]
    items = [module.codec.encode(sample, seed=at) for at, sample in enumerate(samples)][4 * rank : 4 * rank + 4]
    batch = module.codec.collate(items, counts=step_counts(items))
    return module, dataclasses.replace(batch, negatives="step", pack=rank, packs=2, seed=5)


def _on_a_rank(folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    module, batch = finding(folder, distributed.get_rank())
    loss = module.losses(batch)["itm"]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_wrong_pairs_come_from_all_devices(tmp_path: Path) -> None:
    """Two packs on two devices against pairs put together one by one; gradients reach images of the other pack too."""
    torch.manual_seed(0)
    parts = [finding(tmp_path, rank) for rank in (0, 1)]
    module, batches = parts[0][0], [batch for _, batch in parts]
    features = [module._features(batch)[0] for batch in batches]
    texts = [code.first_texts(batch, module.codec.tokenizer.pad_id) for batch in batches]
    known, images = torch.cat([batch.labels[IMAGE_ID] for batch in batches]), torch.cat(features)
    with torch.no_grad():
        embedded = [
            (module.embed_images(module, own, 1), module.embed_texts(module, *text))
            for own, text in zip(features, texts, strict=True)
        ]
    every = [torch.cat(kind) for kind in zip(*embedded, strict=True)]
    words = [(ids[at], mask[at]) for ids, mask in texts for at in range(4)]
    expected = []
    for rank, (batch, own) in enumerate(zip(batches, embedded, strict=True)):
        chance, losses = draw_uniform(batch, 2), []
        for at in range(4):
            place = 4 * rank + at
            wrong = []
            for kind in (0, 1):  # a text for the image, an image for the text
                similar = (own[kind][at] @ every[1 - kind].T / module.heads.temperature).softmax(0)
                sums = similar.masked_fill(known == known[place], 0.0).cumsum(0)
                wrong.append(next(c for c in range(8) if sums[c] > chance[at, kind] * sums[-1]))
            for text, image, is_right in ((place, place, 1), (place, wrong[1], 0), (wrong[0], place, 0)):
                ids, mask = words[text]
                logits = module.pair_logits(ids[None], mask[None], images[image : image + 1])
                losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([is_right])))
        expected.append(torch.stack(losses).sum())
    torch.stack(expected).sum().backward()
    found = run_ranks(_on_a_rank, 2, tmp_path)
    for (loss, _), theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, theirs.detach(), atol=1e-5, rtol=1e-5)
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            total = found[0][1][name] + found[1][1][name]
            torch.testing.assert_close(total, parameter.grad, atol=1e-5, rtol=1e-4)


# -- weights


def test_published_folders_there_and_back(tmp_path: Path) -> None:
    """The official file of each network and transformers' class, bit-equal, and the same numbers there."""
    retrieval = {"same_image": True, "language": {"decoder": False}, "max_tokens": 35}
    for name, module in (("pretrain", blip()), ("retrieval", blip(**retrieval))):
        parts = ("vision", "language", "projections", "heads")
        module.stage = Stage("x", {part: Trained(lr=1e-3) for part in parts})
        module.configure_model()
        module.queue.place += 8
        write_stage(tmp_path / name, module, global_step=1)
        layouts = ["official", "hf"] if name == "retrieval" else ["official"]
        for layout in layouts:
            convert(tmp_path / name, tmp_path / f"{name}_{layout}", system="blip", target_layout=layout)
            convert(
                tmp_path / f"{name}_{layout}", tmp_path / f"{name}_{layout}_ours", system="blip", target_layout="ours"
            )
            again = vlm.load(tmp_path / f"{name}_{layout}_ours").state_dict()
            assert again.keys() == module.state_dict().keys()
            assert [n for n, tensor in module.state_dict().items() if not torch.equal(tensor, again[n])] == []
    shapes = {n: tuple(t.shape) for n, t in load_file(tmp_path / "pretrain_official" / "model.safetensors").items()}
    golden_shapes = {n.removeprefix("weights/") for n in golden(CASE) if n.startswith("weights/")}
    assert shapes.keys() == {n for n in golden_shapes if not n.endswith("position_ids")}
    with pytest.raises(UserError, match="no class of Hugging Face's holds BLIP_Pretrain"):
        convert(tmp_path / "pretrain", tmp_path / "x", system="blip", target_layout="hf")

    model, info = BlipForImageTextRetrieval.from_pretrained(tmp_path / "retrieval_hf", output_loading_info=True)
    assert not any(info.values()), info
    [sample] = pairs(tmp_path, 1)
    item = module.eval().codec.encode(sample)
    batch = module.codec.collate([item], counts=step_counts([item]))
    pixels, ids = batch.views["image"].pixels, batch.text.ids[None]
    marked = ids.clone()
    marked[:, 0] = module.codec.tokenizer.token_id("[ENC]")  # transformers leaves it to whoever calls
    with torch.no_grad():
        said = module.embeddings(batch)
        cosine = model.eval()(ids, pixels, use_itm_head=False).itm_score
        match = model(marked, pixels, use_itm_head=True).itm_score
        torch.testing.assert_close(said.image @ said.text.T, cosine, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(module.match_logits(said.image_state, said.text_state), match, atol=2e-5, rtol=1e-5)


def test_transformers_folders_start_a_fine_tuning(tmp_path: Path) -> None:
    """Without momentum copies, queue and temperature, as the hub has it."""
    module = blip(same_image=True, language={"decoder": False}, max_tokens=35)
    module.stage = Stage("x", {"language": Trained(lr=1e-3)})
    module.configure_model()
    write_stage(tmp_path / "x", module, global_step=1)
    convert(tmp_path / "x", tmp_path / "hf", system="blip", target_layout="hf")
    (tmp_path / "hf" / CARRIED).unlink()
    opened = vlm.load(tmp_path / "hf").state_dict()
    assert opened["heads.temperature"].item() == pytest.approx(0.07)
    for name, tensor in opened.items():
        if name.startswith("momentum."):
            assert torch.equal(tensor, opened[name.removeprefix("momentum.")])
    torch.testing.assert_close(opened["queue.text"].norm(dim=0), torch.ones(16))


def test_paper_size_has_the_published_tensors() -> None:
    """Every name and shape of transformers' class, and the numbers of the official one, on the meta device."""
    base = TimmTower("vit_base_patch16_224", class_token=True, final_norm=True, options={"img_size": 384})
    module = BLIP(vision=base, language=Med(vocab_size=30524, decoder=False), tokenizer=TOKENIZER, same_image=True)
    with torch.device("meta"), empty_weights():
        assemble(module)
        theirs = BlipForImageTextRetrieval(BlipConfig())
    table = get_family("blip").table("hf", {"architectures": ["BlipForImageTextRetrieval"]})
    made = table.check({name: tuple(t.shape) for name, t in theirs.state_dict().items()}, side="theirs")
    ours = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    assert made == {n: s for n, s in ours.items() if not n.startswith(("momentum", "queue", "heads.temp"))}
    official = get_family("blip").table("official", {"architectures": ["BlipForImageTextRetrieval"]})
    names = official.check(ours, side="ours")
    assert names["temp"] == ()
    assert names["image_queue"] == (256, 57600)
    assert names["idx_queue"] == (1, 57600)


# -- what is wrong with data and settings


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    module, [sample] = blip(), pairs(tmp_path, 1)
    with pytest.raises(SampleError, match="0 images where one is compared"):
        module.codec.encode(dataclasses.replace(sample, images=()))
    silent = dataclasses.replace(sample, messages=sample.messages[:1], answers=())
    with pytest.raises(SampleError, match="has no text to compare its image with"):
        module.codec.encode(silent)
    long = Message("assistant", (TextPart("a card " * 40),))
    item = module.codec.encode(dataclasses.replace(sample, messages=(sample.messages[0], long)), seed=0)
    assert len(item.text[0].ids) == 32  # 30 words between their marks
    assert item.counts["cut_answers"] == 1
    module.configure_model()
    with pytest.raises(UserError, match=r"model\.queue: 16 is no multiple of the batch of 6 samples.*set it to 12"):
        module.queue.check(6)
    with pytest.raises(UserError, match="encoder: false reads no text"):
        blip(language={"encoder": False})


def test_a_video_is_the_mean_of_its_frames(tmp_path: Path) -> None:
    """Features of all frames side by side; the class tokens' projections are averaged before they are normalised."""
    module, samples = blip(dropout=0.0), pairs(tmp_path, 4)
    module.configure_model()
    frames = tuple(image for sample in samples[:3] for image in sample.images)
    video = dataclasses.replace(samples[3], images=frames)
    said, alone = module.embed(video), module.embed(samples[:3])
    assert said.image_state.shape[1] == 3 * 17
    torch.testing.assert_close(said.image_state[0], alone.image_state.flatten(0, 1))
    mean = module.projections.image(alone.image_state[:, 0]).mean(0)
    torch.testing.assert_close(said.image[0], torch.nn.functional.normalize(mean, dim=0))
    with pytest.raises(UserError, match="different numbers of images"):
        module.embed([video, samples[0]])


def test_videos_are_found_and_asked_about_by_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """MSRVTT by its protocols: 8 frames, texts of 40 words; 16 frames and a ranked answer."""
    for name, module in (("pairs", blip(dropout=0.0)), ("vqa", blip_vqa())):
        module.stage = Stage(name, {"language": Trained(lr=1e-3), "vision": Trained(lr=1e-3)})
        module.configure_model()
        write_stage(tmp_path / name, module, global_step=1)
    for folder in ("msrvtt/frames", "msrvtt_qa/frames"):
        for number in range(3):
            (tmp_path / "data/eval" / folder / f"video{number}").mkdir(parents=True)
            for frame in range(18):
                picture(tmp_path / "data/eval" / folder / f"video{number}", f"{frame:05d}", (30, 20), number + 1)
    files = {
        "msrvtt/msrvtt_test.jsonl": [{"clip_name": f"video{n}", "caption": "a red card " * 12} for n in range(3)],
        "msrvtt_qa/test_qa.json": [{"video_id": n, "question": "what?", "answer": "ball", "id": n} for n in range(3)],
        "msrvtt_qa/answers.json": ["ball", "card"],
    }
    for name, content in files.items():
        lines = (json.dumps(content),) if name.endswith(".json") else map(json.dumps, content)
        (tmp_path / "data/eval" / name).write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    options = ["--data.init_args.num_workers=0", "--trainer.accelerator=cpu"]
    for protocol, weights in (("msrvtt_retrieval", "pairs"), ("msrvtt_qa", "vqa")):
        command = ["test", "-c", str(ROOT / f"configs/eval/blip/{protocol}.yaml"), "--weights", weights]
        assert cli.main([*command, *options]) == 0, capfd.readouterr().err
    found = json.loads((tmp_path / "evaluation/msrvtt_retrieval/scores.json").read_text())
    assert {f"msrvtt_retrieval/{way}@{k}" for way in ("TR", "IR") for k in (1, 5, 10)} <= found["scores"].keys()
    assert found["counts"]["msrvtt_retrieval"] == 3
    lines = (tmp_path / "evaluation/msrvtt_qa/answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] in ("ball", "card") for line in lines] == [True] * 3
