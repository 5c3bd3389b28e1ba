"""Procedures over shards: captions, filtering, ranking, the bootstrapped set, an index of images."""

import contextlib
import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import vlm  # noqa: F401
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from callbacks.stage_transition import write_stage
from tests.conftest import PATIENCE
from tests.support.ranks import run_ranks
from tests.support.samples import picture
from tests.support.systems import build
from vlm.data import WebDataset
from vlm.errors import UserError
from vlm.loading import load
from vlm.procedures import main
from vlm.procedures.filter_pairs import FilterPairs
from vlm.procedures.image_index import ImageIndex
from vlm.procedures.shards import Shard, find_shards, running

ROOT = Path(__file__).parents[2]


def write_tar(path: Path, entries: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tar files, a folder and a list of images; a captioner, a filter and a CLIP, all of them random."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "photos").mkdir()
    images = [picture(folder / "photos", f"p{at}", (40 + at, 30), at + 1) for at in range(11)]
    content = [image.path.read_bytes() for image in images if image.path is not None]
    for number in range(3):
        entries: dict[str, bytes] = {}
        for at in range(number, 11, 3):
            entries[f"{at:03d}.png"] = b"no image" if at == 4 else content[at]
            if at != 5:  # an image without a text
                entries[f"{at:03d}.txt"] = f"a red ball and a card with {at}".encode()
        write_tar(folder / f"{number:05d}.tar", entries)
    records = [{"image": f"photos/p{at}.png", "caption": ["a card", f"a ball {at}"]} for at in range(4)]
    (folder / "human.json").write_text(json.dumps(records))
    write_stage(folder / "captioner", build("blip"), global_step=1)
    write_stage(folder / "filter", build("blip_pretrain"), global_step=1)
    write_clip(folder / "clip")
    return folder


def write_clip(folder: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    text = {**size, "vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**size, "image_size": 28, "patch_size": 7}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: at for at, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)


def shards(world: Path) -> str:
    return str(world / "{00000..00002}.tar")


def caption(world: Path, out: Path, *options: str) -> int:
    words = [shards(world), "--weights", str(world / "captioner"), "--out", str(out), "--batch_size", "2"]
    return main(["caption-images", *words, "--max_new_tokens", "8", "--number", "2", "--device", "cpu", *options])


def files(folder: Path) -> dict[str, bytes]:
    """Everything that a procedure wrote, but what tells about all shards."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {name: data for name, data in found.items() if name != running.MANIFEST}


def rows(folder: Path, pattern: str = "*.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob(pattern)) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def captions(world: Path) -> Path:
    assert caption(world, world / "captions") == 0
    return world / "captions"


@pytest.fixture(scope="module")
def filtered(world: Path, captions: Path) -> Path:
    words = [shards(world), "--weights", str(world / "filter"), "--captions", str(captions), "--batch_size", "3"]
    assert main(["filter-pairs", *words, "--out", str(world / "filtered"), "--device", "cpu"]) == 0
    return world / "filtered"


def test_every_image_has_captions_but_the_one_that_cannot_be_read(captions: Path) -> None:
    found = rows(captions)
    assert [row["id"] for row in found] == [
        f"{number:05d}/{at:03d}" for number in range(3) for at in range(number, 11, 3) if at != 4
    ]
    assert all(1 <= len(row["texts"]) <= 2 for row in found)
    assert {text["source"] for row in found for text in row["texts"]} == {"synthetic"}
    report = json.loads((captions / "report.json").read_text())
    assert (report["shards"], report["images"], report["unreadable"], report["missing"]) == (3, 10, 1, [])
    assert "00001/004" in json.loads((captions / "counts/00001.json").read_text())["unreadable"]
    manifest = json.loads((captions / "manifest.json").read_text())
    assert manifest["settings"]["captioner"] == found[0]["texts"][0]["captioner"]
    assert manifest["settings"]["decoding"]["top_p"] == 0.9


def run_rank(world: Path, out: Path) -> int:
    return caption(world, out)


def test_files_are_the_same_whoever_makes_them(world: Path, captions: Path, tmp_path: Path) -> None:
    """Two processes take shards in turn."""
    assert run_ranks(run_rank, 2, world, tmp_path / "ranks") == [0, 0]
    assert files(tmp_path / "ranks") == files(captions)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_two_processes_of_a_launcher(world: Path, captions: Path, tmp_path: Path, launcher: str) -> None:
    """As people start them: `torchrun --nproc_per_node 2`, and two tasks with what `srun` tells each of them."""
    words = ["cli", "run", "caption-images", shards(world), "--weights", str(world / "captioner"), "--device", "cpu"]
    words += ["--max_new_tokens", "8", "--number", "2", "--batch_size", "2", "--out", str(tmp_path / "out")]
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | {"OMP_NUM_THREADS": "1"}
    python, tasks = [sys.executable, "-m"], [{}]
    if launcher == "torchrun":
        python += ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    else:
        job = {"JOB_ID": "7", "JOB_NAME": "captions", "NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1"}
        job |= {"NODELIST": "localhost", "NODEID": "0"}
        own |= {f"SLURM_{name}": value for name, value in job.items()} | {"MASTER_PORT": str(free_port())}
        tasks = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ("0", "1")]
    started = [subprocess.Popen([*python, *words], cwd=ROOT, env=own | task) for task in tasks]
    assert [process.wait(timeout=PATIENCE) for process in started] == [0] * len(tasks)
    assert files(tmp_path / "out") == files(captions)


def free_port() -> int:
    """None of those that the system hands out by itself, which another process may have got before it is used."""
    with socket.socket() as opened:
        while True:
            with contextlib.suppress(OSError):
                opened.bind(("127.0.0.1", random.randrange(20000, 30000)))
                return int(opened.getsockname()[1])


def test_a_stopped_run_makes_what_is_missing(
    world: Path, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of the second shard: the first is not made again, the second is made whole."""
    asked: list[str] = []
    rows_of = running.Work.predict_step

    def stop(self: Any, chunk: Any, batch_idx: int) -> Any:
        asked.append(chunk.shard.name)
        if asked.count("00001") == 2 and len(asked) == 4:
            raise KeyboardInterrupt
        return rows_of(self, chunk, batch_idx)

    monkeypatch.setattr(running.Work, "predict_step", stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        caption(world, tmp_path)
    assert {file.name for file in tmp_path.glob("*.jsonl")} == {"00000.jsonl"}
    assert caption(world, tmp_path, "--num_workers", "2") == 0
    assert sorted(asked[4:]) == ["00001", "00001", "00002", "00002"]
    assert files(tmp_path) == files(captions)
    with pytest.raises(UserError, match="was begun with another decoding"):
        caption(world, tmp_path, "--top_p", "0.5")


def test_texts_are_judged_each_for_itself(world: Path, captions: Path, filtered: Path) -> None:
    found = {row["id"]: row["texts"] for row in rows(filtered)}
    written = {row["id"]: row["texts"] for row in rows(captions)}
    assert found.keys() == written.keys()
    module = load(world / "filter")
    by_id = {pair.id: pair for shard in find_shards([shards(world)]) for pair in shard.pairs() if hasattr(pair, "id")}
    for identity, texts in found.items():
        web = [text for text in texts if text["source"] == "web"]
        assert len(web) == len(by_id[identity].texts)
        assert len(texts) == len(web) + len(written[identity])
        for text in texts:
            said = module.embed(by_id[identity].sample(text["text"]))
            with torch.no_grad():
                logits = module.match_logits(said.image_state, said.text_state)
            # alone and in a batch: measured 6e-7, and six digits are kept
            assert text["score"] == pytest.approx(float(logits.softmax(1)[0, 1]), abs=5e-6)
            assert text["kept"] == (text["score"] >= 0.5)
    report = json.loads((filtered / "report.json").read_text())
    counted = [
        report[key] for key in ("web_kept", "web_dropped", "synthetic_kept", "synthetic_dropped") if key in report
    ]
    assert sum(counted) == sum(map(len, found.values()))


def test_an_image_is_encoded_once_for_all_of_its_texts(world: Path, captions: Path, tmp_path: Path) -> None:
    module = load(world / "filter")
    seen: list[int] = []
    module.vision.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    work = FilterPairs(module, weights=str(world / "filter"), captions=captions)
    shard = find_shards([shards(world)])[0]
    pairs = [pair for pair in shard.pairs() if hasattr(pair, "id")]
    judged = work.rows(shard, pairs)
    assert sum(len(row["texts"]) for row in judged) > len(pairs) == sum(seen)


def test_known_noise_gives_precision_and_recall() -> None:
    """Of 8 right and 4 wrong texts, 6 and 2 stay."""
    totals = {"right_kept": 6, "right_dropped": 2, "wrong_kept": 2, "wrong_dropped": 2}
    figures = FilterPairs.figures(object.__new__(FilterPairs), totals)
    assert figures == {"precision": 0.75, "recall": 0.75, "noise_before": pytest.approx(1 / 3)}


def test_the_bootstrapped_set_is_one_to_train_on(world: Path, filtered: Path, tmp_path: Path) -> None:
    words = [shards(world), "--filtered", str(filtered), "--human", str(world / "human.json"), "--device", "cpu"]
    assert main(["bootstrap", *words, "--out", str(tmp_path / "set")]) == 0
    kept = [(row["id"], text["text"]) for row in rows(filtered) for text in row["texts"] if text["kept"]]
    made = WebDataset(tmp_path / "set/*.tar")
    facts = []
    for file in made.files:
        with tarfile.open(file) as tar:
            facts += [json.load(tar.extractfile(m)) for m in tar.getmembers() if m.name.endswith(".json")]  # type: ignore[arg-type]
    assert [(fact["id"], fact["caption"]) for fact in facts if fact["source"] != "human"] == kept
    assert sum(fact["source"] == "human" for fact in facts) == 8, "two texts of each of four images"
    assert all({"score", "judge"} <= fact.keys() for fact in facts if fact["source"] != "human")
    assert len(made) == len(facts)
    sample = made[len(made) - 1]
    own = Image.open(world / "photos/p3.png").convert("RGB")
    assert np.array_equal(np.asarray(sample.images[0].read(sample)), np.asarray(own))
    assert sample.messages[1].content[0].text == "a ball 3"  # type: ignore[union-attr]


@pytest.mark.parametrize("scorer", ["clip", "filter"])
def test_the_captions_nearest_to_an_image_stay(world: Path, captions: Path, tmp_path: Path, scorer: str) -> None:
    words = [shards(world), "--captions", str(captions), "--weights", str(world / scorer), "--device", "cpu"]
    assert main(["rank-captions", *words, "--out", str(tmp_path), "--keep", "2"]) == 0
    for row in rows(tmp_path):
        scores = [text["score"] for text in row["texts"]]
        assert scores == sorted(scores, reverse=True)
        assert [text["kept"] for text in row["texts"]] == [place < 2 for place in range(len(scores))]


def test_clip_is_transformers_own(world: Path) -> None:
    from vlm.procedures.scorers import CLIPScorer
    from vlm.sample import ImageFile

    scorer = CLIPScorer(world / "clip")
    file = world / "photos/p1.png"
    given = scorer.tokenizer(["a card", "a ball and a card"], padding=True, return_tensors="pt")
    pixels = scorer.processor(images=Image.open(file).convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        theirs = scorer.model(**given, **pixels)
    ours = scorer.embed_texts(["a card", "a ball and a card"]), scorer.embed_images([ImageFile("p1", path=file)])
    for own, other in zip(ours, (theirs.text_embeds, theirs.image_embeds), strict=True):  # measured 6e-8
        assert float((own - other).abs().max()) < 1e-6


@pytest.mark.parametrize("scorer", ["clip", "filter"])
def test_an_index_finds_what_is_nearest(world: Path, tmp_path: Path, scorer: str) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(world / "photos", folder)
    (folder / "torn.png").write_bytes(b"no image")
    words = [str(folder), "--weights", str(world / scorer), "--shard_size", "5", "--device", "cpu"]
    assert main(["index-images", *words, "--out", str(tmp_path / "index")]) == 0
    assert json.loads((tmp_path / "index/report.json").read_text())["unreadable"] == 1
    index = ImageIndex.open(tmp_path / "index")
    assert len(index) == 11
    near = index.nearest("a red ball", count=4)
    assert len(set(near)) == 4
    assert all(path.is_file() for path in near)
    rest = index.nearest("a red ball", count=20, exclude=[str(near[0]), str(near[2])])
    assert len(rest) == 9
    assert rest[:2] == [near[1], near[3]]
    vector = index._scorer.embed_texts(["a red ball"])[0].numpy()
    scores = [score for _, score in index.search(vector, 11)]
    assert scores == sorted(scores, reverse=True)


def test_the_best_of_an_image_s_vectors_counts(tmp_path: Path) -> None:
    vectors = np.eye(4, dtype=np.float32)[[0, 1, 2, 0, 3, 3]]
    index = ImageIndex(vectors, np.array([0, 0, 0, 1, 1, 1]), [Path("a"), Path("b")], weights="none")
    asked = np.array([0.0, 0.6, 0.0, 0.8], np.float32)
    assert [(str(path), round(score, 3)) for path, score in index.search(asked, 5)] == [("b", 0.8), ("a", 0.6)]


def test_what_is_wrong_is_one_line(world: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    weights = ["--weights", str(world / "clip"), "--device", "cpu"]
    with pytest.raises(UserError, match="the list of shards is empty"):
        find_shards([])
    for given, message in (
        (tmp_path / "empty", "holds no images"),
        (tmp_path / "nowhere.tar", "nowhere.tar: no such file"),
        (tmp_path / "nowhere", "is no tar file, list"),
        (world / "00000.tar", "unpack the tar file first"),
    ):
        with pytest.raises(UserError, match=message):
            main(["index-images", str(given), *weights, "--out", str(tmp_path / "index")])
    with pytest.raises(UserError, match="is no index of images; make one"):
        ImageIndex.open(tmp_path / "empty")
    with pytest.raises(UserError, match="was made by `vlm run caption-images`"):
        ImageIndex.open(captions)
    with pytest.raises(UserError, match="judges nothing"):
        main(["bootstrap", shards(world), "--filtered", str(captions), "--out", str(tmp_path / "set")])
    # a shard that is cut, and one that nobody captioned, are named; the others are made
    write_tar(tmp_path / "00009.tar", {"a.png": (world / "photos/p1.png").read_bytes()})
    (tmp_path / "00008.tar").write_bytes((world / "00002.tar").read_bytes()[:700])
    words = [str(tmp_path / "0000[89].tar"), str(world / "00002.tar"), "--captions", str(captions), *weights]
    assert main(["rank-captions", *words, "--out", str(tmp_path / "ranked")]) == 1
    said = capsys.readouterr()
    assert "00008: left out: " in said.err
    assert "is no whole tar file" in said.err
    assert "00009.jsonl: is not there; finish `vlm run caption-images`" in said.err
    assert [file.name for file in (tmp_path / "ranked").glob("*.jsonl")] == ["00002.jsonl"]
    # candidates of another input
    shutil.copytree(captions, tmp_path / "other")
    (tmp_path / "other/00002.jsonl").write_text("")
    words = [str(world / "00002.tar"), "--captions", str(tmp_path / "other"), *weights]
    assert main(["rank-captions", *words, "--out", str(tmp_path / "none")]) == 1
    assert "has no candidates for '00002/002'" in capsys.readouterr().err


def test_input_that_changed_is_not_taken_for_the_same(world: Path, captions: Path, tmp_path: Path) -> None:
    shutil.copytree(captions, tmp_path / "captions")
    shutil.copy(world / "00000.tar", tmp_path / "00001.tar")
    other = find_shards([tmp_path / "00001.tar"])
    assert other == [Shard("00001", tmp_path / "00001.tar", caption_key="txt")]
    words = [str(tmp_path / "00001.tar"), "--weights", str(world / "captioner"), "--max_new_tokens", "8"]
    with pytest.raises(UserError, match="its 00001 was made of"):
        main(["caption-images", *words, "--number", "2", "--out", str(tmp_path / "captions"), "--device", "cpu"])
