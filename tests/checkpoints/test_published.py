"""What `--weights` may name, and that nothing random ever answers."""

import json
import pickle
import re
import shutil
from pathlib import Path

import vlm
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPVisionModel, LlamaConfig, LlavaForConditionalGeneration

import cli
from tests.conftest import GOLDEN
from tests.support.systems import picture
from tests.commands.test_cli import World
from tests.checkpoints.test_convert import official_folder, tiny_config
from tests.checkpoints.test_export import finished
from vlm.checkpoints.published.open import find_weights
from vlm.errors import UserError
from vlm.language import Decoding
from vlm.sample import ImagePart, Message, Sample, TextPart

TOKENIZER_FILE = GOLDEN / "_shared" / "llama_sp_tokenizer.model"


def question(folder: Path) -> Sample:
    parts = (ImagePart(), TextPart("\nWhat is it?"))
    return Sample("q", (Message("user", parts),), (picture(folder, "q", (40, 30), 0),))


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder of transformers with the vocabulary of its tokenizer."""
    config = tiny_config()
    config.text_config.vocab_size = 32064
    config.image_token_index = config.image_token_id = 32000
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "hf")
    shutil.copy(TOKENIZER_FILE, tmp_path / "hf" / "tokenizer.model")
    return tmp_path / "hf"


def test_a_folder_of_transformers_opens_with_its_own_logits(hub: Path, tmp_path: Path) -> None:
    module, model = vlm.load(hub), LlavaForConditionalGeneration.from_pretrained(hub).eval()
    assert module.load_report.new == []
    sample = question(tmp_path)
    item = module.codec.encode(sample, generate=True)
    batch = module.codec.collate([item], counts={})
    ids = batch.text.ids.clone()
    ids[batch.text.slots["image"]] = 32000
    with torch.no_grad():
        logits = model(input_ids=ids[None], pixel_values=batch.views["image"].pixels, use_cache=False).logits[0]
        row = batch.text
        ours = module.language(
            inputs_embeds=module.embed_row(batch)[None],
            position_ids=row.positions[None],
            cu_seqlens=row.cu_seqlens,
            max_len=row.max_len,
            use_cache=False,
        ).logits[0]
    torch.testing.assert_close(logits[:, :32000], ours, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("connector", ["linear", "mlp2x_gelu"])
def test_an_official_folder_finds_its_tower(connector, tmp_path: Path, capfd) -> None:
    """The same answers with the tower inside, with the tower where the config says, and as an artefact of ours."""
    official_folder(tmp_path / "with", connector=connector, vocab=32000)
    official_folder(tmp_path / "without", connector=connector, tower=False, vocab=32000)
    from tests.checkpoints.test_convert import clip_tensors

    torch.manual_seed(1)
    whole = {k: v for f in (tmp_path / "with").glob("*.bin") for k, v in torch.load(f).items()}
    for folder in ("with", "without"):
        shutil.copy(TOKENIZER_FILE, tmp_path / folder / "tokenizer.model")
    vision = "model.vision_tower.vision_tower.vision_model."
    (tmp_path / "clip").mkdir()
    tower = {k.removeprefix(vision): v.contiguous() for k, v in whole.items() if k.startswith(vision)}
    assert tower.keys() == clip_tensors("", lambda *shape: torch.zeros(shape)).keys()
    save_file({f"vision_model.{k}": v for k, v in tower.items()}, tmp_path / "clip" / "model.safetensors")
    config = json.loads((tmp_path / "without" / "config.json").read_text())
    (tmp_path / "without" / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(tmp_path / "clip")}))
    states = [vlm.load(tmp_path / folder).state_dict() for folder in ("with", "without")]
    language = {k for k in states[0] if k.startswith("language.")}
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        if name.startswith("vision."):
            assert torch.equal(states[0][name], states[1][name]), name
    assert language
    assert states[0]["language.lm_head.weight"].shape[0] == 32000
    system = "llava" if connector == "linear" else "llava_1_5"
    assert cli.main(["convert", str(tmp_path / "with"), str(tmp_path / "a"), "--system", system, "--to", "ours"]) == 0
    ours = vlm.load(tmp_path / "a").state_dict()
    assert all(torch.equal(states[0][name], ours[name]) for name in ours)


def _pickled(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Path("/")}))


def _plain_llama(folder: Path) -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _clip(folder: Path) -> None:
    CLIPVisionModel(tiny_config().vision_config).save_pretrained(folder)


def _unfinished(folder: Path) -> None:
    (folder / "1_align").mkdir()
    (folder / "1_align" / "config.yaml").write_text("x: 1")


WRONG = {
    "empty folder": (lambda folder: None, ["neither stage.json nor weight files", "published folder"]),
    "notes": (lambda f: (f / "notes.txt").write_text("x"), ["neither stage.json nor weight files"]),
    "pickle": (_pickled, ["pytorch_model.bin", "could run code", "safetensors"]),
    "half a pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b"PK\x03\x04"), ["truncated", "fetch it again"]),
    "html": (lambda f: (f / "model.safetensors").write_text("<html>404</html>"), ["model.safetensors", "fetch"]),
    "another architecture": (_plain_llama, ["no published folder of a system here", "another system"]),
    "a tower": (_clip, ["no published folder of a system here"]),
    "unfinished run": (_unfinished, ["1_align", "not finished", "vlm fit"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_folders_are_refused_in_one_line(case: str, tmp_path: Path, capfd) -> None:
    spoil, words = WRONG[case]
    folder = tmp_path / "weights"
    folder.mkdir()
    spoil(folder)
    check_refused(folder, words, capfd)


def check_refused(weights: Path, words: list[str], capfd) -> None:
    capfd.readouterr()
    assert cli.main(["predict", "--weights", str(weights), "--prompt", "Hello"]) == 2
    said = capfd.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert said.out == ""
    for word in ("vlm: error: ", str(weights), *words):
        assert word in lines[0], lines[0]


def test_files_and_missing_folders_are_refused(tmp_path: Path, capfd) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    check_refused(tmp_path / "notes.txt", ["is a file", "run folder"], capfd)
    check_refused(tmp_path / "nowhere", ["no such folder", "run folder"], capfd)


def test_a_run_with_two_ends_is_asked_which(tmp_path: Path) -> None:
    for stage in ("1_align", "2_chat", "2_science_qa"):
        (tmp_path / stage / "artefact").mkdir(parents=True)
        (tmp_path / stage / "artefact" / "stage.json").write_text("{}")
    with pytest.raises(UserError, match=r"several stages; name one of them: .*2_chat, .*2_science_qa"):
        find_weights(tmp_path)
    shutil.rmtree(tmp_path / "2_chat")
    assert find_weights(tmp_path) == str(tmp_path / "2_science_qa" / "artefact")


def test_half_a_folder_does_not_answer_with_random_weights(hub: Path, tmp_path: Path, capfd) -> None:
    file = hub / "model.safetensors"
    whole = load_file(file)
    for gone in ("layers.3.mlp.up_proj", "multi_modal_projector.linear_2", "encoder.layers.1.mlp.fc1.bias", "lm_head"):
        kept = {name: tensor for name, tensor in whole.items() if gone not in name}
        assert len(kept) < len(whole), gone
        save_file(kept, file, metadata={"format": "pt"})
        check_refused(hub, [gone, "incomplete"], capfd)
    save_file(whole, file, metadata={"format": "pt"})
    (hub / "tokenizer.model").unlink()
    check_refused(hub, ["neither tokenizer.model nor tokenizer.json"], capfd)
    (hub / "config.json").unlink()
    check_refused(hub, ["config.json", "missing"], capfd)


def test_an_artefact_without_its_tensors_is_refused(tmp_path: Path, capfd) -> None:
    """A part that nothing describes would be drawn anew."""
    run = finished(tmp_path / "run")
    file = run / "2_finetune" / "artefact" / "stage.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"frozen": {}}))
    check_refused(run / "2_finetune", ["vision", "would be random"], capfd)
    file.write_text(json.dumps(meta))
    assert vlm.load(run).generate([question(tmp_path)], decoding=Decoding(max_new_tokens=2))


def test_validation_takes_a_published_folder_too(tmp_path: Path, capfd) -> None:
    run = finished(tmp_path / "run")
    assert cli.main(["export", str(run), str(tmp_path / "hf")]) == 0
    world = World(tmp_path)
    world.command, world.stage = "validate", "2_finetune"
    source = {"class_path": "vlm.data.LlavaJson", "init_args": {"path": str(tmp_path / "data.json")}}
    losses = []
    for weights in (run, tmp_path / "hf"):
        capfd.readouterr()
        assert world.fit(f"--weights={weights}", f"--data.init_args.val_sources={json.dumps([source])}") == 0
        losses += re.findall(r"^loss +([\d.]+)", capfd.readouterr().out, re.MULTILINE)
    assert len(losses) == 2
    assert losses[0] == losses[1]
    assert world.fit(f"--weights={tmp_path}", f"--data.init_args.val_sources={json.dumps([source])}") == 2
    assert "neither stage.json nor weight files" in capfd.readouterr().err
