"""`vlm fit --weights X --data FILE`: one line, from any weights, and what comes of it opens again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm
import yaml
from PIL import Image

import cli
from tests.checkpoints.test_convert import official_folder
from tests.conftest import GOLDEN
from tests.support.systems import SYSTEMS
from callbacks.stage_transition import write_stage
from vlm.checkpoints.artefact import read_artefact
from vlm.data.wrappers.held_out import HoldOut
from vlm.finetuning.recognise import recognise
from vlm.recipes import TrainingStage, find_recipe, load_recipe, systems
from vlm.registry import recipe_folder
from vlm.stages import Stage

QUIET = ("--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false")
NEVER_SHOWN = "--predictions.enabled=false"
QUICK, SLOW = ("fuyu", "llava_next", "qwen_vl"), ("llava", "llava_1_5", "mini_gemini", "vila")


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images with two questions each, in LLaVA's form, images in a folder of their own."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "images").mkdir()
    records = []
    for number in range(12):
        Image.new("RGB", (40 + number, 30), (20 * number, 0, 0)).save(folder / "images" / f"{number}.png")
        for question, answer in (("What colour?", "Red."), ("How light?", f"As {number}.")):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            records.append({"id": len(records), "image": f"{number}.png", "conversations": turns})
    (folder / "mine.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published LLaVA-1.5, its tower inside."""
    folder = tmp_path_factory.mktemp("published") / "llava-tiny"
    torch.manual_seed(0)
    official_folder(folder, connector="mlp2x_gelu", vocab=32000)
    shutil.copy(GOLDEN / "_shared" / "llama_sp_tokenizer.model", folder / "tokenizer.model")
    return folder


def fit(weights: Path | str, data: Path, run: Path, *options: str) -> int:
    words = [f"--weights={weights}", f"--data={data}", f"--run={run}", *QUIET, NEVER_SHOWN, *options]
    return cli.main(["fit", *words])


def test_one_line_trains_a_published_folder_and_the_result_opens_again(
    official: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed and resumed it ends with the same weights; what it follows is known by content, wherever it lies."""
    published, run, whole = tmp_path / "x", tmp_path / "run", tmp_path / "whole"
    shutil.copytree(official, published)
    words = ("--val-split=0.25", "--epochs=1", "--lr=1e-3", "--checkpoint.every_n_train_steps=1")
    assert fit(published, mine / "mine.json", whole, *words) == 0
    out = capsys.readouterr().out
    assert "fine-tuning of llava_1_5" in out
    assert f"vlm.data.LlavaJson, 24 records, images in {mine / 'images'}" in out

    with monkeypatch.context() as patched:
        update, done = vlm.systems.LLaVA15.on_step_end, []

        def interrupted(self: Any) -> None:
            update(self)
            done.append(1)
            if len(done) == 2:
                raise RuntimeError("killed")

        patched.setattr(vlm.systems.LLaVA15, "on_step_end", interrupted)
        with pytest.raises(RuntimeError, match="killed"):
            fit(published, mine / "mine.json", run, *words)
    assert fit(published, mine / "mine.json", run, *words) == 0
    assert "step 1 of 3" in capsys.readouterr().out
    ours, theirs = (dict(read_artefact(folder / "artefact").items()) for folder in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert fit(published, mine / "mine.json", run, *words) == 2
    assert "this stage is finished" in capsys.readouterr().err

    stored = json.loads((run / "artefact/stage.json").read_text())
    assert stored["follows"][0]["published"] == "folder"
    assert stored["frozen"].keys() == {"vision"}, "the tower is referred to, not copied"
    base, opened = vlm.load(published), vlm.load(run)
    assert opened.load_report.new == []
    for name, tensor in opened.state_dict().items():
        assert torch.equal(tensor, theirs.get(name, base.state_dict()[name])), name
    question = ["--image", str(mine / "images/3.png"), "--prompt", "What colour?", "--max_new_tokens", "2"]
    assert cli.main(["predict", "--weights", str(run), *question]) == 0

    shutil.move(run, tmp_path / "elsewhere" / "run")  # away from what it follows, which stays
    assert vlm.load(tmp_path / "elsewhere" / "run").load_report.new == []
    assert fit(tmp_path / "elsewhere" / "run", mine / "mine.json", tmp_path / "next", "--trainer.max_steps=1") == 0
    second = vlm.load(tmp_path / "next")
    assert torch.equal(second.vision.trunk.pos_embed, base.vision.trunk.pos_embed)
    assert cli.main(["export", str(tmp_path / "next"), str(tmp_path / "hf")]) == 0

    shard = published / "pytorch_model-00001-of-00002.bin"
    torch.save({name: tensor + 1 for name, tensor in torch.load(shard).items()}, shard)
    capsys.readouterr()
    assert cli.main(["predict", "--weights", str(tmp_path / "next"), *question]) == 2
    assert f"follows {published}, whose content has changed since" in capsys.readouterr().err
    shutil.rmtree(published)
    assert cli.main(["predict", "--weights", str(tmp_path / "next"), *question]) == 2
    err = capsys.readouterr().err
    assert str(published) in err
    assert "missing" in err
    assert len(err.strip().splitlines()) == 1


def test_an_adapter_is_one_word(official: Path, mine: Path, tmp_path: Path) -> None:
    """Everything else stays what it was, and is not copied."""
    words = ("--lora", "--lora.rank=4", "--trainer.max_steps=1")
    assert fit(official, mine / "mine.json", tmp_path / "run", *words) == 0
    (callback,) = yaml.safe_load((tmp_path / "run/finetune.yaml").read_text())["trainer"]["callbacks"]
    assert callback["init_args"]["rank"] == 4
    assert callback["init_args"]["alpha"] == 8, "twice the rank, as the overlay has it"
    stored = read_artefact(tmp_path / "run/artefact").meta
    assert all(".lora_" in name for name in stored["tensors"])
    base, opened = vlm.load(official).state_dict(), vlm.load(tmp_path / "run").state_dict()
    assert opened.keys() == base.keys() | stored["tensors"].keys()
    assert all(torch.equal(opened[name], tensor) for name, tensor in base.items())

    for name, words, follows in (("on", ["--lora"], {"merge": False}), ("merged", [], {"merge": True})):
        assert fit(tmp_path / "run", mine / "mine.json", tmp_path / name, *words, "--trainer.max_steps=1") == 0
        stored = read_artefact(tmp_path / name / "artefact").meta
        assert stored["follows"][0].items() >= follows.items()
        assert all(".lora_" in tensor for tensor in stored["tensors"]) == (name == "on")
        assert vlm.load(tmp_path / name).load_report.new == []


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_system_is_fine_tuned_by_its_own_recipe(name: str, mine: Path, tmp_path: Path) -> None:
    module = SYSTEMS[name].make()
    module.stage = Stage("pretrained", SYSTEMS[name].last.train)
    module.configure_model()
    write_stage(tmp_path / "x" / "artefact", module, global_step=0)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    options = ("--trainer.max_steps=2", "--val-split=0.1", "--trainer.limit_val_batches=0", "--lr=1e-2")
    assert fit(tmp_path / "x", mine / "mine.json", tmp_path / "run", *options) == 0
    settings = yaml.safe_load((tmp_path / "run/finetune.yaml").read_text())
    opened = vlm.load(tmp_path / "run")
    trained = {part.split(".")[0] for part in settings["stage"]["train"]}
    changed = {key.split(".")[0] for key, value in opened.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == trained


def test_the_file_that_is_kept_gives_the_same_run(
    official: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = tmp_path / "over.yaml"
    over.write_text(yaml.safe_dump({"stage": {"schedule": {"kind": "linear"}}, "trainer": {"max_steps": 2}}))
    assert fit(official, mine / "mine.json", tmp_path / "a", "-c", str(over), "--data.init_args.seed=3") == 0
    kept = tmp_path / "a/finetune.yaml"
    settings = yaml.safe_load(kept.read_text())
    assert settings["stage"]["schedule"] == {"kind": "linear", "warmup": 0.03}, "files and options win"
    assert cli.main(["fit", "-c", str(kept), f"--trainer.default_root_dir={tmp_path / 'b'}", *QUIET]) == 0
    ours, theirs = (read_artefact(tmp_path / run / "artefact") for run in "ab")
    assert ours.meta["tensors"] == theirs.meta["tensors"]


def test_what_is_checked_and_shown_is_what_would_be_trained_on(
    official: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--weights", str(official), "--data", str(mine / "mine.json"), "--val-split", "0.25"]
    assert cli.main(["check-data", *words, "--out", "report", "--workers", "0"]) == 0
    assert "24 records" in capsys.readouterr().err
    assert cli.main(["show-data", *words, "--num", "2", "--out", "page.html"]) == 0
    assert "2 of 18 samples" in (tmp_path / "page.html").read_text(), "6 of the 24 are held out"


# data told by looking at it


def _llava(folder: Path) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]
    return _json(folder, [{"image": "a.png", "conversations": turns}])


def _qwen(folder: Path) -> Path:
    turns = [{"from": "user", "value": "Picture 1: <img>a.png</img>\nWhat?"}, {"from": "assistant", "value": "A."}]
    return _json(folder, [{"conversations": turns}])


def _messages(folder: Path) -> Path:
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A."}]
    return _json(folder, [{"messages": turns, "images": ["a.png"]}], lines=True)


def _captions(folder: Path) -> Path:
    (folder / "photos/a.txt").write_text("A.")
    return folder / "photos"


def _metadata(folder: Path) -> Path:
    (folder / "photos/metadata.jsonl").write_text('{"file_name": "a.png", "text": "A."}\n')
    return folder / "photos"


def _tars(folder: Path) -> Path:
    import tarfile

    (folder / "a.txt").write_text("A.")
    with tarfile.open(folder / "0.tar", "w") as tar:
        tar.add(folder / "photos/a.png", "0.png")
        tar.add(folder / "a.txt", "0.txt")
    (folder / "tars").mkdir()
    shutil.move(folder / "0.tar", folder / "tars/0.tar")
    return folder / "tars"


def _parquet(folder: Path) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A."}]
    image = {"bytes": (folder / "photos/a.png").read_bytes(), "path": None}
    pq.write_table(pa.Table.from_pylist([{"messages": turns, "images": [image]}]), folder / "data.parquet")
    return folder / "data.parquet"


def _yaml(folder: Path) -> Path:
    source = {"class_path": "vlm.data.LlavaJson", "init_args": {"path": str(_llava(folder)), "image_root": "x"}}
    (folder / "sources.yaml").write_text(yaml.safe_dump([source]))
    return folder / "sources.yaml"


def _folder_of_one_file(folder: Path) -> Path:
    _llava(folder)
    return folder


def _json(folder: Path, records: list[Any], *, lines: bool = False) -> Path:
    file = folder / ("data.jsonl" if lines else "data.json")
    file.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos/a.png")
    return tmp_path


@pytest.mark.parametrize(
    ("write", "reader"),
    [
        (_llava, "LlavaJson"),
        (_qwen, "QwenJson"),
        (_messages, "MessagesJson"),
        (_captions, "ImageFolder"),
        (_metadata, "ImageFolder"),
        (_tars, "WebDataset"),
        (_parquet, "Parquet"),
        (_yaml, "LlavaJson"),
        (_folder_of_one_file, "LlavaJson"),
    ],
)
def test_data_is_told_by_looking_at_it(write: Callable[[Path], Path], reader: str, folder: Path) -> None:
    found = recognise(str(write(folder)), images=None, options={})
    (source,) = found.sources
    assert source["class_path"] == f"vlm.data.{reader}"
    assert found.num_samples == 1
    if reader in ("LlavaJson", "QwenJson", "MessagesJson") and write is not _yaml:
        assert source["init_args"]["image_root"] == str(folder / "photos"), "found by looking for the images"


def test_a_system_reads_boxes_as_its_recipe_does(folder: Path) -> None:
    found = recognise(str(_llava(folder)), images=folder / "photos", options={"LlavaJson": {"places": True}})
    assert found.sources[0]["init_args"]["places"] is True


# held out by image


@pytest.mark.parametrize("seed", range(3))
def test_no_image_and_no_group_is_on_both_sides(seed: int, folder: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    records = []
    for number in range(60):
        images = sorted({f"{i}.png" for i in torch.randint(0, 40, (1 + number % 2,), generator=generator).tolist()})
        turns = [{"from": "human", "value": "<image>" * len(images)}, {"from": "gpt", "value": str(number)}]
        group = {"group": f"g{number // 20}"} if number % 20 < 3 else {}
        records.append({"id": number, "image": images, "conversations": turns, **group})

    def sides(ordered: list[Any]) -> tuple[set[str], list[Any]]:
        (folder / "0").mkdir(exist_ok=True)
        source = vlm.data.LlavaJson(str(_json(folder / "0", ordered)))
        out = HoldOut(0.1, [source])
        (training,), (held,) = out.parts("training"), out.parts("validation")
        assert sorted(s.id for part in (training, held) for s in part) == sorted(str(r["id"]) for r in ordered)
        seen = [{image.name for s in part for image in s.images} for part in (training, held)]
        groups = [{s.group for s in part if s.group} for part in (training, held)]
        assert not seen[0] & seen[1]
        assert not groups[0] & groups[1]
        assert len(held) >= 6
        return {s.id for s in held}, [held.place(i) for i in range(len(held))]

    first, places = sides(records)
    assert first == {str(records[place[1]]["id"]) for place in places}
    assert first == sides(records[::-1])[0], "by content, not by place"


# what is wrong is one line


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no weights", ["nowhere/at/all", "no such folder"]),
        ("unknown weights", ["photos", "neither stage.json nor weight files"]),
        ("no data", ["gone.json", "no such file"]),
        ("empty data", ["data.json", "holds no samples"]),
        ("unknown form", ["data.json", "no form that is known"]),
        ("two forms", ["data.json", "two forms", "--data LlavaJson=", "split it"]),
        ("two looks", ["photos", "may be for", "--data ImageFolder="]),
        ("missing images", ["images are missing", "a.png", "--images DIR"]),
        ("all bad", ["none of 1 records can be read"]),
        ("split of nothing", ["val_split=0.5", "none can be held out"]),
        ("bad split", ["--val-split must be between 0 and 1"]),
        ("both methods", ["--lora and --dora"]),
        ("weights and follows", ["--weights and --stage.follows"]),
        ("other system", ["QwenVL", "LLaVA15"]),
        ("nothing to train on", ["say what to train on"]),
        ("data alone", ["--weights"]),
    ],
)
def test_mistakes_end_in_one_line(
    case: str, words: list[str], official: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, weights, options = _llava(folder), str(official), []
    if case == "no weights":
        weights = "nowhere/at/all"
    elif case == "unknown weights":
        weights = str(folder / "photos")
    elif case == "no data":
        data = folder / "gone.json"
    elif case == "empty data":
        data.write_text("[]")
    elif case == "unknown form":
        data.write_text('[{"a": 1}]')
    elif case == "two forms":
        data.write_text(json.dumps([*json.loads(data.read_text()), *json.loads(_qwen(folder / "photos").read_text())]))
    elif case == "two looks":
        _captions(folder)
        data = folder / "photos"
        _tars(folder).joinpath("0.tar").rename(data / "0.tar")
    elif case == "missing images":
        (folder / "photos/a.png").unlink()
    elif case == "all bad":
        data.write_text(data.read_text().replace("<image>", ""))
    elif case == "split of nothing":
        options = ["--val-split=0.5"]
        data.write_text(json.dumps(json.loads(data.read_text()) * 4))
    elif case == "bad split":
        options = ["--val-split=1.5"]
        data.write_text(json.dumps(json.loads(data.read_text()) * 4))
    elif case == "both methods":
        options = ["--lora", "--dora"]
    elif case == "weights and follows":
        options = ["--stage.follows=[]"]
    elif case == "other system":
        options = ["-c", str(recipe_folder("qwen_vl") / "model.yaml")]
    command = ["fit", f"--weights={weights}", f"--data={data}", *options]
    if case == "nothing to train on":
        command = ["fit", f"--weights={weights}"]
    elif case == "data alone":
        command = ["fit", f"--data={data}"]
    assert cli.main([*command, f"--trainer.default_root_dir={folder / 'run'}", *QUIET]) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("vlm: error: ")]
    assert len(lines) == 1, err
    for word in words:
        assert word in lines[0]


# recipes


def _stages() -> list[Any]:
    return [
        pytest.param(node, id=f"{name}-{node.name}")
        for name in systems()
        for node in load_recipe(find_recipe(name)).nodes
        if isinstance(node, TrainingStage)
    ]


BATCHES = {
    "blip-1_pretrain": 2880, "blip-2_caption": 256, "blip-2_nlvr": 256, "blip-2_vqa": 256,
    "blip-2_retrieval_coco": 256, "blip-2_retrieval_flickr": 256,
    "blip2-1_qformer": 1680, "blip2-2_opt": 1920, "blip2-2_vicuna": 1920, "blip2-2_flan_t5": 1520,
    "blip2-3_caption": 256, "blip2-3_vqa": 128, "blip2-3_retrieval": 224,
    "instructblip-1_instruct": 128, "instructblip-2_science_qa": 64,
    "minigpt4-1_align": 256, "minigpt4-2_finetune": 12,
    "cogagent-1a_cross": 4608, "cogagent-1b_expert": 4608, "cogagent-2_multitask": 1024, "cogagent-3_agent": 1024,
    "cogvlm-1_pretrain": 8192, "cogvlm-2a_grounding": 1024, "cogvlm-2b_grounding_490": 1024, "cogvlm-3_sft": 1024,
    "cogvlm-3_generalist": 1024,
    "fuyu-1_finetune": 128, "llava-1_align": 128, "llava-2_chat": 32, "llava-2_science_qa": 32,
    "llava_1_5-1_align": 256, "llava_1_5-2_finetune": 128, "llava_next-1_align": 256, "llava_next-2_finetune": 128,
    "mini_gemini-1_align": 256, "mini_gemini-2_finetune": 128, "mini_gemini-2_finetune_hd": 128,
    "qwen_vl-1_pretrain": 30720, "qwen_vl-2_multitask": 4096, "qwen_vl-3_sft": 128,
    "vila-0_align": 256, "vila-1_pretrain": 1024, "vila-2_sft": 128,
    "xcomposer-1_pretrain": 7680, "xcomposer-2_multitask": 256, "xcomposer-3_instruct": 256,
    "xcomposer2-1_pretrain": 4096, "xcomposer2-2_sft": 2048, "xcomposer2-3_compose": 64,
    "xcomposer2_4khd-1_pretrain": 4096, "xcomposer2_4khd-2_sft": 2048,
}  # fmt: skip
"""As the papers and official scripts have them."""


@pytest.mark.parametrize("node", _stages())
def test_recipes_say_what_a_device_computes_at_once_and_keep_the_published_batch(
    node: TrainingStage, request: pytest.FixtureRequest
) -> None:
    data: dict[str, Any] = {}
    for file in node.configs:
        added = yaml.safe_load(file.read_text()).get("data", {}).get("init_args", {})
        data |= added | {"batch": data.get("batch", {}) | added.get("batch", {})}
    assert data["batch"]["size"] == BATCHES[request.node.callspec.id]
    limits = [key for key in ("micro_batch_size", "max_tokens") if data.get(key) is not None]
    limits += ["packs"] * ("packs" in data["batch"])  # of systems that compare samples
    assert len(limits) == 1
    if limits == ["micro_batch_size"]:
        assert data["batch"]["size"] % data["micro_batch_size"] == 0
    assert "accumulate_grad_batches" not in json.dumps(data)


def test_files_and_weights_mean_the_same_for_a_recipe(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("trainer: {max_epochs: 2}\n")
    words = ["fit", "--recipe", "llava_1_5", "--config", str(over), "--dry-run"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.count(f"-c {over} --trainer.default_root_dir") == 2
    assert cli.main([*words, "--stage", "2_finetune", "--weights", str(official)]) == 0
    out = capsys.readouterr().out
    assert f"--weights {official}" in out
    assert "stage.follows" not in out
    assert cli.main([*words, "--weights", str(official)]) == 2
    assert "name it with --stage" in capsys.readouterr().err
